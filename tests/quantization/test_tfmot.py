"""The bridge to tensorflow-model-optimization: twins, the scheme, training, files."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import batch_norms
import keras
import numpy as np
import pytest
from hand_made import predict, randomize, values
from tfmot_models import CLASSES, LAYERS, SIDE, blotches, small_model, varied_model

from keras_effnet import create_model, get_spec, load_weights
from keras_effnet.data import open_images, read_labels
from keras_effnet.export import TFLiteRunner, read_tflite, to_tflite
from keras_effnet.export.int8_tflite import convert_quantized
from keras_effnet.quantization import (
    QuantizationConfig,
    is_quantized,
    quantize_model,
    settle,
    splitting,
    tfmot,
)
from keras_effnet.quantization.lowering import integer_kernel, read_quantized
from keras_effnet.quantization.tfmot._packages import import_tfmot

pytest.importorskip("tf_keras")
tf_keras, mot = import_tfmot()

ROOT = Path(__file__).resolve().parents[2]
# Sums of float32 in two orders.
TOLERANCE = 1e-5
# A deep network of random weights amplifies them; one of trained weights does not.
RANDOM_TOLERANCE = 1e-3
# The bar of the engines: the same ranges and weights give the same predictions.
AGREEMENT = 0.995
# Of the integers of the outputs: no rounding is near a tie, so that other arithmetic changes none.
SAME = 0.999
# A scale that goes through its range and back may differ in the last bit of a float32.
SCALE_TOLERANCE = 1e-6
CONFIG = QuantizationConfig(method="min_max", corrections=(), per_channel_head=False)
UNSPLIT = tuple(name for name in QuantizationConfig().corrections if name != "swish_splitting")
FULL = QuantizationConfig(per_channel_head=False, equalize="all", corrections=UNSPLIT)


@pytest.fixture(scope="module")
def model():
    return varied_model()


@pytest.fixture(scope="module")
def small():
    return small_model()


@pytest.fixture(scope="module")
def images():
    return blotches(24, 0)


@pytest.fixture(scope="module")
def labels(model, images):
    """Not what the model says, so that there is something to learn."""
    return (predict(model, images).argmax(-1) + 1) % CLASSES


@pytest.fixture(scope="module")
def native(model, images):
    return quantize_model(model, images, FULL, verbose=False)


@pytest.fixture(scope="module")
def engine(native):
    """The tfmot model of the same ranges and weights; tests do not train it."""
    return tfmot.to_tf_keras(native)


@pytest.fixture(scope="module")
def file_of_engine(engine):
    return tfmot.convert(engine)


@pytest.fixture
def quick(model, images):
    """A tfmot model to train."""
    return quantize_model(model, images, CONFIG, verbose=False, engine="tfmot")


def run(twin, batch):
    return twin(batch, training=False).numpy()


def compiled(twin, rate=1e-2, loss="sparse_categorical_crossentropy"):
    tf_keras.utils.set_random_seed(0)  # Dropout and the order of the images.
    twin.compile(tf_keras.optimizers.SGD(rate), loss)
    return twin


def predictions(data, batch, path):
    path.write_bytes(data)
    return TFLiteRunner(path).predict(batch)


# --- Twins ------------------------------------------------------------------------------------


def test_a_twin_has_the_names_the_weights_and_the_outputs(model, images):
    twin = tfmot.to_tf_keras(model)
    assert isinstance(twin, tf_keras.Model)
    assert {layer.name for layer in twin.layers} == {layer.name for layer in model.layers}
    for layer in model.layers:
        its_weights = twin.get_layer(layer.name).get_weights()
        for ours, its in zip(layer.get_weights(), its_weights, strict=True):
            np.testing.assert_array_equal(ours, its)
    expected = predict(model, images)
    assert np.ptp(expected, axis=0).min() > 0.1, "constant outputs would prove nothing"
    assert abs(run(twin, images) - expected).max() <= TOLERANCE
    # The check can fail.
    kernel = twin.get_layer("stem_conv").kernel
    kernel.assign(np.flip(kernel.numpy(), axis=-1))
    assert abs(run(twin, images) - expected).max() > TOLERANCE


def test_a_twin_comes_back(model, images):
    twin = tfmot.to_tf_keras(model)
    head = twin.get_layer("predictions")
    head.bias.assign(head.bias + 1.0 * np.arange(CLASSES, dtype="float32"))
    back = tfmot.from_tf_keras(twin)
    assert isinstance(back, keras.Model) and not is_quantized(back)
    assert [layer.name for layer in back.layers] == [layer.name for layer in twin.layers]
    assert abs(predict(back, images) - run(twin, images)).max() <= TOLERANCE
    assert abs(predict(back, images) - predict(model, images)).max() > TOLERANCE


@pytest.mark.parametrize("kind", LAYERS)
def test_layers_go_there_and_back(kind):
    source = LAYERS[kind]
    layer = type(source).from_config(source.get_config())
    x = 3 * values(4, 8, channels=4)
    if kind == "adapted":
        layer.adapt(x + 2)
    inputs = keras.Input((8, 8, 4))
    model = randomize(keras.Model(inputs, layer(inputs)))
    expected = predict(model, x)
    twin = tfmot.to_tf_keras(model)
    assert abs(run(twin, x) - expected).max() <= TOLERANCE
    assert abs(predict(tfmot.from_tf_keras(twin), x) - expected).max() <= TOLERANCE


def test_nested_shared_and_frozen_layers():
    layers = keras.layers
    inner = keras.Sequential([keras.Input((8, 8, 4)), layers.Conv2D(4, 1, name="conv")])
    norm = layers.BatchNormalization(name="norm", trainable=False)
    shared = layers.Dense(4, name="shared")
    inputs = keras.Input((8, 8, 4))
    x = layers.Concatenate()([shared(norm(inner(inputs))), shared(inputs)])
    model = randomize(keras.Model(inputs, [x, layers.Add()([inputs, inputs])]))
    batch = values(4, 8, channels=4)
    twin = tfmot.to_tf_keras(model)
    back = tfmot.from_tf_keras(twin)
    for ours, its, again in zip(model(batch), twin(batch), back(batch), strict=True):
        assert abs(np.asarray(ours) - its.numpy()).max() <= TOLERANCE
        assert abs(np.asarray(ours) - np.asarray(again)).max() <= TOLERANCE
    assert not twin.get_layer("norm").trainable and not back.get_layer("norm").trainable
    assert len(twin.get_layer("shared").inbound_nodes) == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["EfficientNetB0", "EfficientNetV2B0"])
@pytest.mark.parametrize("ours", [True, False])
def test_twins_of_the_family(name, ours):
    keras.utils.set_random_seed(0)
    if ours:
        model = create_model(name, weights=None, input_shape=(64, 64, 3))
    else:
        model = getattr(keras.applications, name)(weights=None, input_shape=(64, 64, 3))
    batch = 255 * np.random.default_rng(0).uniform(size=(4, 64, 64, 3)).astype("float32")
    batch_norms.settle(model, batch)
    assert np.ptp(predict(model, batch)) > 5 * RANDOM_TOLERANCE
    twin = tfmot.to_tf_keras(model)
    assert abs(run(twin, batch) - predict(model, batch)).max() <= RANDOM_TOLERANCE
    back = tfmot.from_tf_keras(twin)
    assert abs(predict(back, batch) - predict(model, batch)).max() <= RANDOM_TOLERANCE


# --- Quantized twins --------------------------------------------------------------------------


def test_before_training_it_predicts_what_the_native_model_predicts(native, engine):
    batch = blotches(100, 1)
    expected = predict(native, batch)
    assert abs(run(engine, batch) - expected).max() <= TOLERANCE
    assert len(set(expected.argmax(-1))) >= 4, "one class would prove nothing"


def test_both_engines_give_files_that_agree(native, file_of_engine, tmp_path):
    batch = blotches(400, 2)
    path = tmp_path / "model.tflite"
    outputs = predictions(convert_quantized(native, "uint8"), batch, path)
    of_native = outputs.argmax(-1)
    assert len(set(of_native)) >= 4, "one class would prove nothing"
    found = predictions(file_of_engine, batch, path)
    assert np.mean(of_native == found.argmax(-1)) >= AGREEMENT
    assert np.mean(outputs == found) >= SAME
    # The bar sees a kernel out of place.
    broken = tfmot.to_tf_keras(native)
    kernel = broken.get_layer("quant_expand_conv").weights[0]
    kernel.assign(np.roll(kernel.numpy(), 1, axis=-1))
    of_broken = predictions(tfmot.convert(broken), batch, path).argmax(-1)
    assert np.mean(of_native == of_broken) < AGREEMENT


def test_the_file_holds_integers_and_the_operators_of_the_native_file(
    native, file_of_engine, tmp_path
):
    (tmp_path / "engine.tflite").write_bytes(file_of_engine)
    (tmp_path / "native.tflite").write_bytes(convert_quantized(native, "uint8"))
    found = read_tflite(tmp_path / "engine.tflite")
    expected = read_tflite(tmp_path / "native.tflite")
    assert found.ops == expected.ops
    assert found.ops["QUANTIZE"] == 2  # From uint8 and to uint8.
    assert found.inner_floats == ()
    for ours, its in zip(
        (*expected.inputs, *expected.outputs), (*found.inputs, *found.outputs), strict=True
    ):
        assert (its.dtype, its.shape, its.scale) == (ours.dtype, ours.shape, ours.scale)


def same_integers(one, other):
    """Whether two quantized models hold the same kernels and ranges."""
    one, other = read_quantized(one), read_quantized(other)
    assert list(one.nodes) == list(other.nodes)
    for node in one:
        its = other[node.name]
        if node.params is not None:
            close = its.params.scale == pytest.approx(node.params.scale, rel=SCALE_TOLERANCE)
            if not close or its.params.zero_point != node.params.zero_point:
                return False
        if "limits" in node.weights and not np.array_equal(
            integer_kernel(node)[0], integer_kernel(its)[0]
        ):
            return False
    return True


def test_a_quantized_twin_comes_back(native, engine):
    back = tfmot.from_tf_keras(engine)
    assert is_quantized(back) and same_integers(native, back)
    batch = blotches(50, 3)
    assert abs(predict(back, batch) - predict(native, batch)).max() <= TOLERANCE
    # The check can fail: other kernels, other ranges.
    broken = tfmot.to_tf_keras(native)
    wrapper = broken.get_layer("quant_stem_conv")
    wrapper.weights[0].assign(-wrapper.weights[0])
    assert not same_integers(native, tfmot.from_tf_keras(broken))
    moved = tfmot.to_tf_keras(native)
    # Keras numbers the names of layers that have none of their own.
    (total,) = (layer for layer in moved.layers if layer.name.startswith("quant_add"))
    (high,) = (weight for weight in total.weights if "output_max" in weight.name)
    high.assign(1.5 * high)
    assert not same_integers(native, tfmot.from_tf_keras(moved))


def test_the_weights_come_back_without_ranges(engine, native):
    back = tfmot.from_tf_keras(engine, quantized=False)
    assert not is_quantized(back)
    batch = blotches(50, 3)
    error = abs(predict(back, batch) - predict(native, batch))
    # The float model of the same folded weights: as near as 8 bits are.
    assert 0 < error.mean() < 0.05


def test_it_is_saved_and_loaded(engine, tmp_path):
    path = tmp_path / "model.keras"
    engine.save(path)
    with mot.quantization.keras.quantize_scope():
        loaded = tf_keras.models.load_model(path)
    batch = blotches(8, 3)
    np.testing.assert_array_equal(run(loaded, batch), run(engine, batch))
    assert same_integers(tfmot.from_tf_keras(engine), tfmot.from_tf_keras(loaded))


# --- Training ---------------------------------------------------------------------------------


def ranges_of(twin):
    return {
        weight.name: weight.numpy()
        for weight in twin.weights
        if weight.name.endswith(("output_min:0", "output_max:0", "range_min:0", "range_max:0"))
    }


def test_training_lowers_the_loss_and_keeps_the_file_integer(quick, images, labels, tmp_path):
    before = ranges_of(quick)
    # Squared errors: an 8-bit probability of 0 has a large logarithm, and how many there are is
    # chance. In 24 trials, orders of the images at three rates, the loss fell to 0.66 to 0.80.
    wanted = np.eye(CLASSES, dtype=np.float32)[labels]
    loss = compiled(quick, loss="mse").evaluate(images, wanted, verbose=0)
    quick.fit(images, wanted, batch_size=8, epochs=24, verbose=0)
    assert quick.evaluate(images, wanted, verbose=0) < 0.9 * loss
    after = ranges_of(quick)
    assert len(before) > 30 and all(before[name] == after[name] for name in before)
    batch = blotches(200, 4)
    expected = run(quick, batch)
    path = tmp_path / "model.tflite"
    outputs = predictions(tfmot.convert(quick), batch, path)
    assert read_tflite(path).inner_floats == ()
    assert np.mean(outputs.argmax(-1) == expected.argmax(-1)) >= 0.97  # Training brings ties.
    # Back in Keras 3 it predicts what was trained, not what it began with.
    back = tfmot.from_tf_keras(quick)
    assert abs(predict(back, batch) - expected).max() <= TOLERANCE
    settle(back)
    expected = predict(back, batch)
    to_tflite(back, path, quantization="int8", overwrite=True)
    assert np.mean(abs(TFLiteRunner(path).predict(batch) - expected) <= TOLERANCE) >= SAME


def test_limits_follow_the_kernels(small, images, labels):
    quick = tfmot.quantize_model(small, images, CONFIG, verbose=False)
    wrapper = quick.get_layer("quant_dwconv")
    wrapper.trainable = False
    kernel, _, variables = wrapper._weight_vars[0]
    # Larger than it was; the first channel is dead.
    kernel.assign(2 * kernel.numpy() * (np.arange(16) > 0)[:, None])
    compiled(quick).fit(images, labels, batch_size=8, verbose=0)
    expected = abs(kernel.numpy()).max(axis=(0, 1, 3))
    expected[0] = 1.0  # Any positive limit.
    np.testing.assert_array_equal(variables["max_var"].numpy(), expected)
    np.testing.assert_array_equal(variables["min_var"].numpy(), -expected)
    assert tfmot.convert(quick)
    assert np.all(np.isfinite(predict(tfmot.from_tf_keras(quick), images)))


def test_moving_ranges_follow_the_batches_but_for_the_fixed(small, images, labels):
    config = dataclasses.replace(CONFIG, training_ranges="moving_average")
    moving = tfmot.quantize_model(small, images, config, verbose=False)
    before = ranges_of(moving)
    compiled(moving, 0.0).fit(np.minimum(2 * images, 255), labels, batch_size=8, verbose=0)
    after = ranges_of(moving)
    moved = {name.split("/")[0] for name in before if before[name] != after[name]}
    assert {"quant_expand_conv", "quant_dwconv", "quant_predictions"} <= moved
    assert not [name for name in moved if "sigmoid" in name or "softmax" in name or "input" in name]
    back = tfmot.from_tf_keras(moving)
    assert back.get_layer("dwconv_range").ranges == "moving_average"


def test_joined_tensors_keep_one_range_when_the_others_move(images, tmp_path):
    inputs = keras.Input((SIDE, SIDE, 3))
    x = keras.layers.Conv2D(4, 3, name="a")(inputs)
    y = keras.layers.Conv2D(4, 3, name="b")(inputs)
    x = keras.layers.Conv2D(4, 3, name="c")(keras.layers.Concatenate()([x, y]))
    config = dataclasses.replace(CONFIG, training_ranges="moving_average")
    twin = tfmot.quantize_model(keras.Model(inputs, x), images, config, verbose=False)
    moves = {
        layer.layer.name: layer.quantize_config.output.moving
        for layer in twin.layers
        if layer.name.startswith("quant_")
    }
    assert moves == {"a": False, "b": False, "c": True}
    path = tmp_path / "model.tflite"
    path.write_bytes(tfmot.convert(twin))
    assert read_tflite(path).ops == {"CONV_2D": 3, "CONCATENATION": 1, "QUANTIZE": 2}


def test_dropout_drops_whole_images(quick, images):
    part = tf_keras.Model(quick.inputs, quick.get_layer("drop").output)
    dropped = part(images, training=True).numpy()
    empty = np.all(dropped == 0, axis=(1, 2, 3))
    assert 0 < empty.sum() < len(images)
    assert not np.any(np.all(run(part, images) == 0, axis=(1, 2, 3)))


# --- The scheme, pruning and clustering -------------------------------------------------------


def test_the_scheme_quantizes_a_twin_by_tfmot_alone(model, images, tmp_path):
    twin = tfmot.to_tf_keras(model)
    annotated = mot.quantization.keras.quantize_annotate_model(twin)
    applied = mot.quantization.keras.quantize_apply(annotated, tfmot.scheme())
    # Its weights are those of the twin, folded: equal to half a pixel step at the border.
    weights = tfmot.from_tf_keras(applied, quantized=False)
    assert abs(predict(weights, images) - predict(model, images)).max() < 0.05
    path = tmp_path / "model.tflite"
    path.write_bytes(tfmot.convert(applied))
    found = read_tflite(path)
    assert found.inner_floats == ()
    assert set(found.ops) == {
        "ADD",
        "CONV_2D",
        "DEPTHWISE_CONV_2D",
        "FULLY_CONNECTED",
        "LOGISTIC",
        "MEAN",
        "MUL",
        "QUANTIZE",
        "SOFTMAX",
    }
    assert is_quantized(tfmot.from_tf_keras(applied))


def test_the_scheme_quantizes_whole_models(model):
    twin = tfmot.to_tf_keras(model)
    quantization = mot.quantization.keras

    def annotate(layer):
        return quantization.quantize_annotate_layer(layer) if "conv" in layer.name else layer

    annotated = tf_keras.models.clone_model(twin, clone_function=annotate)
    with pytest.raises(ValueError, match="quantizes whole models .* without annotation .*'drop'"):
        quantization.quantize_apply(annotated, tfmot.scheme())


def blocks():
    text = (ROOT / "docs" / "tfmot.md").read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def execute(words, **names):
    """Runs the snippets of the guide that hold these words."""
    for word in words:
        (code,) = (block for block in blocks() if word in block)
        exec(compile(code, "docs/tfmot.md", "exec"), names)
    return names


def zero_weights(data):
    """The share of zeros among the integers of CONV_2D and FULLY_CONNECTED kernels."""
    from tensorflow.lite.python import schema_py_generated as schema

    file = schema.ModelT.InitFromPackedBuf(data, 0)
    (graph,) = file.subgraphs
    zeros = count = 0
    for operator in graph.operators:
        code = file.operatorCodes[operator.opcodeIndex].builtinCode
        if code in (schema.BuiltinOperator.CONV_2D, schema.BuiltinOperator.FULLY_CONNECTED):
            kernel = file.buffers[graph.tensors[operator.inputs[1]].buffer].data
            zeros, count = zeros + np.sum(np.asarray(kernel) == 0), count + len(kernel)
    return zeros / count


def test_pruning_and_training_that_keeps_the_zeros(small, images, labels, file_of_engine):
    """The guide's own code."""
    names = execute(["prune_low_magnitude"], model=small, photographs=images, labels=labels)
    sparse, trained = names["sparse"], names["trained"]
    for layer in sparse.layers:
        if isinstance(layer, (keras.layers.Conv2D, keras.layers.Dense)):
            assert np.mean(np.asarray(layer.kernel) == 0) == pytest.approx(0.5, abs=0.1)
    assert zero_weights(names["data"]) > 0.48
    assert zero_weights(file_of_engine) < 0.1, "the count sees kernels that nobody pruned"
    # Also after steps that would have filled them, and with weights that do.
    compiled(trained, 0.1).fit(images, labels, batch_size=8, verbose=0)
    trained.get_layer("quant_expand_conv").weights[0].assign_add(np.full((3, 3, 3, 16), 0.01))
    graph = read_quantized(tfmot.from_tf_keras(trained))
    kernel = integer_kernel(graph["expand_conv"])[0]
    pruned = np.asarray(sparse.get_layer("expand_conv").kernel) == 0
    assert np.all(kernel[pruned] == 0) and np.mean(kernel[~pruned] != 0) > 0.9


