"""The scheme: which tensors have ranges, which share one, and which are fixed."""

import keras
import numpy as np
import pytest
from hand_made import (
    folded,
    functional,
    integers_of_file,
    integers_of_model,
    layers,
    predict,
    values,
)

from keras_effnet.quantization import QuantizationConfig, quantize_model
from keras_effnet.quantization.fake_quant import Dequantize, FakeQuant
from keras_effnet.quantization.graph import Node
from keras_effnet.quantization.lowering import read_quantized, tensor_params
from keras_effnet.quantization.params import SYMMETRIC_UNIT_INTERVAL, UNIT_INTERVAL, QuantParams
from keras_effnet.quantization.scheme import (
    expects_pixels,
    fixed_params,
    odd_above,
    owners,
    shared_ranges,
)

SIDE = 8
PLAIN = QuantizationConfig(method="min_max", corrections=())


def quantized(body, config=PLAIN):
    model = functional(SIDE, body)
    return model, quantize_model(model, values(side=SIDE), config, verbose=False)


def ranges(model):
    """The names of the tensors that pass through a FakeQuant layer."""
    return [
        layer.name.removesuffix("_range") for layer in model.layers if isinstance(layer, FakeQuant)
    ]


def assert_the_file_equals(model):
    images = values(side=SIDE, seed=1)
    expected = integers_of_model(model, images)
    assert expected.std() > 10, "a constant output would prove nothing"
    np.testing.assert_array_equal(integers_of_file(model, images), expected)
    # The check can fail: other images give other integers.
    assert np.any(integers_of_file(model, images[::-1]) != expected)


def test_convolution_and_relu6_have_one_range():
    def body(x):
        x = layers.BatchNormalization()(layers.Conv2D(4, 3, name="conv")(x))
        return layers.ReLU(6, name="relu")(x)

    model = quantized(body)[1]
    assert len(ranges(model)) == 2 and ranges(model)[1] == "conv"
    # Nothing is below 0, so 0 is the lowest integer.
    graph = read_quantized(model)
    assert graph["conv"].params.zero_point == -128
    assert_the_file_equals(model)


def test_concatenated_tensors_share_one_range():
    def body(x):
        small = layers.Conv2D(2, 3, name="small")(x)
        large = layers.Conv2D(2, 3, name="large")(layers.Rescaling(4.0)(x))
        return layers.Concatenate(name="joined")([small, large])

    model = quantized(body)[1]
    graph = read_quantized(model)
    assert graph["small"].params == graph["large"].params == tensor_params(graph, "joined")
    assert owners(graph, "joined") == ["small", "large"]
    assert ranges(model)[1:] == ["small", "large"]
    assert_the_file_equals(model)
    # The ranges of the two differ where nothing joins them.
    alone = read_quantized(
        quantized(lambda x: layers.Add()([body(x), layers.Conv2D(4, 3, name="other")(x)]))[1]
    )
    assert alone["other"].params != alone["small"].params


def test_concatenations_that_have_a_member_in_common_share_all():
    def body(x):
        first, second, third = (layers.Conv2D(2, 3, name=name)(x) for name in "abc")
        left = layers.Concatenate()([first, second])
        right = layers.Concatenate()([second, layers.MaxPooling2D(1)(third)])
        return layers.Add()([left, right])

    groups = [set(group) for group in shared_ranges(folded(functional(SIDE, body)))]
    assert {"a", "b", "c"} in groups


def test_concatenation_with_a_fixed_range_is_refused():
    def body(x):
        gate = layers.Activation("sigmoid")(x)
        return layers.Concatenate(name="joined")([layers.Conv2D(3, 1)(x), gate])

    with pytest.raises(ValueError, match="'joined' joins a tensor with a fixed range"):
        quantized(body)


@pytest.mark.parametrize("kind", ["add", "pool", "mean", "max", "sum_of_three"])
def test_the_file_computes_the_operation_as_the_model_does(kind):
    def body(x):
        x = layers.Conv2D(4, 3, padding="same", name="conv")(x)
        other = layers.Conv2D(4, 3, padding="same", name="other")(layers.ReLU()(x))
        return {
            "add": lambda: layers.Add()([x, other]),
            "sum_of_three": lambda: layers.Add()([x, layers.Conv2D(4, 1)(x), other]),
            "pool": lambda: layers.MaxPooling2D(2)(other),
            "mean": lambda: layers.Conv2D(8, 1)(layers.GlobalAveragePooling2D(keepdims=True)(x)),
            "max": lambda: layers.GlobalMaxPooling2D()(other),
        }[kind]()

    assert_the_file_equals(quantized(body)[1])


