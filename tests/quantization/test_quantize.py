"""Quantized models: fake-quant against the reference, the Keras model against its file."""

import keras
import numpy as np
import pytest

from keras_effnet import create_model
from keras_effnet.export import TFLiteRunner
from keras_effnet.export.int8_tflite import convert_quantized
from keras_effnet.quantization import QuantizationConfig, is_quantized, quantize_model
from keras_effnet.quantization.fake_quant import QUANTIZED_KERNELS, FakeQuant
from keras_effnet.quantization.params import (
    QuantParams,
    dequantize,
    fake_quantize,
    quantize,
    quantize_bias,
    quantize_kernel,
)

# Integer kernels round a product of scales once more than float arithmetic does, so a value near
# a rounding boundary lands one step off, and a few such steps add up through 16 blocks.
OUTPUT_STEPS = 12
STEP = 1 / 256


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).uniform(0, 255, (24, 32, 32, 3)).astype("float32").round()


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    model = create_model("EfficientNetTiny", weights=None, classes=6)
    rng = np.random.default_rng(0)
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.set_weights([rng.uniform(0.5, 1.5, w.shape) for w in layer.get_weights()])
    return model


@pytest.fixture(scope="module", params=["none", "all"])
def quantized(request, model, images):
    config = QuantizationConfig(equalize=request.param)
    return quantize_model(model, images, config, verbose=False)


# --- The reference, by hand -------------------------------------------------------------------


def test_range_to_scale_and_zero_point_by_hand():
    # 255 steps of 0.1 from -5 to 20.5: zero is step 50 of 255, so int8 -128 + 50 = -78.
    params = QuantParams.from_range(-5.0, 20.5)
    assert params.scale == pytest.approx(0.1)
    assert params.zero_point == -78
    assert quantize(np.array([0.0, 0.1, -5.0, 20.5, 99.0]), params).tolist() == [
        -78,
        -77,
        -128,
        127,
        127,
    ]
    assert dequantize(np.array([-78], np.int8), params)[0] == 0


def test_kernel_by_hand():
    # Limit 12.7: a step is 0.1; 0.05 is half a step and goes up; nothing reaches -128.
    kernel = np.array([12.7, -12.7, 0.1, 0.04, -99.0], "float32")
    assert quantize_kernel(kernel, np.float32(12.7)).tolist() == [127, -127, 1, 0, -127]


def test_bias_by_hand():
    integers = quantize_bias(np.array([1.0, -0.5]), 0.5, np.array([0.1, 0.01]))
    assert integers.tolist() == [20, -100]
    with pytest.raises(OverflowError, match="does not fit an int32"):
        quantize_bias(np.array([1.0]), 1e-6, np.array([1e-6]))


@pytest.mark.parametrize("low, high", [(-5.0, 20.5), (0.0, 6.0), (-0.278, 3.1), (-1.0, 1.0)])
def test_fake_quant_layer_equals_the_reference_bit_for_bit(low, high):
    values = np.random.default_rng(0).normal(0, (high - low) / 2, (64, 64)).astype("float32")
    inputs = keras.Input((64,))
    layer = keras.Model(inputs, FakeQuant(low, high)(inputs))
    np.testing.assert_array_equal(
        layer.predict(values, verbose=0), fake_quantize(values, low, high)
    )


def test_bad_ranges_are_named():
    for low, high in ((1.0, 2.0), (0.0, 0.0), (np.nan, 1.0)):
        with pytest.raises(ValueError, match="must be finite and not empty, and must contain 0"):
            QuantParams.from_range(low, high)


# --- The quantized model ----------------------------------------------------------------------


def test_the_input_model_is_not_changed(model, images):
    before = [weight.copy() for weight in model.get_weights()]
    quantize_model(model, images[:8], verbose=False)
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    assert not is_quantized(model)


def test_the_quantized_model_holds_ranges_and_no_batch_norm(quantized):
    assert is_quantized(quantized)
    assert any(isinstance(layer, FakeQuant) for layer in quantized.layers)
    assert not any(isinstance(layer, keras.layers.BatchNormalization) for layer in quantized.layers)


def test_the_file_computes_what_the_model_predicts(quantized, images, tmp_path):
    path = tmp_path / "model.tflite"
    path.write_bytes(convert_quantized(quantized, "uint8"))
    runner = TFLiteRunner(path)
    expected = quantized.predict(images, verbose=0)
    outputs = runner.predict(images)
    assert expected.std() > STEP, "a constant output would prove nothing"
    assert abs(outputs - expected).max() <= OUTPUT_STEPS * STEP
    # The check can fail: other kernels give another file.
    changed = keras.models.clone_model(quantized)
    changed.set_weights(quantized.get_weights())
    for layer in changed.layers:
        if isinstance(layer, QUANTIZED_KERNELS):
            layer.kernel.assign(np.flip(layer.kernel, axis=-1))
    path.write_bytes(convert_quantized(changed, "uint8"))
    assert abs(TFLiteRunner(path).predict(images) - expected).max() > OUTPUT_STEPS * STEP


def test_saved_and_loaded_it_predicts_the_same(quantized, images, tmp_path):
    quantized.save(tmp_path / "quantized.keras")
    loaded = keras.models.load_model(tmp_path / "quantized.keras")
    np.testing.assert_array_equal(
        loaded.predict(images, verbose=0), quantized.predict(images, verbose=0)
    )


@pytest.mark.parametrize(
    "data, message",
    [
        (np.zeros((0, 32, 32, 3), "float32"), "needs at least 2 image"),
        (np.full((8, 32, 32, 3), np.nan, "float32"), "must be finite"),
        (np.random.default_rng(0).uniform(0, 1, (8, 32, 32, 3)).astype("float32"), "0\\.\\.255"),
        (np.full((8, 32, 32, 3), 7, "float32"), "must differ"),
        (np.zeros((8, 16, 16, 3), "float32"), "shape"),
    ],
)
def test_bad_calibration_data_is_refused(model, data, message):
    with pytest.raises(ValueError, match=message):
        quantize_model(model, data, verbose=False)


def test_a_quantized_model_is_refused(quantized, images):
    with pytest.raises(ValueError, match="is quantized already"):
        quantize_model(quantized, images, verbose=False)


def test_bad_configurations_are_named():
    with pytest.raises(ValueError, match="`method` must be one of"):
        QuantizationConfig(method="magic")
    with pytest.raises(ValueError, match="`equalize` must be"):
        QuantizationConfig(equalize="some")
    with pytest.raises(ValueError, match="`keep_float` must be a tuple"):
        QuantizationConfig(keep_float="stem_conv")
