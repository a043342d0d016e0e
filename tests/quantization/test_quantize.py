"""Quantized models: the Keras model against its file, saving, and what is refused."""

import keras
import numpy as np
import pytest
from hand_made import copy_of, predict

from keras_effnet.export import TFLiteRunner
from keras_effnet.export.int8_tflite import convert_quantized
from keras_effnet.quantization import QuantizationConfig, is_quantized, quantize_model
from keras_effnet.quantization.fake_quant import QUANTIZED_KERNELS, FakeQuant
from keras_effnet.quantization.lowering import read_quantized

# A float32 output of the runner and of the model: the same integers, the same scale.
OUTPUT_TOLERANCE = 1e-6
STEP = 1 / 256


# --- The quantized model ----------------------------------------------------------------------


def test_the_input_model_is_not_changed(tiny, tiny_weights, tiny_quantized):
    for old, new in zip(tiny_weights, tiny.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    assert not is_quantized(tiny) and is_quantized(tiny_quantized)


def test_it_predicts_about_what_the_float_model_does(tiny, tiny_quantized, tiny_images):
    expected = tiny.predict(tiny_images, verbose=0)
    assert np.ptp(expected) > 4 * STEP, "a constant output would prove nothing"
    # 8 bits through a dozen layers: a few hundredths of the probabilities.
    error = abs(predict(tiny_quantized, tiny_images) - expected).mean()
    assert 0 < error < 0.02


def test_the_quantized_model_holds_ranges_and_no_batch_norm(tiny_quantized):
    assert is_quantized(tiny_quantized)
    assert any(isinstance(layer, FakeQuant) for layer in tiny_quantized.layers)
    assert not any(
        isinstance(layer, keras.layers.BatchNormalization) for layer in tiny_quantized.layers
    )


def test_the_file_computes_what_the_model_predicts(tiny_quantized, tiny_images, tmp_path):
    quantized, images = tiny_quantized, tiny_images
    path = tmp_path / "model.tflite"
    path.write_bytes(convert_quantized(quantized, "uint8"))
    runner = TFLiteRunner(path)
    expected = quantized.predict(images, verbose=0)
    outputs = runner.predict(images)
    assert np.ptp(expected) > 4 * STEP, "a constant output would prove nothing"
    assert abs(outputs - expected).max() <= OUTPUT_TOLERANCE
    # The check can fail: other kernels give another file.
    changed = copy_of(quantized)
    for layer in changed.layers:
        if isinstance(layer, QUANTIZED_KERNELS):
            layer.kernel.assign(np.flip(layer.kernel, axis=-1))
    path.write_bytes(convert_quantized(changed, "uint8"))
    assert abs(TFLiteRunner(path).predict(images) - expected).max() > OUTPUT_TOLERANCE


def test_saved_and_loaded_it_predicts_the_same(tiny_quantized, tiny_images, tmp_path):
    quantized, images = tiny_quantized, tiny_images
    quantized.save(tmp_path / "quantized.keras")
    loaded = keras.models.load_model(tmp_path / "quantized.keras")
    np.testing.assert_array_equal(
        loaded.predict(images, verbose=0), quantized.predict(images, verbose=0)
    )


def test_ranges_that_were_moved_are_saved(tiny_quantized, tiny_images, tmp_path):
    moved = copy_of(tiny_quantized)
    for layer in moved.layers:
        if isinstance(layer, FakeQuant) and not layer.fixed:
            low, high = layer.real_range()
            layer.set_range(low, high * 1.5)
        elif isinstance(layer, QUANTIZED_KERNELS):
            layer.kernel_limits.assign(layer.kernel_limits * 1.25)
    moved.save(tmp_path / "moved.keras")
    loaded = read_quantized(keras.models.load_model(tmp_path / "moved.keras"))
    expected = read_quantized(moved)
    before = read_quantized(tiny_quantized)
    for node in loaded:
        assert node.params == expected[node.name].params
        if "limits" in node.weights:
            np.testing.assert_array_equal(
                node.weights["limits"], expected[node.name].weights["limits"]
            )
    # The check can fail: the ranges are not those that the layers were made with.
    assert sum(node.params != before[node.name].params for node in loaded) > 5


def test_a_quantized_model_is_refused(tiny_quantized, tiny_images):
    with pytest.raises(ValueError, match="is quantized already"):
        quantize_model(tiny_quantized, tiny_images, verbose=False)


def test_unknown_engines_are_named(tiny, tiny_images):
    with pytest.raises(ValueError, match=r"`engine` must be one of .*'tfmot'.* Received: 'qat'"):
        quantize_model(tiny, tiny_images, engine="qat")


def test_bad_configurations_are_named():
    with pytest.raises(ValueError, match="`method` must be one of"):
        QuantizationConfig(method="magic")
    for wrong in ("some", 0.0, 1.0, 2, True, float("nan")):
        with pytest.raises(ValueError, match="`equalize` must be"):
            QuantizationConfig(equalize=wrong)
    with pytest.raises(ValueError, match="`keep_float` must be a tuple"):
        QuantizationConfig(keep_float="stem_conv")
