"""Public constructors, weights arguments, transfer learning; parity with keras.applications."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from batch_norms import settle
from eager import predict

import keras_effnet
from keras_effnet import create_model, freeze, freeze_batch_norms, list_models, replace_head
from keras_effnet.specs import SPECS

# The bar of parity with keras.applications: float32, the same layers in the same order.
PARITY_TOLERANCE = 1e-5
# Between backends: other convolution algorithms, other summation orders.
BACKEND_TOLERANCE = 1e-4

FULL_SIZE = ("EfficientNetB0", "EfficientNetB3", "EfficientNetV2B0", "EfficientNetV2S")
BACKEND_CHECK = Path(__file__).with_name("backend_check.py")


def tiny(**arguments):
    return create_model("EfficientNetTiny", weights=None, **{"classes": 4, **arguments})


def images(n=2, side=32, seed=0):
    rng = np.random.default_rng(seed)
    return rng.uniform(0, 255, (n, side, side, 3)).astype("float32")


def graph(model):
    """The graph of a model: every layer's configuration and what it reads."""
    config = json.loads(model.to_json())["config"]
    return [(layer["name"], layer["config"], layer["inbound_nodes"]) for layer in config["layers"]]


def randomize(model, seed=0):
    """Gives every batch norm random statistics: fresh ones hide exchanged or forgotten weights."""
    rng = np.random.default_rng(seed)
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.set_weights([rng.uniform(0.8, 1.2, w.shape) for w in layer.get_weights()])


def temper(model, x):
    """Scales the classifier so that its probabilities on `x` are neither equal nor 0 and 1."""
    pooled = keras.Model(model.input, model.get_layer("avg_pool").output)
    kernel, bias = model.get_layer("predictions").get_weights()
    logits = predict(pooled, x) @ kernel
    model.get_layer("predictions").set_weights([kernel / logits.std(), bias])


def test_every_variant_has_a_constructor():
    for name, spec in SPECS.items():
        constructor = getattr(keras_effnet, name)
        assert constructor.__name__ == name
        assert f"{spec.resolution} x {spec.resolution}" in constructor.__doc__


def test_signature_is_that_of_keras_applications_and_more():
    ours = list(inspect.signature(keras_effnet.EfficientNetB0).parameters)
    theirs = list(inspect.signature(keras.applications.EfficientNetB0).parameters)
    assert ours[: len(theirs)] == theirs
    v2 = inspect.signature(keras.applications.EfficientNetV2B0).parameters
    assert set(v2) <= set(ours)


