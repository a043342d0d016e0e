"""From specs to graphs: shapes, names, counts, savings, policies, formats."""

import math

import keras
import numpy as np
import pytest
from eager import predict

from keras_effnet import build, create_model, resolve
from keras_effnet.builder import feature_layers
from keras_effnet.specs import SPECS

TINY = SPECS["EfficientNetTiny"]
# Saved and loaded weights are the same bits; only the order of sums may differ between graphs.
ROUND_TRIP_TOLERANCE = 1e-6
# bfloat16 keeps 8 bits of a number, through 17 layers with batch norm.
BFLOAT16_TOLERANCE = 0.05
# Full-size variants take seconds each to build, and L2 gigabytes.
SMALL = (
    "EfficientNetB0",
    "EfficientNetV2B0",
    "EfficientNetLite1",
    "EfficientNetEdgeTPUM",
    "EfficientNetTiny",
)
LARGE = tuple(name for name in SPECS if name not in SMALL)


def images(n=2, side=32, channels=3, seed=0):
    rng = np.random.default_rng(seed)
    return rng.uniform(0, 255, (n, side, side, channels)).astype("float32")


def tiny(**arguments):
    return create_model("EfficientNetTiny", weights=None, **{"classes": 4, **arguments})


def counted(model):
    """Multiply-adds of a built model, from its layers: kernel size times output positions."""
    total = 0
    for layer in model.layers:
        if isinstance(layer, keras.layers.Conv2D | keras.layers.DepthwiseConv2D):
            total += math.prod(layer.kernel.shape) * math.prod(layer.output.shape[1:3])
        elif isinstance(layer, keras.layers.Dense):
            total += math.prod(layer.kernel.shape)
    return total


def check_counts(name):
    spec = SPECS[name]
    side = spec.resolution
    model = build(spec, input_shape=(side, side, 3))
    plan = resolve(spec)
    assert model.count_params() == plan.parameters
    trainable = sum(math.prod(weight.shape) for weight in model.trainable_weights)
    assert trainable == plan.trainable_parameters
    assert counted(model) == plan.multiply_adds
    convolutions = [
        layer.name
        for layer in model.layers
        if isinstance(layer, keras.layers.Conv2D | keras.layers.DepthwiseConv2D)
    ]
    assert sorted([*convolutions, "predictions"]) == sorted(c.name for c in plan.convolutions)


