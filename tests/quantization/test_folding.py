"""Folding: every rewrite keeps what the graph computes."""

import keras
import numpy as np
import pytest
from hand_made import (
    compute,
    folded,
    functional,
    layers,
    ops,
    pixels,
    predict,
    randomize,
    values,
)

from keras_effnet.quantization.folding import same_padding
from keras_effnet.quantization.graph import read_model

# Folded weights are rounded to float32 once; a sum of some hundred products of about 1 then differs
# by a few units in the last place of float32.
FLOAT_TOLERANCE = 2e-5


def assert_same(model, graph, images):
    expected = predict(model, images)
    assert expected.std() > 1e-3, "a constant output would prove nothing"
    np.testing.assert_allclose(compute(graph, images), expected, atol=FLOAT_TOLERANCE, rtol=1e-5)
    # The check can fail: a bias that is off by a hundredth shows.
    for node in graph.kernel_nodes():
        node.weights["bias"] = node.weights["bias"] + np.float32(0.01)
    assert abs(compute(graph, images) - expected).max() > 10 * FLOAT_TOLERANCE


KERNELS = {
    "conv_same": lambda: layers.Conv2D(5, 3, padding="same"),
    "conv_valid": lambda: layers.Conv2D(5, 3, strides=2, use_bias=False),
    "depthwise_same": lambda: layers.DepthwiseConv2D(3, strides=2, padding="same"),
    "depthwise_valid": lambda: layers.DepthwiseConv2D(3, use_bias=False),
    "dense": lambda: layers.Dense(5),
}


@pytest.mark.parametrize("scale, center", [(True, True), (False, False)])
@pytest.mark.parametrize("kind", KERNELS)
def test_batch_norm_goes_into_the_kernel_before_it(kind, scale, center):
    norm = layers.BatchNormalization(scale=scale, center=center)
    model = functional(8, lambda x: norm(KERNELS[kind]()(x)))
    graph = folded(model)
    assert ops(graph) == ["input", kind.split("_")[0]]
    assert_same(model, graph, values(side=8))


def test_folding_reads_edges_and_not_names():
    # The names lie: the batch norm is called a convolution, the convolution a batch norm.
    def body(x):
        x = layers.Conv2D(4, 3, padding="same", name="block1a_bn")(x)
        x = layers.BatchNormalization(name="block1a_conv")(x)
        return layers.Activation("swish", name="predictions")(x)

    model = functional(8, body)
    graph = folded(model)
    assert ops(graph) == ["input", "conv", "sigmoid", "mul"]
    assert_same(model, graph, values(side=8))


def test_batch_norm_of_a_tensor_with_another_reader_stays_a_convolution():
    def body(x):
        x = layers.Conv2D(4, 3, padding="same")(x)
        return layers.Add()([x, layers.BatchNormalization()(x)])

    model = functional(8, body)
    graph = folded(model)
    assert ops(graph) == ["input", "conv", "depthwise", "add"]
    assert_same(model, graph, values(side=8))


def test_chains_of_scales_become_one():
    def body(x):
        x = layers.Rescaling(0.5, offset=0.25)(layers.BatchNormalization()(x))
        return layers.Conv2D(4, 3)(layers.BatchNormalization(center=False)(x))

    model = functional(8, body)
    graph = folded(model)
    assert ops(graph) == ["input", "conv"]
    assert_same(model, graph, values(side=8))


def test_normalization_of_a_vector_without_a_kernel_is_refused():
    model = functional(8, lambda x: layers.BatchNormalization()(layers.Flatten()(x)))
    with pytest.raises(ValueError, match="'batch_normalization.*cannot be folded"):
        folded(model)


# --- Padding ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size, kernel, stride, dilation, expected",
    [
        (8, 3, 1, 1, (1, 1)),
        (8, 3, 2, 1, (0, 1)),  # 4 places reach 2 * 3 + 3 = 9: one too far.
        (7, 3, 2, 1, (1, 1)),  # 4 places reach 9 of 7.
        (8, 5, 2, 1, (1, 2)),
        (8, 3, 1, 2, (2, 2)),
        (8, 1, 2, 1, (0, 0)),  # 4 places reach 7 of 8.
    ],
)
def test_same_padding_by_hand(size, kernel, stride, dilation, expected):
    assert same_padding(size, kernel, stride, dilation) == expected


@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize("side, padding", [(8, (0, 1)), (7, (1, 1))])
def test_zero_padding_that_equals_same_goes_into_the_convolution(side, padding, depthwise):
    kind = layers.DepthwiseConv2D if depthwise else lambda *a, **k: layers.Conv2D(4, *a, **k)

    def body(x):
        return kind(3, strides=2)(layers.ZeroPadding2D((padding, padding))(x))

    model = functional(side, body)
    graph = folded(model)
    assert ops(graph) == ["input", "depthwise" if depthwise else "conv"]
    assert graph[graph.outputs[0]].attrs["padding"] == "same"
    assert_same(model, graph, values(side=side))


@pytest.mark.parametrize("padding", [((1, 0), (1, 0)), ((2, 2), (2, 2))])
def test_other_zero_padding_stays(padding):
    def body(x):
        return layers.Conv2D(4, 3, strides=2)(layers.ZeroPadding2D(padding)(x))

    model = functional(8, body)
    graph = folded(model)
    assert ops(graph) == ["input", "pad", "conv"]
    assert_same(model, graph, values(side=8))


# --- The normalization of the image -----------------------------------------------------------


