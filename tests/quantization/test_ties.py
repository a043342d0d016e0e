"""Scales without ties: odd ratios, and the same integers in the Keras model and in LiteRT."""

import keras
import numpy as np
import pytest
from hand_made import (
    functional,
    integers_of_file,
    integers_of_model,
    layers,
    pixels,
    predict,
    randomize,
    values,
)

from keras_effnet import create_model
from keras_effnet.quantization import QuantizationConfig, quantize, quantize_model
from keras_effnet.quantization.lowering import integer_factors, read_quantized, tensor_params
from keras_effnet.quantization.params import INT8_MIN, UNIT_INTERVAL, QuantParams, kernel_scales
from keras_effnet.quantization.scheme import SUM_STEPS
from keras_effnet.quantization.ties import MAX_RATIO, TABLE_MARGIN, _align_kernel, odd, odd_below

# Scales are float32 and a ratio has three or four of them: 4 * 2**-24 = 2.4e-7 each way, times
# the accumulators of a few thousand that a tie could come from.
RATIO_TOLERANCE = 1e-4
PLAIN = QuantizationConfig(method="min_max", corrections=())


@pytest.fixture(scope="module")
def quantized(tiny_quantized):
    """The quantized network up to its last feature map: thousands of integers."""
    features = tiny_quantized.get_layer("top_activation_range").output
    return keras.Model(tiny_quantized.input, features)


@pytest.fixture(scope="module")
def graph(tiny_quantized):
    return read_quantized(tiny_quantized)


def assert_odd(ratio, name=""):
    nearest = np.round(ratio)
    np.testing.assert_allclose(ratio, nearest, rtol=RATIO_TOLERANCE, err_msg=name)
    assert np.all(nearest % 2 == 1), (name, ratio)


def scale(graph, name):
    return np.float64(tensor_params(graph, name).scale)


# --- Numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value, nearest", [(0.2, 1), (1.9, 1), (2.1, 3), (4.0, 5), (3.9, 3), (7, 7)]
)
def test_odd(value, nearest):
    # 4.0 lies between 3 and 5: (4 - 1) / 2 = 1.5 rounds to even, 2.
    assert odd(value) == nearest


def test_odd_below():
    assert odd_below([0.5, 1.0, 2.9, 3.0, 4.99, 5.0]).tolist() == [1, 1, 1, 3, 3, 5]


def test_an_odd_ratio_has_no_ties_and_an_even_one_has():
    accumulators = np.arange(-1000, 1000)
    for ratio, ties in ((7, False), (8, True)):
        fraction = accumulators / ratio % 1
        assert np.any(fraction == 0.5) == ties
        nearest = abs(fraction - 0.5).min()
        assert nearest == pytest.approx(0 if ties else 1 / (2 * ratio))


# --- The graph --------------------------------------------------------------------------------


def test_kernels_have_odd_ratios(graph):
    seen = 0
    for node in graph.kernel_nodes():
        steps = scale(graph, node.inputs[0]) * kernel_scales(node.weights["limits"])
        ratios = scale(graph, node.name) / steps
        # Where the output's step is less than the accumulator's there is nothing to round.
        assert_odd(ratios[ratios > 1 - RATIO_TOLERANCE], node.name)
        assert np.all(ratios < MAX_RATIO + 1)
        seen += np.sum(ratios > 2)
    assert seen > 30


def test_odd_ratios_that_were_chosen_are_chosen_again(tiny_quantized):
    """Also where a ratio lies at the edge of what counts as odd, and float32 moves the output's."""
    graph = read_quantized(tiny_quantized)
    node = next(node for node in graph.kernel_nodes() if not node.is_float)
    given, params = node.weights["limits"], node.params
    changed = 0
    for change in np.linspace(-3e-6, 3e-6, 61):
        node.params = params
        node.weights["limits"] = (given * (1 + change)).astype(np.float32)
        _align_kernel(graph, node)
        chosen = node.weights["limits"]
        changed += np.count_nonzero(chosen != given)
        for error in (-2e-7, 2e-7):
            node.params = QuantParams(params.scale * (1 + error), params.zero_point)
            _align_kernel(graph, node)
            np.testing.assert_allclose(node.weights["limits"], chosen, rtol=1e-6)
    assert changed > 20


