"""Rescaling brings the ranges of channels closer, without a new operation, and nearly exactly."""

import numpy as np
import pytest
from hand_made import compute, folded, functional, layers, ops, predict, values

from keras_effnet.quantization import QuantizationConfig, quantize_model
from keras_effnet.quantization.calibration import TensorStatistics, collect
from keras_effnet.quantization.equalization import swish, swish_candidates
from keras_effnet.quantization.lowering import read_quantized
from keras_effnet.quantization.rescaling import (
    FACTORS,
    _fit,
    _rounded_swish,
    rescale_swishes,
    search_rescaling,
)

SIDE = 8
# The first channel is far out on the arms of its swish, the others are near 0.
REACHES = np.array([60.0, 1.5, 1.0, 0.5], np.float32)


def block(x):
    x = layers.Conv2D(4, 3, padding="same", activation="swish", name="expand")(x)
    x = layers.DepthwiseConv2D(3, padding="same", activation="swish", name="depthwise")(x)
    gate = layers.GlobalAveragePooling2D(keepdims=True)(x)
    gate = layers.Conv2D(4, 1, activation="sigmoid", name="gate")(gate)
    return layers.Conv2D(4, 1, name="project")(layers.Multiply(name="excite")([x, gate]))


@pytest.fixture
def model():
    model = functional(SIDE, block)
    layer, reader = model.get_layer("expand"), model.get_layer("depthwise")
    images = values(32, side=SIDE)
    kernel, bias = layer.get_weights()
    outputs = np.abs(predict_layer(model, "expand", images)).max(axis=(0, 1, 2))
    layer.set_weights([kernel * REACHES / outputs, bias * REACHES / outputs])
    # What reads the channels makes them alike again.
    kernel, bias = reader.get_weights()
    reader.set_weights([kernel / np.reshape(REACHES, (-1, 1)), bias])
    return model


def predict_layer(model, name, images):
    import keras

    layer = model.get_layer(name)
    linear = layers.Conv2D(4, 3, padding="same")
    tensor = linear(model.inputs[0])
    linear.set_weights(layer.get_weights())
    return keras.Model(model.inputs[0], tensor).predict(images, verbose=0)


def statistics_of(graph):
    images = values(16, side=SIDE)
    return collect(graph, [images[:8], images[8:]], 2, verbose=False)


def error(outputs, expected):
    """Relative to how far the outputs of the images differ."""
    return float(np.mean((outputs - expected) ** 2) / np.var(expected, axis=0).mean())


def test_it_computes_nearly_the_same_with_the_same_operations(model):
    graph = folded(model)
    before, statistics = ops(graph), statistics_of(graph)
    names = swish_candidates(graph)
    assert rescale_swishes(graph, statistics, names)[:1] == names[:1]
    assert ops(graph) == before
    images = values(8, side=SIDE, seed=1)
    expected = predict(model, images)
    outputs = compute(graph, images)
    assert 0 < error(outputs, expected) < 0.02
    # The large channel gave up most of its range.
    source = graph[graph[names[0]].inputs[0]].name
    narrowed = statistics[source].high.max() / statistics_of(graph)[source].high.max()
    assert narrowed > 3
    # The check can fail: without the gains of the readers it is another function.
    graph["depthwise"].weights["kernel"] = folded(model)["depthwise"].weights["kernel"]
    assert error(compute(graph, images), expected) > 0.05


def test_a_quantized_model_has_less_noise_for_nothing(model):
    images, unseen = values(16, side=SIDE), values(32, side=SIDE, seed=1)
    expected = predict(model, unseen)
    errors, operations = {}, {}
    for corrections in ((), ("swish_rescaling",)):
        config = QuantizationConfig(corrections=corrections)
        quantized = quantize_model(model, images, config, verbose=False)
        errors[corrections] = error(predict(quantized, unseen), expected)
        operations[corrections] = ops(read_quantized(quantized))
    assert errors["swish_rescaling",] < 0.7 * errors[()]
    assert operations["swish_rescaling",] == operations[()]


def test_swishes_that_are_equalized_are_left_alone(model):
    config = QuantizationConfig(corrections=("swish_equalization",), equalize="all")
    both = QuantizationConfig(corrections=("swish_rescaling", "swish_equalization"), equalize="all")
    weights = [
        quantize_model(model, values(16, side=SIDE), each, verbose=False).get_weights()
        for each in (config, both)
    ]
    for alone, together in zip(*weights, strict=True):
        np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-6)


# --- The search -------------------------------------------------------------------------------


def statistics(rows):
    rows = rows.astype(np.float32)
    return TensorStatistics(
        *(rows.min(axis=0), rows.max(axis=0), rows.mean(axis=0)),
        *([float(rows.min())], [float(rows.max())]),
        *(rows, np.ones(len(rows), np.float32), np.arange(len(rows)) // 16),
    )


def test_even_channels_stay_as_they_are():
    rows = np.random.default_rng(0).uniform(-5, 5, (1024, 4))
    found = search_rescaling(statistics(rows), np.ones(4))
    assert found.noise_without - found.noise < 2e-4


def test_the_noise_is_that_of_rounding_and_approximation():
    rows = np.random.default_rng(0).normal(size=(512, 4)) * REACHES / 3
    found = search_rescaling(statistics(rows), 1 / REACHES**2)
    assert found.factors[0] > 2 * found.factors[1:].max()
    # What integers of the best range make of the samples.
    scaled = (rows / found.factors).astype(np.float32)
    end = min(
        np.geomspace(3.0, max(rows.max(), 3.0), 16),
        key=lambda end: abs(behind(rows, scaled, found.gains, end) - found.noise),
    )
    assert behind(rows, scaled, found.gains, end) == pytest.approx(found.noise, rel=1e-2)
    assert found.noise < found.noise_without / 2


def behind(rows, scaled, gains, end):
    low = min(6.0, end / 2, max(0.28, -rows.min()))
    step, step_out = (end + low) / 255, (end + 0.28) / 255
    zero, zero_out = np.round(low / step), np.round(0.28 / step_out)
    inputs = np.clip(np.rint(scaled / step), -zero, 255 - zero) * step
    outputs = np.clip(np.round(swish(inputs) / step_out), -zero_out, 255 - zero_out) * step_out
    exact = swish(rows)
    weights = 1 / REACHES**2
    return float(((outputs * gains - exact) ** 2).mean(axis=0) @ weights) / float(
        (exact**2).mean(axis=0) @ weights
    )


def test_gains_are_the_best_ones():
    values_ = np.random.default_rng(0).uniform(-20, 20, (256, 1)).astype(np.float32)
    exact, rows = swish(values_), np.full(256, 1 / 256)
    table, scale, zero = _rounded_swish(20.0, -20.0)
    power = rows @ exact**2
    for factor in FACTORS[::5]:
        (squared,), (gain,) = _fit(values_, exact, rows, power, factor, table, scale, zero)
        numbers = np.clip(np.rint(values_ / (factor * scale)) + zero, 0, 255).astype(int)
        tried = [rows @ (table[numbers] * part * gain - exact) ** 2 for part in (0.98, 1, 1.02)]
        assert squared == pytest.approx(float(tried[1][0]), rel=1e-3, abs=1e-6)
        assert tried[1] <= min(tried) or gain in (0.5 * factor, 1.5 * factor)