def normalized(mean, variance, padding="same", depthwise=False):
    def body(x):
        x = layers.Normalization(mean=mean, variance=variance)(x)
        if depthwise:
            return layers.DepthwiseConv2D(3, padding=padding)(x)
        return layers.Conv2D(4, 3, padding=padding)(x)

    return functional(8, body)


VARIANCE = [58.0**2, 57.0**2, 57.0**2]


@pytest.mark.parametrize("depthwise", [False, True])
def test_whole_means_are_folded_exactly_up_to_the_border(depthwise):
    model = normalized([127.0] * 3, VARIANCE, depthwise=depthwise)
    graph = folded(model)
    assert ops(graph) == ["input", "shift", "depthwise" if depthwise else "conv"]
    shift = next(node for node in graph if node.op == "shift")
    assert shift.weights["offset"].tolist() == [-127, -127, -127]
    assert_same(model, graph, pixels(side=8))


def test_other_means_are_folded_to_half_a_pixel_step_at_the_border():
    means = [123.6, 116.3, 103.8]
    model = normalized(means, VARIANCE)
    graph = folded(model)
    shift = next(node for node in graph if node.op == "shift")
    assert shift.weights["offset"].tolist() == [-124, -116, -104]
    images = pixels(side=8)
    error = abs(compute(graph, images) - predict(model, images))
    inner = error[:, 1:-1, 1:-1]
    np.testing.assert_allclose(inner, 0, atol=FLOAT_TOLERANCE)
    # Padding stands for 124, 116 and 104 instead of the means: 0.4, 0.3 and 0.2 steps off.
    kernel = abs(model.layers[-1].get_weights()[0]).sum(axis=(0, 1))
    bound = (np.array([0.4, 0.3, 0.2]) / np.sqrt(VARIANCE)) @ kernel
    assert np.all(error.max(axis=(0, 1, 2)) <= bound + FLOAT_TOLERANCE)
    assert error.max() > 10 * FLOAT_TOLERANCE, "or the border would not be looked at"


def test_without_padding_the_convolution_takes_it_all():
    model = normalized([123.6, 116.3, 103.8], VARIANCE, padding="valid")
    graph = folded(model)
    assert ops(graph) == ["input", "conv"]
    assert_same(model, graph, pixels(side=8))


def test_means_that_are_far_apart_stay_a_layer():
    model = normalized([0.0, 100.0, 200.0], VARIANCE)
    graph = folded(model)
    assert ops(graph) == ["input", "depthwise", "conv"]
    assert_same(model, graph, pixels(side=8))


# --- Squeeze-and-excite, swish, ReLU ----------------------------------------------------------


def squeeze_and_excite(x, channels, keepdims):
    gate = layers.GlobalAveragePooling2D(keepdims=keepdims)(x)
    if not keepdims:
        gate = layers.Reshape((1, 1, channels))(gate)
    gate = layers.Conv2D(2, 1, activation="swish")(gate)
    return layers.Multiply()([x, layers.Conv2D(channels, 1, activation="sigmoid")(gate)])


@pytest.mark.parametrize("keepdims", [False, True])
def test_squeeze_and_excite_pools_with_its_dimensions(keepdims):
    def body(x):
        return squeeze_and_excite(layers.Conv2D(4, 3, padding="same")(x), 4, keepdims)

    model = functional(8, body)
    graph = folded(model)
    assert ops(graph) == [
        *("input", "conv", "global_avg", "conv"),
        *("sigmoid", "mul", "conv", "sigmoid", "mul"),
    ]
    pool = next(node for node in graph if node.op == "global_avg")
    assert pool.attrs["keepdims"] and pool.shape == (1, 1, 4)
    assert_same(model, graph, values(side=8))


def test_pooling_that_is_an_output_keeps_its_shape():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 8, 3))
    pooled = layers.GlobalAveragePooling2D()(inputs)
    model = keras.Model(inputs, [pooled, layers.Reshape((1, 1, 3))(pooled)])
    assert ops(folded(model)) == ["input", "global_avg", "reshape"]


@pytest.mark.parametrize("kind", ["relu", "relu6"])
def test_relu_goes_into_the_kernel_before_it(kind):
    def body(x):
        x = layers.BatchNormalization()(layers.Conv2D(4, 3)(x))
        return layers.ReLU(6 if kind == "relu6" else None)(x)

    model = functional(8, body)
    graph = folded(model)
    assert ops(graph) == ["input", "conv"]
    assert graph[graph.outputs[0]].attrs["activation"] == kind
    assert_same(model, graph, values(side=8) * 10)


def test_relu_stays_where_its_input_has_another_reader():
    def body(x):
        x = layers.Conv2D(4, 3)(x)
        return layers.Add()([x, layers.ReLU()(x)])

    model = functional(8, body)
    graph = folded(model)
    assert ops(graph) == ["input", "conv", "relu", "add"]
    assert_same(model, graph, values(side=8))


def test_swish_becomes_a_product():
    model = functional(8, lambda x: layers.Conv2D(4, 3, activation="swish")(x))
    graph = folded(model)
    assert ops(graph) == ["input", "conv", "sigmoid", "mul"]
    assert graph[graph.outputs[0]].inputs == [name for name in graph.nodes][1:3]
    assert_same(model, graph, values(side=8))


def test_folding_does_not_change_the_model():
    model = randomize(normalized([127.0] * 3, VARIANCE))
    before = [weight.copy() for weight in model.get_weights()]
    folded(model)
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    assert ops(read_model(model)) == ["input", "affine", "conv"]
