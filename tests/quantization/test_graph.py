"""Reading Keras models: what is accepted, and what is refused by name."""

import keras
import numpy as np
import pytest
from hand_made import compute, folded, functional, layers, ops, predict, randomize, values

from keras_effnet.quantization import QuantizationConfig, is_quantized, quantize_model
from keras_effnet.quantization.graph import Graph, Node, read_model, supported_layers

# One rounding of folded weights to float32.
FLOAT_TOLERANCE = 2e-5


def two_layers(x):
    return layers.Dense(3)(layers.Flatten()(layers.Conv2D(4, 3, activation="relu")(x)))


def chain(*names):
    graph = Graph("chain")
    for name, source in zip(names, (None, *names), strict=False):
        graph.add(
            Node(name, "input" if source is None else "relu", [source] * bool(source), (4,), name)
        )
    graph.input, graph.outputs = names[0], [names[-1]]
    return graph


# --- The list of nodes ------------------------------------------------------------------------


def test_nodes_are_added_renamed_and_removed():
    graph = chain("a", "b", "c")
    graph.add(Node("d", "relu", ["a"], (4,), "d"), after="a")
    assert list(graph.nodes) == ["a", "d", "b", "c"]
    graph.redirect("a", "d", but=("d",))
    assert graph["b"].inputs == ["d"] and graph["d"].inputs == ["a"]
    graph.bypass("b")
    assert graph["c"].inputs == ["d"]
    graph.rename("c", "last")
    assert graph.outputs == ["last"] and list(graph.nodes) == ["a", "d", "last"]
    assert graph.unique("a") == "a_1" and graph.unique("b") == "b"
    with pytest.raises(ValueError, match="already has a node named 'd'"):
        graph.add(Node("d", "relu", ["a"], (4,), "d"))


def test_an_output_is_not_left_to_its_reader():
    graph = chain("a", "b", "c")
    assert graph.only_consumer("a") is graph["b"]
    graph.outputs.append("b")
    assert graph.only_consumer("b") is None


# --- Kinds of models --------------------------------------------------------------------------


def test_sequential_models_are_read():
    model = keras.Sequential(
        [keras.Input((8, 8, 3)), layers.Conv2D(4, 3), layers.BatchNormalization(), layers.ReLU()]
    )
    randomize(model)
    graph = folded(model)
    assert ops(graph) == ["input", "conv"]
    np.testing.assert_allclose(
        compute(graph, values(side=8)), predict(model, values(side=8)), atol=FLOAT_TOLERANCE
    )


def test_a_sequential_model_that_is_not_built_is_refused():
    with pytest.raises(ValueError, match="is not built: give it an `Input`"):
        read_model(keras.Sequential([layers.Conv2D(4, 3)]))


def test_nested_models_are_inlined():
    inner = functional(8, lambda x: layers.BatchNormalization()(layers.Conv2D(4, 3)(x)))
    # A model with a nested one, in a Sequential one.
    middle = functional(8, lambda x: layers.ReLU()(inner(x)))
    outer = keras.Sequential([keras.Input((8, 8, 3)), middle, layers.Flatten(), layers.Dense(3)])
    graph = folded(outer)
    assert ops(graph) == ["input", "conv", "reshape", "dense"]
    np.testing.assert_allclose(
        compute(graph, values(side=8)), predict(outer, values(side=8)), atol=FLOAT_TOLERANCE
    )


def test_a_model_cut_out_of_another_is_read():
    whole = functional(8, two_layers)
    part = keras.Model(whole.layers[1].output, whole.outputs)
    assert ops(read_model(part)) == ["input", "reshape", "dense"]


def test_subclassed_models_are_refused():
    class Subclassed(keras.Model):
        def call(self, inputs):
            return inputs

    with pytest.raises(TypeError, match="a subclassed model hides its graph.*Subclassed"):
        read_model(Subclassed())


def test_what_is_no_keras_model_is_refused():
    with pytest.raises(TypeError, match="A Keras 3 model is needed.*builtins.str"):
        read_model("model")


def test_several_inputs_are_refused():
    first, second = keras.Input((8, 8, 3)), keras.Input((8, 8, 3))
    model = keras.Model([first, second], layers.Add()([first, second]))
    with pytest.raises(ValueError, match="Only models with one input"):
        read_model(model)