def test_hard_swish_is_computed_within_one_step():
    # LiteRT computes it in fixed point of 16 bits, not from real numbers: near a rounding boundary
    # it goes the other way.
    def body(x):
        return layers.Activation("hard_swish")(layers.Conv2D(4, 3, padding="same")(x))

    model, images = quantized(body)[1], values(side=SIDE, seed=1)
    expected = integers_of_model(model, images).astype(int)
    difference = integers_of_file(model, images) - expected
    assert abs(difference).max() <= 1 and np.mean(difference != 0) < 0.01
    assert abs(integers_of_file(model, images[::-1]) - expected).max() > 1


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_logistic_and_softmax_have_a_fixed_range(activation):
    model = quantized(lambda x: layers.Dense(3, activation=activation)(layers.Flatten()(x)))[1]
    graph = read_quantized(model)
    # [0, 255 / 256] in steps of 1 / 256, as the specification says.
    assert graph[graph.outputs[0]].params == UNIT_INTERVAL == QuantParams(1 / 256, -128)
    last = [layer for layer in model.layers if isinstance(layer, FakeQuant)][-1]
    assert last.fixed and not last.trainable_weights
    # A range that was moved is noticed.
    last.maximum.assign(2.0)
    with pytest.raises(ValueError, match="is fixed by the TFLite specification"):
        read_quantized(model)


def test_an_unsupported_layer_names_itself_or_stays_in_float():
    def body(x):
        x = layers.Conv2D(4, 3, padding="same")(x)
        x = layers.LayerNormalization(name="odd")(x)
        return layers.Conv2D(4, 3, name="last")(x)

    model = functional(SIDE, body)
    images = values(side=SIDE)
    with pytest.raises(TypeError, match="'odd' of type LayerNormalization.*`keep_float`"):
        quantize_model(model, images, PLAIN, verbose=False)
    config = QuantizationConfig(method="min_max", corrections=(), keep_float=("odd",))
    result = quantize_model(model, images, config, verbose=False)
    assert sum(isinstance(layer, Dequantize) for layer in result.layers) == 1
    graph_floats = [node.name for node in read_quantized_floats(result)]
    assert graph_floats == ["odd"]
    expected = predict(model, images)
    # 8 bits of three tensors: noise of about a hundredth of the signal.
    error = np.sqrt(np.mean((predict(result, images) - expected) ** 2))
    assert 0 < error < 0.05 * expected.std()


def read_quantized_floats(model):
    """The layers that read what a Dequantize layer passes on."""
    return [
        node.operation
        for layer in model.layers
        if isinstance(layer, Dequantize)
        for node in layer._outbound_nodes
    ]


def test_a_known_layer_is_kept_in_float():
    def body(x):
        return layers.Dense(5, name="head")(layers.Flatten()(layers.Conv2D(4, 3, name="conv")(x)))

    config = QuantizationConfig(method="min_max", corrections=(), keep_float=("head",))
    model, result = quantized(body, config)
    assert isinstance(result.get_layer("head"), keras.layers.Dense)
    np.testing.assert_array_equal(
        result.get_layer("head").get_weights()[0], model.get_layer("head").get_weights()[0]
    )
    graph = read_quantized(result)
    assert graph["head"].is_float and not graph["conv"].is_float
    images = values(side=SIDE, seed=1)
    # The float sums of the two runtimes may fall on either side of a rounding.
    difference = integers_of_file(result, images).astype(int) - integers_of_model(result, images)
    assert abs(difference).max() <= 1


def test_a_layer_added_to_a_quantized_model_is_named():
    result = quantized(lambda x: layers.Conv2D(4, 3)(x))[1]
    longer = keras.Model(result.inputs, layers.Activation("relu", name="new")(result.outputs[0]))
    with pytest.raises(ValueError, match="'new' has no range: it was added"):
        read_quantized(longer)
    with pytest.raises(ValueError, match="is not quantized; call `quantize_model` first"):
        read_quantized(functional(SIDE, lambda x: layers.Conv2D(4, 3)(x)))


# --- Numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("value, expected", [(1.0, 1), (1.1, 3), (3.0, 3), (276.08, 277)])
def test_odd_above(value, expected):
    assert odd_above(value) == expected


def test_the_range_of_shifted_pixels_by_hand():
    graph = folded(functional(SIDE, lambda x: layers.Conv2D(4, 3)(x)))
    source = graph.input

    def shifted(*offset):
        weights = {"offset": np.array(offset, np.float32)}
        return fixed_params(graph, Node("shift", "shift", [source], (), "", weights=weights))

    # Equal offsets: the integers stay, pixel 127 (integer -1) becomes zero.
    assert shifted(-127, -127, -127) == QuantParams(1.0, -1)
    # Room for 255 + 20 values: 256 * 275 / 255 = 276.08, so a step is 277 / 256 = 1.082. The
    # lowest value is -124, which is -114.6 steps and becomes -115: zero is -128 + 115.
    assert shifted(-124, -116, -104) == QuantParams(277 / 256, -13)
    assert SYMMETRIC_UNIT_INTERVAL == QuantParams(1 / 128, 0)


def test_models_that_scale_pixels_want_pixels():
    from keras_effnet.quantization.graph import read_model

    scaled = functional(SIDE, lambda x: layers.Conv2D(4, 3)(layers.Rescaling(1 / 255)(x)))
    assert expects_pixels(read_model(scaled))
    plain = functional(SIDE, lambda x: layers.Conv2D(4, 3)(x))
    assert not expects_pixels(read_model(plain))
