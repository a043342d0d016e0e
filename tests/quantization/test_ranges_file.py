"""Calibration results in a file, and models quantized with them."""

import json

import keras
import numpy as np
import pytest

from keras_effnet.quantization import (
    QuantizationConfig,
    load_calibration,
    quantize_model,
    save_calibration,
)
from keras_effnet.quantization.lowering import integer_bias, integer_kernel, read_quantized
from keras_effnet.quantization.params import QuantParams
from keras_effnet.quantization.ranges_file import TensorRange

PLAIN = QuantizationConfig(corrections=())
# Minimum and maximum are float32, so a scale that goes through them may move by its last bits.
SCALE_TOLERANCE = 1e-6


def build(channels=8, name="conv"):
    keras.utils.set_random_seed(0)
    layers = keras.layers
    images = keras.Input((16, 16, 3), name="images")
    x = layers.Rescaling(1 / 255, name="rescaling")(images)
    x = layers.Conv2D(channels, 3, activation="swish", name=name)(x)
    x = layers.Conv2D(channels, 1, name="project")(x)
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    x = layers.Dense(5, activation="softmax", name="predictions")(x)
    return keras.Model(images, x, name="small")


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).uniform(0, 255, (16, 16, 16, 3)).round().astype("float32")


@pytest.fixture(scope="module")
def quantized(model, images):
    return quantize_model(model, images, PLAIN, verbose=False)


@pytest.fixture
def saved(quantized, tmp_path):
    path = tmp_path / "ranges.json"
    save_calibration(quantized, path)
    return path


def test_the_file_holds_every_range(quantized, saved):
    graph = read_quantized(quantized)
    ranges = load_calibration(saved)
    expected = {node.name: node.params for node in graph if node.params is not None}
    assert {name: entry.params for name, entry in ranges.items()} == expected
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_a_model_quantized_with_ranges_needs_no_data_and_is_the_same(
    model, quantized, saved, images
):
    again = quantize_model(model, None, PLAIN, verbose=False, ranges=load_calibration(saved))
    first, second = read_quantized(quantized), read_quantized(again)
    assert list(first.nodes) == list(second.nodes)
    for node in first:
        other = second[node.name]
        if node.params is not None:
            assert other.params.scale == pytest.approx(node.params.scale, rel=SCALE_TOLERANCE)
            assert other.params.zero_point == node.params.zero_point
        if "kernel" in node.weights:
            np.testing.assert_array_equal(integer_kernel(other)[0], integer_kernel(node)[0])
            np.testing.assert_array_equal(
                integer_bias(second, other)[0], integer_bias(first, node)[0]
            )
    np.testing.assert_allclose(
        again.predict(images, verbose=0), quantized.predict(images, verbose=0), atol=1 / 256
    )


def test_ranges_are_used_in_place_of_the_data(model, saved, images):
    ranges = load_calibration(saved)
    wide = QuantParams(1.0, 0)
    given = {"project": TensorRange(wide, ranges["project"].channels)}
    config = QuantizationConfig(corrections=("bias_correction",))
    found = read_quantized(quantize_model(model, images, config, verbose=False, ranges=given))
    assert found["project"].params.scale == pytest.approx(1.0, rel=0.02)
    # The others are found from the data, as before.
    assert found["conv"].params.scale == pytest.approx(ranges["conv"].params.scale, rel=0.02)


def test_ranges_of_another_model_are_refused(model, saved):
    ranges = load_calibration(saved)
    with pytest.raises(ValueError, match="tensors that the model 'small' does not have.*'conv'"):
        quantize_model(build(name="other"), None, PLAIN, verbose=False, ranges=ranges)
    with pytest.raises(ValueError, match="belong to another model.*has 4 channels. Received: 8"):
        quantize_model(build(channels=4), None, PLAIN, verbose=False, ranges=ranges)
    del ranges["project"]
    with pytest.raises(ValueError, match="lack 1 of .* tensors.*Missing: 'project'"):
        quantize_model(model, None, PLAIN, verbose=False, ranges=ranges)


def test_data_can_be_left_out_only_where_nothing_is_measured(model, saved):
    with pytest.raises(ValueError, match="`calibration_data` are needed.*no ranges"):
        quantize_model(model, None, PLAIN, verbose=False)
    config = QuantizationConfig(corrections=("bias_correction",))
    with pytest.raises(ValueError, match="`calibration_data` are needed.*bias_correction"):
        quantize_model(model, None, config, verbose=False, ranges=load_calibration(saved))


def test_bad_files_are_named(saved, model, tmp_path):
    other = tmp_path / "other.json"
    other.write_text("no JSON")
    with pytest.raises(ValueError, match="is no JSON file"):
        load_calibration(other)
    other.write_text('{"scale": 1}')
    with pytest.raises(ValueError, match="must hold a 'keras_effnet calibration' of version 1"):
        load_calibration(other)
    data = json.loads(saved.read_text())
    data["tensors"]["conv"]["scale"] = -1
    other.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="no usable range of 'conv'.*scale"):
        load_calibration(other)
    data["tensors"] = []
    other.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="must hold `tensors` by name.*list"):
        load_calibration(other)
    with pytest.raises(FileNotFoundError):
        load_calibration(tmp_path / "nowhere.json")
    with pytest.raises(ValueError, match="is not quantized"):
        save_calibration(model, other)