def test_open_sizes_are_refused():
    inputs = keras.Input((None, None, 3))
    with pytest.raises(ValueError, match="build the model with a full `input_shape`"):
        read_model(keras.Model(inputs, layers.Conv2D(4, 3)(inputs)))


def test_shared_layers_are_refused():
    shared = layers.Conv2D(3, 3, padding="same", name="twice")
    with pytest.raises(ValueError, match="'twice' is shared.*clone the layer"):
        read_model(functional(8, lambda x: shared(shared(x))))


def test_shared_models_are_refused():
    inner = functional(8, lambda x: layers.Conv2D(3, 3, padding="same")(x))
    with pytest.raises(ValueError, match="is shared"):
        read_model(functional(8, lambda x: inner(inner(x))))


# --- Layers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layer, error, message",
    [
        (
            lambda: layers.LayerNormalization(name="odd"),
            TypeError,
            "'odd' of type LayerNorm.*Conv2D",
        ),
        (
            lambda: layers.Conv2D(4, 3, activation="selu", name="odd"),
            TypeError,
            "activation 'selu'",
        ),
        (lambda: layers.ReLU(4.0, name="odd"), ValueError, "ReLU 'odd' must be the plain.*=4"),
        (lambda: layers.Softmax(axis=1, name="odd"), ValueError, "'odd' must act on the last axis"),
        (lambda: layers.DepthwiseConv2D(3, depth_multiplier=2), ValueError, "depth_multiplier=1"),
        (lambda: layers.BatchNormalization(axis=1), ValueError, "must normalize the last axis"),
        (lambda: layers.Normalization(axis=1, mean=[0] * 8, variance=[1] * 8), ValueError, "last"),
    ],
)
def test_layers_outside_the_scheme_name_themselves(layer, error, message):
    model = functional(8, lambda x: layer()(x))
    with pytest.raises(error, match=message):
        read_model(model)


def test_channels_first_is_refused():
    inputs = keras.Input((3, 8, 8))
    outputs = layers.ZeroPadding2D(1, data_format="channels_first")(inputs)
    with pytest.raises(ValueError, match="channels_first"):
        read_model(keras.Model(inputs, outputs))


def test_concatenation_of_another_axis_is_refused():
    model = functional(8, lambda x: layers.Concatenate(axis=1)([x, layers.ReLU()(x)]))
    with pytest.raises(ValueError, match="must join the last axis"):
        read_model(model)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_infinite_weights_are_named(value):
    model = functional(8, lambda x: layers.Conv2D(4, 3, name="broken")(x))
    model.layers[-1].kernel.assign(np.full((3, 3, 3, 4), value))
    with pytest.raises(ValueError, match="kernel of layer 'broken' holds NaN or infinite"):
        quantize_model(model, values(side=8), verbose=False)


def test_keep_float_wants_known_names():
    model = functional(8, lambda x: layers.Conv2D(4, 3, name="stem_conv")(x))
    with pytest.raises(ValueError, match="close matches.*stem_conv"):
        read_model(model, keep_float=("stem_conf",))


def test_a_sum_of_three_is_two_sums():
    def body(x):
        return layers.Add()([x, layers.ReLU()(x), layers.Conv2D(3, 1)(x)])

    model = functional(8, body)
    graph = folded(model)
    assert ops(graph).count("add") == 2
    np.testing.assert_allclose(
        compute(graph, values(side=8)), predict(model, values(side=8)), atol=FLOAT_TOLERANCE
    )


def test_the_family_s_layers_are_in_the_scheme():
    assert {"Conv2D", "DepthwiseConv2D", "Rescaling", "Multiply", "Dense"} <= set(
        supported_layers()
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["EfficientNetB0", "EfficientNetV2B0"])
def test_keras_applications_go_through_unchanged(name):
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3)).astype("float32")
    model = getattr(keras.applications, name)(weights=None, input_shape=(32, 32, 3), classes=5)
    before = [weight.copy() for weight in model.get_weights()]
    config = QuantizationConfig(corrections=())
    quantized = quantize_model(model, images, config, verbose=False)
    assert is_quantized(quantized) and not is_quantized(model)
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    # Untrained probabilities are all about one fifth: within two steps of 1 / 256.
    np.testing.assert_allclose(predict(quantized, images), predict(model, images), atol=2 / 256)
