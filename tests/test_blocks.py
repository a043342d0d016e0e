"""Building blocks, against NumPy and against what their papers say."""

import keras
import numpy as np
import pytest

from keras_effnet.blocks import (
    BlockStyle,
    drop_path,
    fused_mbconv,
    mbconv,
    pad_for_stride,
    squeeze_and_excite,
    swish,
)

# float32 sums of a few dozen products, in another order.
FLOAT32_TOLERANCE = 1e-5

RNG = np.random.default_rng(0)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def names(model):
    return [layer.name for layer in model.layers[1:]]


def test_swish_is_x_times_sigmoid():
    x = np.linspace(-6, 6, 101, dtype="float32")
    y = np.asarray(keras.ops.convert_to_numpy(swish(x)))
    np.testing.assert_allclose(y, x * sigmoid(x), atol=FLOAT32_TOLERANCE)
    assert y.min() == pytest.approx(-0.278, abs=1e-3)


@pytest.mark.parametrize("inner", ["relu", "swish"])
def test_squeeze_and_excite_is_the_formula_of_its_paper(inner):
    inputs = keras.Input((4, 5, 8))
    style = BlockStyle(se_activation=inner)
    model = keras.Model(inputs, squeeze_and_excite(inputs, 2, style=style, prefix="x_"))
    assert names(model) == ["x_se_squeeze", "x_se_reduce", "x_se_expand", "x_se_excite"]
    w1, w2 = RNG.normal(size=(8, 2)), RNG.normal(size=(2, 8))
    b1, b2 = RNG.normal(size=2), RNG.normal(size=8)
    model.get_layer("x_se_reduce").set_weights([w1[None, None], b1])
    model.get_layer("x_se_expand").set_weights([w2[None, None], b2])

    x = RNG.normal(size=(3, 4, 5, 8)).astype("float32")
    z = x.mean(axis=(1, 2))
    hidden = z @ w1 + b1
    hidden = np.maximum(hidden, 0) if inner == "relu" else hidden * sigmoid(hidden)
    gate = sigmoid(hidden @ w2 + b2)
    expected = x * gate[:, None, None, :]
    np.testing.assert_allclose(model.predict(x, verbose=0), expected, atol=FLOAT32_TOLERANCE)


def test_mbconv_expands_convolves_excites_projects_and_adds():
    inputs = keras.Input((8, 8, 16))
    model = keras.Model(inputs, mbconv(inputs, 16, name="b_", drop_path_rate=0.1))
    assert names(model) == [
        "b_expand_conv",
        "b_expand_bn",
        "b_expand_activation",
        "b_dwconv",
        "b_bn",
        "b_activation",
        "b_se_squeeze",
        "b_se_reduce",
        "b_se_expand",
        "b_se_excite",
        "b_project_conv",
        "b_project_bn",
        "b_drop",
        "b_add",
    ]
    assert model.get_layer("b_expand_conv").filters == 96
    assert model.get_layer("b_se_reduce").filters == 4, "a quarter of the input, not of 96"


@pytest.mark.parametrize("block", [mbconv, fused_mbconv])
@pytest.mark.parametrize("arguments", [{"strides": 2}, {"output_filters": 24}])
def test_no_skip_where_shapes_differ(block, arguments):
    inputs = keras.Input((8, 8, 16))
    arguments = {"output_filters": 16, "name": "b_", "drop_path_rate": 0.1, **arguments}
    model = keras.Model(inputs, block(inputs, **arguments))
    assert "b_add" not in names(model)
    assert "b_drop" not in names(model)


def test_fused_mbconv_without_expansion_is_one_convolution():
    inputs = keras.Input((8, 8, 16))
    model = keras.Model(inputs, fused_mbconv(inputs, 16, expand_ratio=1, name="b_"))
    assert names(model) == ["b_project_conv", "b_project_bn", "b_project_activation", "b_add"]
    assert model.get_layer("b_project_conv").kernel_size == (3, 3)


def test_fused_mbconv_expands_with_the_large_kernel():
    inputs = keras.Input((8, 8, 16))
    x = fused_mbconv(inputs, 24, expand_ratio=4, strides=2, se_ratio=0.25, name="b_")
    model = keras.Model(inputs, x)
    expand, project = model.get_layer("b_expand_conv"), model.get_layer("b_project_conv")
    assert (expand.kernel_size, expand.strides, expand.filters) == ((3, 3), (2, 2), 64)
    assert (project.kernel_size, project.strides) == ((1, 1), (1, 1))
    assert "b_project_activation" not in names(model)
    assert model.output_shape == (None, 4, 4, 24)