def test_products_and_means_have_odd_ratios(graph):
    seen = set()
    for node in graph:
        if node.op == "mul":
            step = scale(graph, node.inputs[0]) * scale(graph, node.inputs[1])
        elif node.op == "scale":
            step = scale(graph, node.inputs[0]) * integer_factors(node)[1].scale
        elif node.op == "global_avg":
            step = scale(graph, node.inputs[0]) / np.prod(graph[node.inputs[0]].shape[:2])
        else:
            continue
        seen.add(node.op)
        assert_odd(scale(graph, node.name) / step, node.name)
    assert seen == {"mul", "scale", "global_avg"}


def test_sums_have_a_common_step(graph):
    sums = [node for node in graph if node.op == "add"]
    assert sums
    for node in sums:
        first, second = (scale(graph, name) for name in node.inputs)
        # One of the two has SUM_STEPS steps, the other a whole number, the output an odd one.
        fits = []
        for step, other in ((first / SUM_STEPS, second), (second / SUM_STEPS, first)):
            ratios = np.array([other, scale(graph, node.name)]) / step
            whole = np.allclose(ratios, np.round(ratios), rtol=RATIO_TOLERANCE)
            fits.append(whole and round(ratios[1]) % 2 == 1)
        assert any(fits), node.name


def test_tables_are_clear_of_halves(graph):
    tables = [node for node in graph if node.op == "sigmoid"]
    assert tables
    for node in tables:
        params = tensor_params(graph, node.inputs[0])
        reals = (np.arange(256) + INT8_MIN - params.zero_point) * np.float64(params.scale)
        steps = 1 / (1 + np.exp(-reals)) / UNIT_INTERVAL.scale
        assert abs(steps % 1 - 0.5).min() > TABLE_MARGIN, node.name


def test_removing_ties_moves_ranges_little():
    def body(x):
        return layers.Conv2D(4, 3)(layers.Conv2D(8, 3, padding="same", name="first")(x))

    model, data = functional(16, body), values()
    moved = read_quantized(quantize_model(model, data, PLAIN, verbose=False))["first"]
    natural = abs(moved.weights["kernel"]).max(axis=(0, 1, 2))
    growth = moved.weights["limits"] / natural
    # An odd ratio that is at most 2 below one in the tens or hundreds.
    assert np.all(growth > 1 - 1e-6) and growth.max() < 1.1


# --- Bit for bit ------------------------------------------------------------------------------


def test_the_model_and_litert_agree_bit_for_bit(quantized, tiny_images):
    images = tiny_images[:12]
    expected = integers_of_model(quantized, images)
    assert expected.std() > 5, "a constant output would prove nothing"
    np.testing.assert_array_equal(integers_of_file(quantized, images), expected)


def test_with_ties_they_differ(monkeypatch):
    # Pixels of scale 1, a kernel of ones with limit 127 (scale 1) and an output of scale 2: every
    # odd sum is a tie, which fake-quant rounds up, and LiteRT to even.
    def body(x):
        return layers.DepthwiseConv2D(1, name="conv")(x)

    model = functional(16, body)
    model.get_layer("conv").set_weights([np.full((1, 1, 3, 1), 1.0), np.zeros(3)])
    data = pixels(4)

    def tied(graph, groups):
        graph["conv"].params = quantize.QuantParams(2.0, -128)
        graph["conv"].weights["limits"] = np.full(3, 127, np.float32)

    monkeypatch.setattr(quantize, "remove_ties", tied)
    result = quantize_model(model, data, PLAIN, verbose=False)
    np.testing.assert_array_equal(predict(result, data) % 2, 0)
    different = integers_of_file(result, data) != integers_of_model(result, data)
    assert 0.1 < different.mean() < 0.4, "half of the odd sums, which are half of all"
    monkeypatch.undo()
    result = quantize_model(model, data, PLAIN, verbose=False)
    np.testing.assert_array_equal(integers_of_file(result, data), integers_of_model(result, data))


@pytest.mark.slow
def test_the_tiny_variant_and_litert_agree_bit_for_bit():
    keras.utils.set_random_seed(0)
    model = create_model(
        "EfficientNetTiny", weights=None, include_top=False, input_shape=(32, 32, 3)
    )
    images = pixels(24, side=32)
    quantized = quantize_model(randomize(model), images, verbose=False)
    expected = integers_of_model(quantized, images)
    assert expected.std() > 5, "a constant output would prove nothing"
    np.testing.assert_array_equal(integers_of_file(quantized, images), expected)