def test_names_specs_and_phi_give_the_same_model():
    by_name = create_model("efficientnet-tiny", weights=None)
    by_spec = keras_effnet.EfficientNet(SPECS["EfficientNetTiny"], weights=None)
    by_constructor = keras_effnet.EfficientNetTiny(weights=None)
    assert (
        [layer.name for layer in by_name.layers[1:]]
        == [layer.name for layer in by_spec.layers[1:]]
        == [layer.name for layer in by_constructor.layers[1:]]
    )
    small = keras_effnet.EfficientNet(-6, weights=None, classes=3)
    assert small.name == "efficientnetb0-phi-6"
    assert small.count_params() < by_name.count_params() * 3


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"model": "EfficientNetB99"}, ValueError, "Unknown model 'EfficientNetB99'. Closest"),
        ({"weights": "imagenet"}, ValueError, "EfficientNetTiny"),
        ({"weights": "nowhere.h5"}, ValueError, "the path of an existing file"),
        ({"wieghts": None}, TypeError, "unexpected keyword argument 'wieghts'"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        create_model(**{"model": "EfficientNetTiny", **arguments})


def test_constructor_refuses_unknown_arguments():
    with pytest.raises(TypeError, match="unexpected keyword argument 'wieghts'"):
        keras_effnet.EfficientNetTiny(wieghts=None)


def test_weights_file_fills_the_same_graph(tmp_path):
    source = tiny()
    randomize(source)
    path = tmp_path / "tiny.weights.h5"
    source.save_weights(path)
    keras.backend.clear_session()
    empty = graph(tiny())
    keras.backend.clear_session()
    loaded = create_model("EfficientNetTiny", weights=path, classes=4)
    assert graph(loaded) == empty
    np.testing.assert_array_equal(predict(loaded, images()), predict(source, images()))


def test_another_number_of_classes_keeps_the_head_random(tmp_path):
    path = tmp_path / "tiny.weights.h5"
    source = tiny(classes=7)
    source.save_weights(path)
    with pytest.warns(UserWarning, match="classifier"):
        model = create_model("EfficientNetTiny", weights=path, classes=4)
    kernel = source.get_layer("top_conv").get_weights()[0]
    np.testing.assert_array_equal(model.get_layer("top_conv").get_weights()[0], kernel)


def test_weights_of_another_variant_are_refused(tmp_path):
    path = tmp_path / "other.weights.h5"
    keras_effnet.EfficientNet(-6, weights=None, classes=4).save_weights(path)
    with pytest.raises(ValueError, match="block1a_dwconv"):
        create_model("EfficientNetTiny", weights=path, classes=4)


def test_features_come_from_the_loaded_weights(tmp_path):
    source = tiny()
    randomize(source)
    path = tmp_path / "tiny.weights.h5"
    source.save_weights(path)
    features = create_model("EfficientNetTiny", weights=path, features_only=(4,))
    inner = keras.Model(source.inputs, source.get_layer("block7a_project_bn").output)
    np.testing.assert_array_equal(
        features.predict(images(), verbose=0), inner.predict(images(), verbose=0)
    )


# --- Transfer learning ------------------------------------------------------------------------


def test_replace_head_copies_the_network():
    source = tiny()
    randomize(source)
    before = [weight.copy() for weight in source.get_weights()]
    model = replace_head(source, 3, classifier_activation=None, dropout_rate=0.5)
    assert model.output_shape == (None, 3)
    assert model.get_layer("top_dropout").rate == 0.5
    inner = [keras.Model(m.inputs, m.get_layer("top_activation").output) for m in (source, model)]
    np.testing.assert_array_equal(
        inner[0].predict(images(), verbose=0), inner[1].predict(images(), verbose=0)
    )
    model.set_weights([np.zeros_like(weight) for weight in model.get_weights()])
    for old, new in zip(before, source.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    assert replace_head(tiny(include_top=False), 3).output_shape == (None, 3)


def test_replace_head_refuses():
    other = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    with pytest.raises(ValueError, match="has a layer 'top_activation'"):
        replace_head(other, 3)
    with pytest.raises(ValueError, match="`classes` must be a positive integer"):
        replace_head(tiny(), 0)


def test_freeze_stages():
    def trainable(model):
        layers = (layer for layer in model.layers if layer.trainable_weights)
        return {layer.name.split("_")[0] for layer in layers}

    model = tiny()
    assert trainable(freeze(model)) == {"predictions"}
    upper = {"block5a", "block5b", "block6a", "block6b", "block7a", "top", "predictions"}
    assert trainable(freeze(model, 4)) == upper
    assert trainable(freeze(model, 7)) == {"top", "predictions"}
    everything_but_stem = trainable(freeze(model, 0))
    assert "block1a" in everything_but_stem and "stem" not in everything_but_stem
    for wrong in (8, -1):
        with pytest.raises(ValueError, match="`through_stage` must be None or among 0"):
            freeze(model, wrong)


def test_freeze_batch_norms_reaches_nested_models():
    outer = keras.Sequential([keras.Input((32, 32, 3)), tiny()])
    freeze_batch_norms(outer)
    inner = outer.layers[0]
    for layer in inner.layers:
        assert layer.trainable == (not isinstance(layer, keras.layers.BatchNormalization))


# --- Parity, at full size ---------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("form", [".h5", ".weights.h5"])
@pytest.mark.parametrize("name", FULL_SIZE)
def test_outputs_equal_keras_applications(name, form, tmp_path):
    theirs = getattr(keras.applications, name)(weights=None, classes=10)
    randomize(theirs)
    x = images(2, SPECS[name].resolution)
    temper(theirs, x)
    path = tmp_path / f"theirs{form}"
    if form == ".h5":
        theirs.save(path)  # The legacy HDF5 layout: weights by layer name.
    else:
        theirs.save_weights(path)
    ours = create_model(name, weights=path, classes=10)
    expected = theirs.predict(x, verbose=0)
    assert expected.std() > 1e-3, "equal probabilities would prove nothing"
    np.testing.assert_allclose(ours.predict(x, verbose=0), expected, atol=PARITY_TOLERANCE)
    # The check can fail: one kernel out of place shows.
    layer = ours.get_layer("block3a_project_conv")
    layer.set_weights([np.roll(weight, 1, axis=-1) for weight in layer.get_weights()])
    assert abs(ours.predict(x, verbose=0) - expected).max() > PARITY_TOLERANCE
    keras.backend.clear_session()


# The larger variants repeat the same blocks.
@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name in list_models() if keras_effnet.resolve(name).parameters < 10e6]
)
def test_graph_does_not_depend_on_weights(name, tmp_path):
    path = tmp_path / "source.weights.h5"
    create_model(name, weights=None, classes=3).save_weights(path)
    keras.backend.clear_session()
    empty = graph(create_model(name, weights=None, classes=3))
    keras.backend.clear_session()
    loaded = graph(create_model(name, weights=path, classes=3))
    assert loaded == empty
    keras.backend.clear_session()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_other_backends_build_train_save_and_predict_the_same(backend, tmp_path):
    if not os.environ.get("CI"):
        pytest.importorskip(backend)
    expected = {}
    # One of each generation: the others repeat their blocks.
    for name in ("EfficientNetB0", "EfficientNetV2B0", "EfficientNetTiny"):
        # Not the full resolution: compiling takes the time, and the network is the same.
        side = 32 if name == "EfficientNetTiny" else 128
        model = create_model(name, weights=None, classes=10, input_shape=(side, side, 3))
        x = images(2, side)
        randomize(model)
        settle(model, x)
        temper(model, x)
        model.save_weights(tmp_path / f"{name}.weights.h5")
        np.save(tmp_path / f"{name}.npy", x)
        expected[name] = model.predict(x, verbose=0)
        keras.backend.clear_session()
    subprocess.run(
        [sys.executable, str(BACKEND_CHECK), str(tmp_path)],
        env={**os.environ, "KERAS_BACKEND": backend},
        check=True,
    )
    results = np.load(tmp_path / "results.npz")
    assert str(results["backend"]) == backend
    for name, values in expected.items():
        assert values.std() > 1e-3, "equal probabilities would prove nothing"
        np.testing.assert_allclose(results[name], values, atol=BACKEND_TOLERANCE, err_msg=name)
    assert np.isfinite(results["loss"])
    assert abs(results["trained"] - expected["EfficientNetTiny"]).max() > BACKEND_TOLERANCE
    for form in ("keras", "weights_h5", "json"):
        assert results[f"{form}_same_weights"], form
        # Not bit for bit: a model that was compiled to train runs another program.
        np.testing.assert_allclose(
            results[form], results["trained"], atol=BACKEND_TOLERANCE, err_msg=form
        )
    # And back: what the other backend trained and saved predicts the same here.
    back = keras.models.load_model(tmp_path / "trained.keras")
    np.testing.assert_allclose(
        back.predict(images(), verbose=0), results["trained"], atol=BACKEND_TOLERANCE
    )