@pytest.mark.parametrize("side", [6, 7, 8, 9])
@pytest.mark.parametrize("kernel_size", [3, 5])
def test_explicit_padding_equals_same_padding(side, kernel_size):
    kernel = RNG.normal(size=(kernel_size, kernel_size, 2, 3)).astype("float32")
    x = RNG.normal(size=(1, side, side, 2)).astype("float32")
    inputs = keras.Input((side, side, 2))
    padded = pad_for_stride(inputs, kernel_size, "pad")
    convolution = {"filters": 3, "kernel_size": kernel_size, "strides": 2, "use_bias": False}
    explicit = keras.Model(inputs, keras.layers.Conv2D(padding="valid", **convolution)(padded))
    same = keras.Model(inputs, keras.layers.Conv2D(padding="same", **convolution)(inputs))
    explicit.set_weights([kernel])
    same.set_weights([kernel])
    np.testing.assert_allclose(
        explicit.predict(x, verbose=0), same.predict(x, verbose=0), atol=FLOAT32_TOLERANCE
    )


@pytest.mark.parametrize("side", [6, 7])
@pytest.mark.parametrize("kernel_size", [3, 5])
def test_torch_padding_is_the_same_on_all_sides(side, kernel_size):
    """Against the sum over a window, whose place in the image shows where padding went."""
    x = RNG.normal(size=(1, side, side, 2)).astype("float32")
    inputs = keras.Input((side, side, 2))
    style = BlockStyle(padding="torch", activation="linear")
    block = mbconv(inputs, 3, expand_ratio=1, kernel_size=kernel_size, strides=2, style=style)
    model = keras.Model(inputs, block)
    assert names(model)[:2] == ["dwconv_pad", "dwconv"]
    depthwise = keras.Model(inputs, model.get_layer("dwconv").output)
    depthwise.get_layer("dwconv").set_weights([np.ones((kernel_size, kernel_size, 2, 1))])
    half = kernel_size // 2
    padded = np.pad(x[0], ((half, half), (half, half), (0, 0)))
    positions = range(0, side + 2 * half - kernel_size + 1, 2)
    expected = [
        [padded[i : i + kernel_size, j : j + kernel_size].sum((0, 1)) for j in positions]
        for i in positions
    ]
    np.testing.assert_allclose(depthwise.predict(x, verbose=0)[0], expected, atol=FLOAT32_TOLERANCE)


def test_blocks_take_an_inner_width_and_leave_the_skip_out():
    inputs = keras.Input((8, 8, 16))
    for block in (mbconv, fused_mbconv):
        x = block(inputs, 16, expanded_filters=40, skip=False, se_ratio=0, name="b_")
        model = keras.Model(inputs, x)
        assert model.get_layer("b_expand_conv").filters == 40
        assert "b_add" not in names(model)


def test_drop_path_drops_whole_images_and_scales_the_rest():
    inputs = keras.Input((2, 2, 3))
    model = keras.Model(inputs, drop_path(inputs, 0.5, "drop"))
    x = np.ones((64, 2, 2, 3), "float32")
    y = keras.ops.convert_to_numpy(model(x, training=True))
    per_image = y.reshape(64, -1)
    assert set(np.unique(per_image)) == {0.0, 2.0}
    assert np.all(per_image == per_image[:, :1]), "an image is kept or dropped as a whole"
    np.testing.assert_array_equal(model.predict(x, verbose=0), x)
    assert drop_path(inputs, 0.0, "none") is inputs


def test_bad_arguments_are_named():
    x = keras.Input((8, 8, 16))
    with pytest.raises(ValueError, match=r"`drop_path_rate` must be in \[0, 1\)"):
        drop_path(x, 1.0, "drop")
    with pytest.raises(ValueError, match="`se_ratio` is a fraction"):
        mbconv(x, 16, se_ratio=4)
    with pytest.raises(ValueError, match="`activation` must be the name of a Keras activation"):
        BlockStyle(activation="swoosh")
    with pytest.raises(ValueError, match="`se_gate` must be the name"):
        BlockStyle(se_gate=None)