@pytest.mark.parametrize("name", SMALL)
def test_plan_counts_what_is_built(name):
    check_counts(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_plan_counts_what_is_built_large(name):
    check_counts(name)
    keras.backend.clear_session()


def test_plan_without_preprocessing_or_top():
    model = build(TINY, include_top=False, include_preprocessing=False)
    plan = resolve(TINY, classes=None, include_preprocessing=False)
    assert model.count_params() == plan.parameters


@pytest.mark.parametrize(
    "arguments, shape",
    [
        ({}, (None, 4)),
        ({"include_top": False}, (None, None, None, 480)),
        ({"include_top": False, "input_shape": (48, 32, 3)}, (None, 3, 2, 480)),
        ({"include_top": False, "pooling": "avg"}, (None, 480)),
        ({"include_top": False, "pooling": "max"}, (None, 480)),
        ({"input_shape": (64, 64, 1)}, (None, 4)),
        ({"input_shape": (None, None, 3)}, (None, 4)),
    ],
)
def test_output_shapes(arguments, shape):
    assert tiny(**arguments).output_shape == shape


def test_logits_and_probabilities_are_the_same_network():
    probabilities = tiny()
    logits = tiny(classifier_activation=None)
    logits.set_weights(probabilities.get_weights())
    logits.get_layer("normalization").finalize_state()
    x = images()
    exponentials = np.exp(predict(logits, x))
    np.testing.assert_allclose(
        exponentials / exponentials.sum(-1, keepdims=True),
        predict(probabilities, x),
        atol=1e-5,  # float32 softmax in another order
    )


def test_input_tensor_with_layers_before_it():
    inputs = keras.Input((16, 16, 3))
    x = keras.layers.UpSampling2D(2)(inputs)
    model = tiny(input_tensor=x)
    assert model.input_shape == (None, 16, 16, 3)
    assert model.predict(images(side=16), verbose=0).shape == (2, 4)


def test_activation_and_squeeze_and_excite_choices():
    model = tiny(activation="relu6", se_activation="relu", se_gate="hard_sigmoid")
    assert model.get_layer("stem_activation").activation is keras.activations.relu6
    assert model.get_layer("block1a_se_reduce").activation is keras.activations.relu
    assert model.get_layer("block1a_se_expand").activation is keras.activations.hard_sigmoid
    without = tiny(se_ratio=0)
    assert not any("_se_" in layer.name for layer in without.layers)
    wide = tiny(se_ratio=1.0)
    assert wide.get_layer("block2a_se_reduce").filters == 8, "block 2a reads 8 channels"


def strided_layers(model):
    """What pads and strides, by name: padding of the layer before, and of the layer itself."""
    found = {}
    for layer in model.layers:
        if isinstance(layer, keras.layers.ZeroPadding2D):
            found[layer.name] = layer.padding
        elif getattr(layer, "strides", (1, 1)) == (2, 2):
            found[layer.name] = layer.padding
    return found


def test_torch_padding_changes_amounts_and_no_names():
    explicit = tiny(input_shape=(32, 32, 3))
    torch = tiny(input_shape=(32, 32, 3), padding="torch")
    assert [layer.name for layer in torch.layers[1:]] == [
        layer.name for layer in explicit.layers[1:]
    ]
    assert strided_layers(explicit)["block2a_dwconv_pad"] == ((0, 1), (0, 1))
    assert strided_layers(torch)["block2a_dwconv_pad"] == ((1, 1), (1, 1))
    assert strided_layers(torch)["block3a_dwconv_pad"] == ((2, 2), (2, 2))
    assert tiny(padding="same").get_layer("block2a_dwconv").padding == "same"
    with pytest.raises(ValueError, match="`padding` must be one of"):
        tiny(padding="valid")


def test_edgetpu_pads_as_its_strided_projections_sample():
    """A fused block of the authors: 3x3 at stride 1, then a 1x1 at stride 2."""
    spec = SPECS["EfficientNetEdgeTPUS"]
    model = build(spec, input_shape=(32, 32, 3), include_preprocessing=False)
    paddings = strided_layers(model)
    assert paddings["stem_conv_pad"] == ((0, 1), (0, 1))
    assert paddings["block2a_expand_conv_pad"] == ((1, 1), (1, 1))
    assert paddings["block4a_dwconv_pad"] == ((1, 2), (1, 2))
    assert "block1a_add" not in [layer.name for layer in model.layers]

    inputs = model.get_layer("block1a_project_bn").output
    ours = keras.Model(inputs, model.get_layer("block2a_project_bn").output)
    weights = {layer.name: layer.get_weights() for layer in ours.layers}
    x = keras.layers.Conv2D(192, 3, padding="same", use_bias=False, name="block2a_expand_conv")(
        theirs_in := keras.Input(inputs.shape[1:])
    )
    x = keras.layers.BatchNormalization(epsilon=1e-3, name="block2a_expand_bn")(x)
    x = keras.layers.Activation("relu")(x)
    x = keras.layers.Conv2D(32, 1, 2, padding="same", use_bias=False, name="block2a_project_conv")(
        x
    )
    x = keras.layers.BatchNormalization(epsilon=1e-3, name="block2a_project_bn")(x)
    theirs = keras.Model(theirs_in, x)
    for layer in theirs.layers:
        if layer.weights:
            layer.set_weights(weights[layer.name])
    features = np.random.default_rng(0).normal(size=(2, *inputs.shape[1:])).astype("float32")
    np.testing.assert_allclose(predict(ours, features), predict(theirs, features), atol=1e-5)


@pytest.mark.parametrize("base", ["EfficientNetTiny", "EfficientNetV2B0"])
def test_mobile_switch(base, tmp_path):
    """Without squeeze-and-excite and swish, with what fits of weights that had them."""
    arguments = {"input_shape": (32, 32, 3), "classes": 4}
    source = create_model(base, weights=None, **arguments)
    source.save_weights(tmp_path / "source.weights.h5")
    excites = [layer.name for layer in source.layers if layer.name.endswith("_se_reduce")]
    assert excites
    with pytest.warns(UserWarning, match=f"{2 * len(excites)} squeeze-and-excite layers"):
        mobile = create_model(
            base,
            weights=tmp_path / "source.weights.h5",
            activation="hard_swish",
            se_ratio=0,
            **arguments,
        )
    for layer in mobile.layers:
        for own, other in zip(
            layer.get_weights(),
            source.get_layer(layer.name).get_weights() if layer.weights else (),
            strict=True,
        ):
            np.testing.assert_array_equal(own, other)
    assert mobile.get_layer("stem_activation").activation is keras.activations.hard_silu
    relu6 = create_model(base, weights=None, activation="relu6", se_ratio=0, **arguments)
    assert relu6.get_layer("top_activation").activation is keras.activations.relu6
    assert not any("_se_" in layer.name for layer in relu6.layers)


def test_dropout_rates():
    model = tiny(dropout_rate=0.4, drop_path_rate=0.3)
    assert model.get_layer("top_dropout").rate == 0.4
    rates = [layer.rate for layer in model.layers if layer.name.endswith("_drop")]
    assert rates == sorted(rates) and 0 < rates[-1] < 0.3
    none = tiny(dropout_rate=0.0, drop_path_rate=0.0)
    assert not any(isinstance(layer, keras.layers.Dropout) for layer in none.layers)


def test_features_are_the_ends_of_the_levels():
    model = tiny(features_only=True, input_shape=(32, 32, 3))
    strides = [32 // output.shape[1] for output in model.outputs]
    assert strides == [2, 4, 8, 16]
    chosen = tiny(features_only=(3, 4), input_shape=(32, 32, 3))
    assert [output.shape[1] for output in chosen.outputs] == [4, 2]


def test_feature_layers_of_the_large_variants():
    assert feature_layers(SPECS["EfficientNetB0"]) == {
        1: "block1a_project_bn",
        2: "block2b_add",
        3: "block3b_add",
        4: "block5c_add",
        5: "block7a_project_bn",
    }
    assert feature_layers(SPECS["EfficientNetV2B0"])[1] == "block1a_project_activation"


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"classes": 0}, ValueError, "`classes` must be a positive integer"),
        ({"pooling": "avg"}, ValueError, "`pooling` applies to models without a top"),
        ({"include_top": False, "pooling": "sum"}, ValueError, "must be None, 'avg' or 'max'"),
        ({"input_shape": (8, 8, 3)}, ValueError, "reduces its input 16 times"),
        ({"input_shape": (32, 32)}, ValueError, r"must be \(height, width, channels\)"),
        ({"input_shape": (32, 32, None)}, ValueError, "known number of channels"),
        ({"input_tensor": np.zeros((1, 32, 32, 3))}, TypeError, "must be a Keras tensor"),
        ({"features_only": (9,)}, ValueError, "levels among"),
        ({"features_only": True, "pooling": "avg"}, ValueError, "drop `pooling`"),
        ({"dropout_rate": 1.0}, ValueError, r"`dropout_rate` must be in \[0, 1\)"),
        ({"activation": "swoosh"}, ValueError, "name of a Keras activation"),
        ({"se_ratio": -1}, ValueError, "`se_ratio` is a fraction"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        tiny(**arguments)


def test_input_shape_must_agree_with_input_tensor():
    with pytest.raises(ValueError, match="differ; give one of them"):
        tiny(input_tensor=keras.Input((32, 32, 3)), input_shape=(64, 64, 3))


# --- Saving, policies, formats ----------------------------------------------------------------


def randomized(model, seed=0):
    """Random statistics in every batch norm and in the normalization."""
    rng = np.random.default_rng(seed)
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.set_weights([rng.uniform(0.5, 1.5, w.shape) for w in layer.get_weights()])
    normalization = model.get_layer("normalization")
    normalization.set_weights([rng.uniform(0.3, 0.6, 3), rng.uniform(0.02, 0.08, 3), np.zeros(())])
    normalization.finalize_state()
    return model


@pytest.mark.parametrize("form", [".keras", ".weights.h5", "json"])
def test_saved_models_predict_the_same(form, tmp_path):
    model = randomized(tiny())
    x = images()
    expected = predict(model, x)
    if form == ".keras":
        model.save(tmp_path / "model.keras")
        loaded = keras.models.load_model(tmp_path / "model.keras")
    else:
        model.save_weights(tmp_path / "model.weights.h5")
        loaded = keras.models.model_from_json(model.to_json()) if form == "json" else tiny()
        loaded.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_allclose(predict(loaded, x), expected, atol=ROUND_TRIP_TOLERANCE)
    assert expected.std() > 0, "a constant output would prove nothing"


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_trains_with_a_float32_head(policy):
    reference = tiny(drop_path_rate=0.0, dropout_rate=0.0)
    before = keras.config.dtype_policy()
    try:
        keras.config.set_dtype_policy(policy)
        model = tiny(drop_path_rate=0.0, dropout_rate=0.0)
    finally:
        keras.config.set_dtype_policy(before)
    model.set_weights(reference.get_weights())
    model.get_layer("normalization").finalize_state()
    assert model.get_layer("stem_conv").compute_dtype == policy.removeprefix("mixed_")
    x = images()
    output = predict(model, x)
    assert output.dtype == np.float32
    np.testing.assert_allclose(output, predict(reference, x), atol=BFLOAT16_TOLERANCE)
    model.compile("sgd", "sparse_categorical_crossentropy", run_eagerly=True)
    assert np.isfinite(model.fit(x, np.array([0, 1]), verbose=0).history["loss"][0])


def test_channels_first_is_the_same_network():
    last = randomized(tiny())
    try:
        keras.config.set_image_data_format("channels_first")
        first = tiny()
    finally:
        keras.config.set_image_data_format("channels_last")
    assert first.input_shape == (None, 3, 32, 32)
    first.set_weights(last.get_weights())
    first.get_layer("normalization").finalize_state()
    x = images()
    # TensorFlow itself has such convolutions on some processors alone.
    first.compile(jit_compile=True)
    np.testing.assert_allclose(
        first.predict(x.transpose(0, 3, 1, 2), verbose=0),
        predict(last, x),
        atol=1e-5,  # float32 sums in another order
    )


def test_trains_in_an_ordinary_fit_loop():
    keras.utils.set_random_seed(0)
    x = np.concatenate([np.full((16, 32, 32, 3), 30.0), np.full((16, 32, 32, 3), 220.0)])
    x += np.random.default_rng(0).normal(0, 10, x.shape)
    y = np.repeat([0, 1], 16)
    model = tiny(classes=2)
    model.compile(
        keras.optimizers.Adam(3e-3),
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
        jit_compile=False,  # Compiling takes longer than these few steps.
    )
    history = model.fit(x, y, epochs=8, batch_size=16, verbose=0).history
    assert history["accuracy"][-1] == 1.0