def test_clustering(small, images, labels):
    """The guide's own code."""
    names = {"mot": mot, "tfmot": tfmot, "tf_keras": tf_keras}
    names = execute(["cluster_weights"], model=small, photographs=images, labels=labels, **names)
    for name in ("expand_conv", "predictions"):
        kernel = np.asarray(names["few_values"].get_layer(name).kernel)
        assert len(np.unique(kernel)) <= 16 < kernel.size
        assert len(np.unique(np.asarray(small.get_layer(name).kernel))) > 16


@pytest.mark.slow
def test_the_other_snippets_of_the_guide(model, images, labels, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["data = tfmot.convert(trained)  #", "quantized = ", "quantize_apply", "load_model"]
    names = execute(words, model=model, photographs=images, labels=labels)
    assert is_quantized(names["quantized"])
    np.testing.assert_array_equal(run(names["loaded"], images), run(names["trained"], images))
    assert len(blocks()) == len(words) + 2, "a snippet without a test"


# --- Refusals ---------------------------------------------------------------------------------


def test_unsupported_layers_are_named():
    inputs = keras.Input((8, 8, 3))
    model = keras.Model(inputs, keras.layers.UpSampling2D(name="larger")(inputs))
    with pytest.raises(TypeError, match="Layer 'larger' of type UpSampling2D has no twin"):
        tfmot.to_tf_keras(model)
    inputs = tf_keras.Input((8, 8, 3))
    twin = tf_keras.Model(inputs, tf_keras.layers.UpSampling2D(name="larger")(inputs))
    with pytest.raises(TypeError, match="Layer 'larger' of type UpSampling2D has no twin"):
        tfmot.from_tf_keras(twin)


def unknown(x):
    return x + 1


@pytest.mark.parametrize("activation", ["gelu", unknown])
def test_unsupported_activations_are_named(activation):
    inputs = keras.Input((8, 8, 3))
    model = keras.Model(inputs, keras.layers.Activation(activation, name="act")(inputs))
    with pytest.raises(TypeError, match="Layer 'act' has the activation .* which has no twin"):
        tfmot.to_tf_keras(model)


def test_the_hard_sigmoid_of_tf_keras_is_another():
    inputs = tf_keras.Input((8, 8, 3))
    twin = tf_keras.Model(inputs, tf_keras.layers.Activation("hard_sigmoid")(inputs))
    with pytest.raises(TypeError, match="has no twin in Keras 3"):
        tfmot.from_tf_keras(twin)


def test_regularizers_are_refused():
    inputs = keras.Input((8, 8, 3))
    model = keras.Model(inputs, keras.layers.Dense(3, kernel_regularizer="l2", name="d")(inputs))
    with pytest.raises(ValueError, match="Layer 'd' has a kernel_regularizer"):
        tfmot.to_tf_keras(model)


def test_pruned_models_are_stripped_first(small):
    pruned = mot.sparsity.keras.prune_low_magnitude(tfmot.to_tf_keras(small))
    with pytest.raises(TypeError, match="PruneLowMagnitude has no twin.*strip_pruning"):
        tfmot.from_tf_keras(pruned)


def test_models_of_the_other_keras_are_refused(small, images):
    twin = tfmot.to_tf_keras(small)
    with pytest.raises(TypeError, match="A Keras 3 model is needed"):
        tfmot.to_tf_keras(twin)
    with pytest.raises(TypeError, match="A Keras 3 model is needed"):
        tfmot.quantize_model(twin, images, CONFIG, verbose=False)
    with pytest.raises(TypeError, match="A tf_keras model is needed"):
        tfmot.from_tf_keras(small)
    with pytest.raises(TypeError, match="A tf_keras model is needed"):
        tfmot.convert(small)


def test_subclassed_models_are_refused():
    class Hidden(tf_keras.Model):
        def call(self, inputs):
            return inputs

    with pytest.raises(TypeError, match="have a graph to read"):
        tfmot.from_tf_keras(Hidden())


def test_models_that_are_quantized_already(native, engine, images):
    with pytest.raises(ValueError, match="is quantized already"):
        tfmot.quantize_model(native, images, CONFIG, verbose=False)
    with pytest.raises(ValueError, match="is quantized already"):
        tfmot.scheme().get_layout_transformer().apply(
            engine, {layer.name: {} for layer in engine.layers}
        )


def test_float_models_are_not_converted(small):
    with pytest.raises(ValueError, match="is not quantized; call `quantize_model`"):
        tfmot.convert(tfmot.to_tf_keras(small))


def test_layers_added_after_quantization_are_named(images):
    inputs = keras.Input((SIDE, SIDE, 3))
    model = keras.Model(inputs, keras.layers.Conv2D(4, 3)(inputs))
    twin = tfmot.quantize_model(model, images, CONFIG, verbose=False)
    outputs = tf_keras.layers.Activation("swish", name="added")(twin.output)
    twin = tf_keras.Model(twin.input, outputs)
    with pytest.raises(ValueError, match="computes in float at .*have none"):
        tfmot.convert(twin)
    with pytest.raises(ValueError, match="The output of layer 'added' has no range"):
        tfmot.from_tf_keras(twin)


def test_what_the_engine_cannot_do(small, images):
    with pytest.raises(ValueError, match="per_channel_head=False.*Received: True"):
        tfmot.quantize_model(small, images, QuantizationConfig(), verbose=False)
    config = QuantizationConfig(per_channel_head=False, keep_float=("expand_conv",))
    with pytest.raises(ValueError, match="quantizes all layers.*'expand_conv'"):
        tfmot.quantize_model(small, images, config, verbose=False)
    learned = dataclasses.replace(CONFIG, training_ranges="learned")
    with pytest.raises(ValueError, match="does not learn ranges by gradient"):
        tfmot.quantize_model(small, images, learned, verbose=False)
    trained = dataclasses.replace(CONFIG, batch_norm="trained")
    with pytest.raises(ValueError, match="trains with folded batch norms"):
        tfmot.quantize_model(small, images, trained, verbose=False)
    for name in ("learned_rounding", "kernel_reconstruction"):
        config = dataclasses.replace(FULL, corrections=(name,))
        with pytest.raises(ValueError, match="make zeros of a kernel differ from zero"):
            tfmot.quantize_model(small, images, config, verbose=False, preserve_sparsity=True)


def test_native_models_that_the_engine_cannot_take(small, images):
    quick = {"method": "min_max", "corrections": ()}
    per_channel = quantize_model(small, images, QuantizationConfig(**quick), verbose=False)
    with pytest.raises(ValueError, match="'predictions' has one scale for each unit"):
        tfmot.to_tf_keras(per_channel)
    config = QuantizationConfig(**quick, per_channel_head=False, keep_float=("expand_conv",))
    with pytest.raises(ValueError, match="keeps layers in float"):
        tfmot.to_tf_keras(quantize_model(small, images, config, verbose=False))
    config = dataclasses.replace(CONFIG, training_ranges="learned")
    with pytest.raises(ValueError, match="are learned by gradient"):
        tfmot.to_tf_keras(quantize_model(small, images, config, verbose=False))


def test_swishes_that_are_split_are_refused_and_not_made(model, images, monkeypatch):
    monkeypatch.setattr(splitting, "REDUCTION", 1)
    monkeypatch.setattr(splitting, "lobes_are_shallow", lambda statistics: True)
    config = dataclasses.replace(CONFIG, corrections=("swish_splitting",))
    with pytest.raises(ValueError, match=r"splits swishes.*Received: \['"):
        tfmot.to_tf_keras(quantize_model(model, images, config, verbose=False))
    twin = tfmot.quantize_model(model, images, config, verbose=False)
    native = quantize_model(model, images, CONFIG, verbose=False)
    np.testing.assert_allclose(run(twin, images[:4]), predict(native, images[:4]), atol=TOLERANCE)


def test_models_of_another_scheme_are_refused():
    inputs = tf_keras.Input((8,))
    twin = tf_keras.Model(inputs, tf_keras.layers.Dense(3)(inputs))
    other = mot.quantization.keras.quantize_model(twin)
    with pytest.raises(ValueError, match="quantized by another scheme"):
        tfmot.from_tf_keras(other)


@pytest.mark.parametrize(
    ("module", "package"),
    [
        ("tf_keras", "tf_keras"),
        ("tensorflow_model_optimization", "tensorflow-model-optimization"),
        ("tensorflow", "tensorflow"),
    ],
)
def test_missing_packages_are_named(module, package, small, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    command = re.escape("pip install 'keras-effnet[tfmot]'")
    with pytest.raises(ImportError, match=f"`{package}` is needed .*{command}"):
        tfmot.to_tf_keras(small)


def test_importing_the_bridge_loads_nothing_and_using_it_leaves_tf_keras_alone():
    code = (
        "import os, sys\n"
        "from keras_effnet.quantization import tfmot\n"
        "assert not {'tf_keras', 'tensorflow_model_optimization'} & set(sys.modules)\n"
        "import keras\n"
        "twin = tfmot.to_tf_keras(keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)]))\n"
        "import tensorflow as tf, tf_keras\n"
        "assert isinstance(twin, tf_keras.Model)\n"
        "assert tf.keras.Model is keras.Model\n"
        "assert 'TF_USE_LEGACY_KERAS' not in os.environ\n"
    )
    environment = {**os.environ, "KERAS_BACKEND": "tensorflow"}
    environment.pop("TF_USE_LEGACY_KERAS", None)
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


# --- Real weights and photographs -------------------------------------------------------------

NETWORKS = {
    "v2": {
        "spec": "EfficientNetV2B0",
        "weights": "weights/efficientnetv2-b0.h5",
        "data": "data/imagenet-sample",
        "labels": "data/imagenet-sample/classes.csv",
        "classes": 1000,
    },
    "v1": {
        "spec": "EfficientNetB0",
        "weights": "weights/efficientnetb0-flowers5.h5",
        "data": "data/flowers",
        "labels": None,
        "classes": 5,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS)
def test_both_engines_agree_on_photographs(network, shared, tmp_path):
    """200 photographs, calibrated on 40, with all corrections that pay."""
    network = NETWORKS[network]
    spec = get_spec(network["spec"])
    model = create_model(spec, weights=None, classes=network["classes"])
    load_weights(model, shared(network["weights"]))
    labels = network["labels"] and read_labels(shared(network["labels"]))

    def photographs(part, count):
        found = open_images(
            shared(f"{network['data']}/{part}"),
            model.input_shape[1:3],
            preprocessing=spec.preprocessing,
            labels=labels,
            samples=count,
        )
        return np.concatenate([batch for batch, _ in found.batches(10)])

    batch = photographs("evaluation", 200)
    twin = tfmot.to_tf_keras(model)
    assert abs(run(twin, batch[:8]) - predict(model, batch[:8])).max() <= TOLERANCE
    config = dataclasses.replace(FULL, equalize="auto")
    native = quantize_model(model, photographs("calibration", 40), config, verbose=False)
    path = tmp_path / "model.tflite"
    of_native = predictions(convert_quantized(native, "uint8"), batch, path)
    ops = read_tflite(path).ops
    of_engine = predictions(tfmot.convert(tfmot.to_tf_keras(native)), batch, path)
    assert read_tflite(path).ops == ops
    assert len(set(of_native.argmax(-1))) >= 5
    assert np.mean(of_native.argmax(-1) == of_engine.argmax(-1)) >= AGREEMENT
    assert np.mean(of_native == of_engine) >= SAME
