"""Quantized models train in ordinary fit loops, and end as what the file computes."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hand_made import copy_of, functional, integers_of_file, integers_of_model, layers, pixels

from keras_effnet.quantization import (
    FreezeBatchNorms,
    FreezeRanges,
    QuantizationConfig,
    quantize_model,
    settle,
)
from keras_effnet.quantization.fake_quant import (
    QUANTIZED_KERNELS,
    FakeQuant,
    QuantizedDense,
    fake_quant,
    power_of_two,
)
from keras_effnet.quantization.lowering import integer_bias, read_quantized
from keras_effnet.quantization.training import layers_of, unrounded_outputs, without_dropout

SIDE = 16
IMAGES = pixels(16, side=SIDE, seed=3)
# Bright and dark images, which a small network learns to tell apart.
LABELS = (IMAGES.mean(axis=(1, 2, 3)) > np.median(IMAGES)).astype("int64")


def small(x):
    """Few layers, since every training traces them anew."""
    x = layers.Rescaling(1 / 255)(x)
    x = layers.Conv2D(8, 3, strides=2, padding="same", activation="swish")(x)
    x = layers.DepthwiseConv2D(3, padding="same")(x)
    x = layers.BatchNormalization()(x)
    x = layers.Dropout(0.2)(layers.GlobalAveragePooling2D()(x))
    return layers.Dense(6, activation="softmax")(x)


@pytest.fixture(scope="module")
def quantized():
    made = {}

    def make(ranges):
        if ranges not in made:
            config = QuantizationConfig(training_ranges=ranges, corrections=())
            made[ranges] = quantize_model(functional(SIDE, small), IMAGES, config, verbose=False)
        return copy_of(made[ranges])

    return make


@pytest.mark.parametrize("of_kernel", [False, True])
def test_gradients_are_those_of_the_reference(of_kernel):
    values = np.random.default_rng(0).uniform(-4, 4, (50, 3)).astype("float32")
    low, high, arguments = np.float32(-1.5), np.float32(2.25), {}
    if of_kernel:
        high = np.array([0.5, 1, 2], "float32")
        low, arguments = -high, {"num_bits": 8, "narrow_range": True, "axis": -1}
    found = []
    for function in (fake_quant, keras.quantizers.fake_quant_with_min_max_vars):
        tensors = [tf.constant(array) for array in (values, low, high)]
        with tf.GradientTape() as tape:
            tape.watch(tensors[0])
            rounded = function(*tensors, **arguments)
            loss = tf.reduce_sum(tf.square(rounded))
        found.append((rounded.numpy(), tape.gradient(loss, tensors[0]).numpy()))
    (rounded, gradient), (as_keras, reference) = found
    assert np.array_equal(rounded, as_keras)
    assert np.array_equal(gradient, reference)
    # There is something to compare: what is clipped has no gradient, what is not has its own.
    assert 0.2 < np.mean(gradient == 0) < 0.9


def test_no_gradient_is_cut_at_the_ends_of_a_fixed_range():
    values = tf.constant([-0.001, 0.0, 0.5, 1.0, 1.001])
    for fixed, expected in ((True, [1] * 5), (False, [0, 1, 1, 0, 0])):
        layer = FakeQuant(0.0, 255 / 256, fixed=fixed)
        layer.build(values.shape)
        with tf.GradientTape() as tape:
            tape.watch(values)
            outputs = layer(values)
        assert tape.gradient(outputs, values).numpy().tolist() == expected
        assert outputs.numpy().tolist() == [0, 0, 0.5, 255 / 256, 255 / 256]


def compiled(model, rate=1e-2, **arguments):
    optimizer = keras.optimizers.Adam(rate, **arguments)
    # XLA compiles for longer than these trainings take.
    model.compile(optimizer, "sparse_categorical_crossentropy", jit_compile=False)
    return model


def fit(model, epochs=2, callbacks=(), **arguments):
    return model.fit(
        IMAGES,
        LABELS,
        epochs=epochs,
        batch_size=4,
        verbose=0,
        shuffle=False,
        callbacks=list(callbacks),
        **arguments,
    )


def ranges(model):
    return {
        layer.name: layer.real_range()
        for layer in layers_of(model)
        if isinstance(layer, FakeQuant) and not layer.fixed
    }


@pytest.mark.parametrize("kind", ["fixed", "moving_average", "learned"])
def test_it_learns_and_settles_to_the_integers_of_the_file(kind, quantized):
    student = quantized(kind)
    before = ranges(student)
    losses = fit(compiled(student), epochs=20).history["loss"]
    assert np.mean(losses[-3:]) < 0.95 * np.mean(losses[:3])
    moved = sum(before[name] != now for name, now in ranges(student).items())
    assert moved == 0 if kind == "fixed" else moved >= 3
    trained = student.get_weights()
    settle(student)
    settled = student.get_weights()
    assert any(np.any(a != b) for a, b in zip(trained, settled, strict=True))
    graph = read_quantized(student)
    for node in graph.kernel_nodes():
        integers, steps = integer_bias(graph, node)
        np.testing.assert_allclose(node.weights["bias"], integers * steps, rtol=1e-6)
    settle(student)
    for a, b in zip(settled, student.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(
        integers_of_model(student, IMAGES), integers_of_file(student, IMAGES)
    )


def test_a_model_that_was_not_trained_is_settled(tiny_quantized):
    copy = copy_of(tiny_quantized)
    settle(copy)
    for a, b in zip(tiny_quantized.get_weights(), copy.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_a_range_clips_trains_it():
    model = keras.Sequential([keras.Input((4,)), FakeQuant(-1.0, 1.0, ranges="learned")])
    model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=False)
    inside, outside = np.full((8, 4), 0.5, "float32"), np.full((8, 4), 3.0, "float32")
    model.fit(inside, inside, epochs=3, verbose=0)
    assert model.layers[0].real_range() == (-1.0, 1.0)
    model.fit(outside, outside, epochs=3, verbose=0)
    low, high = model.layers[0].real_range()
    assert low == -1.0 and high > 1.1


def test_a_learned_range_never_collapses():
    model = keras.Sequential([keras.Input((4,)), FakeQuant(-1.0, 2.0, ranges="learned")])
    model.compile(keras.optimizers.SGD(100.0), "mse", jit_compile=False)
    values = np.full((8, 4), 9.0, "float32")
    model.fit(values, np.zeros_like(values), epochs=2, verbose=0)
    low, high = model.layers[0].real_range()
    assert low <= 0 < high and np.all(np.isfinite(model.predict(values, verbose=0)))


def test_an_averaged_range_contains_zero():
    # Keras averages what its optimizer did to a bound before the bound was put back in its place.
    model = keras.Sequential([keras.Input((4,)), FakeQuant(0.0, 1.0, ranges="learned")])
    optimizer = keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.5)
    model.compile(optimizer, "mse", jit_compile=False)
    values = np.full((8, 4), -1.0, "float32")
    model.fit(values, -values, epochs=2, verbose=0)
    assert float(model.layers[0].minimum) > 0
    assert model.layers[0].real_range()[0] == 0
    assert model.layers[0].params.zero_point == -128


def test_moving_ranges_follow_the_batches_and_freeze():
    moving = FakeQuant(-1.0, 1.0, ranges="moving_average")
    model = keras.Sequential([keras.Input((4,)), moving, layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.0), "mse", jit_compile=False)
    values = np.linspace(-2, 4, 32).reshape(8, 4).astype("float32")
    history = model.fit(
        values,
        values[:, 0],
        epochs=3,
        batch_size=2,
        verbose=0,
        shuffle=False,
        callbacks=[FreezeRanges(5)],
    )
    # The range moves by 1 % of the distance in each step, 5 times.
    expected = np.array([-1.0, 1.0])
    for step in range(5):
        batch = values[2 * (step % 4) : 2 * (step % 4) + 2]
        expected += 0.01 * (np.array([min(batch.min(), 0), max(batch.max(), 0)]) - expected)
    low, high = moving.real_range()
    np.testing.assert_allclose([low, high], expected, rtol=1e-5)
    assert history.history["moving_ranges"] == [1, 0, 0]
    # Outside training it stays.
    moving.moving.assign(1.0)
    model.predict(values * 100, verbose=0)
    assert moving.real_range() == (low, high)


def test_weights_are_stored_in_units_of_their_range(tiny_quantized):
    for layer in layers_of(tiny_quantized):
        if isinstance(layer, QUANTIZED_KERNELS):
            stored = abs(keras.ops.convert_to_numpy(layer.kernel)).max()
            assert 0.4 < stored <= 1.01
    layer = QuantizedDense(2)
    layer.build((None, 3))
    kernel = np.array([[1e-4, 700.0], [-3e-4, 5.0], [2e-4, 0.1]], "float32")
    bias = np.array([1e-5, 33.3], "float32")
    layer.set_real(kernel, bias, abs(kernel).max(axis=0), input_reach=6.0)
    np.testing.assert_array_equal(layer.real_kernel(), kernel)
    np.testing.assert_array_equal(layer.real_bias(), bias)
    np.testing.assert_array_equal(power_of_two([0.3, 1.0, 700.0]), [0.5, 1.0, 1024.0])
    # One step of Adam moves both columns by the same part of their limits.
    model = keras.Sequential([keras.Input((3,)), layer])
    model.compile(keras.optimizers.Adam(0.01), "mse", jit_compile=False)
    model.fit(np.ones((4, 3), "float32"), np.full((4, 2), 9.0), verbose=0)
    change = abs(layer.real_kernel() - kernel).max(axis=0) / [2**-11, 1024]
    np.testing.assert_allclose(change, 0.01, rtol=1e-3)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision_rounds_in_float32(policy):
    source = functional(SIDE, small)
    keras.config.set_dtype_policy(policy)
    try:
        model = quantize_model(source, IMAGES, verbose=False)
    finally:
        keras.config.set_dtype_policy("float32")
    exact = quantize_model(source, IMAGES, verbose=False)
    # Calibration is done in float32 whatever the policy: the same ranges and kernels.
    found, expected = read_quantized(model), read_quantized(exact)
    for node in expected:
        assert found[node.name].params == node.params
        for key, value in node.weights.items():
            np.testing.assert_array_equal(found[node.name].weights[key], value)
    conv = next(x for x in layers_of(model) if isinstance(x, QUANTIZED_KERNELS))
    assert conv.compute_dtype == policy.removeprefix("mixed_")
    assert conv.quantized_kernel().dtype == "float32"
    losses = fit(compiled(model), epochs=20).history["loss"]
    assert np.all(np.isfinite(losses)) and np.mean(losses[-3:]) < 0.95 * np.mean(losses[:3])


def test_accumulated_gradients_and_averaged_weights(quantized):
    model = compiled(
        quantized("fixed"), gradient_accumulation_steps=2, use_ema=True, ema_momentum=0.5
    )
    fit(model, epochs=2)
    plain = compiled(quantized("fixed"), gradient_accumulation_steps=2)
    fit(plain, epochs=2)
    assert any(
        np.any(a != b) for a, b in zip(plain.get_weights(), model.get_weights(), strict=True)
    )
    settle(model)
    np.testing.assert_array_equal(integers_of_model(model, IMAGES), integers_of_file(model, IMAGES))


def test_saved_in_the_middle_of_training_it_goes_on(quantized, tmp_path):
    student = quantized("learned")
    with without_dropout(student):
        fit(compiled(student), epochs=1)
        student.save(tmp_path / "middle.keras")
        loaded = keras.models.load_model(tmp_path / "middle.keras")
        assert ranges(loaded) == ranges(student)
        for model in (student, loaded):
            fit(model, epochs=1)
    for a, b in zip(student.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_student_drops_nothing_and_is_seen_before_its_outputs_are_rounded(quantized):
    student = quantized("fixed")
    rates = [layer.rate for layer in layers_of(student) if isinstance(layer, keras.layers.Dropout)]
    rounded = np.asarray(student(IMAGES, training=False))
    steps = rounded * 256
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-4)
    with without_dropout(student), unrounded_outputs(student):
        first, second = (np.asarray(student(IMAGES, training=True)) for _ in range(2))
        np.testing.assert_array_equal(first, second)
        # Not even the scores are rounded: the probabilities have no steps, and sum to 1.
        np.testing.assert_allclose(first.sum(axis=1), 1, atol=1e-6)
        np.testing.assert_allclose(first, rounded, atol=0.02)
        assert abs(first * 256 - np.round(first * 256)).max() > 0.1
        # What the best state is chosen by is what is learned.
        np.testing.assert_array_equal(np.asarray(student(IMAGES, training=False)), first)
    np.testing.assert_array_equal(np.asarray(student(IMAGES, training=False)), rounded)
    assert rates == [0.2]
    assert rates == [
        layer.rate for layer in layers_of(student) if isinstance(layer, keras.layers.Dropout)
    ]
    dropped = [np.asarray(student(IMAGES, training=True)) for _ in range(2)]
    assert np.any(dropped[0] != dropped[1])
    np.testing.assert_allclose(dropped[0] * 256, np.round(dropped[0] * 256), atol=1e-4)


def test_ranges_that_the_loss_does_not_see_are_not_learned(quantized):
    student = quantized("learned")
    before, trainable = ranges(student), len(student.trainable_variables)
    with unrounded_outputs(student):
        # Scores and probabilities; a bound without a gradient would end in a warning.
        assert len(student.trainable_variables) == trainable - 2
        fit(compiled(student), epochs=1)
    assert len(student.trainable_variables) == trainable
    after = ranges(student)
    moved = [name for name in before if before[name] != after[name]]
    assert moved and not any("predictions" in name or "dense" in name for name in moved)


def test_backup_and_restore(quantized, tmp_path):
    seen = []

    class Watch(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            seen.append((epoch, ranges(self.model), self.model.get_weights()))
            if len(seen) == 3:
                raise KeyboardInterrupt

    def backup():
        return keras.callbacks.BackupAndRestore(tmp_path / "backup")

    with pytest.raises(KeyboardInterrupt):
        fit(compiled(quantized("moving_average")), epochs=3, callbacks=[backup(), Watch()])
    fit(compiled(quantized("moving_average")), epochs=3, callbacks=[backup(), Watch()])
    (last, last_ranges, last_weights), (first, first_ranges, first_weights) = seen[-2:]
    assert first == last == 2 and first_ranges == last_ranges
    for a, b in zip(last_weights, first_weights, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def normalized():
    source = functional(SIDE, small)
    config = QuantizationConfig(batch_norm="trained", corrections=())
    return source, quantize_model(source, IMAGES, config, verbose=False)


def test_batch_norms_are_trained_and_folded_again(normalized, quantized):
    model = copy_of(normalized[1])
    layer = next(x for x in layers_of(model) if isinstance(x, QUANTIZED_KERNELS) and x.batch_norm)
    # Untrained, the integers are those of the folded model.
    for node, other in zip(read_quantized(model), read_quantized(quantized("fixed")), strict=True):
        for key, value in node.weights.items():
            np.testing.assert_allclose(value, other.weights[key], rtol=1e-5, atol=1e-6)
    start = layer.real_kernel()
    freeze = FreezeBatchNorms(12)
    history = fit(compiled(model), epochs=6, callbacks=[freeze]).history
    assert history["moving_batch_norms"] == [1, 1, 0, 0, 0, 0]
    assert history["loss"][-1] < history["loss"][0]
    assert np.any(layer.real_kernel() != start) and np.any(layer.moving_mean != 0)
    before = model.predict(IMAGES, verbose=0)
    settle(model)
    np.testing.assert_array_equal(layer.gamma, np.ones(8))
    assert abs(model.predict(IMAGES, verbose=0) - before).max() < 0.02
    np.testing.assert_array_equal(integers_of_model(model, IMAGES), integers_of_file(model, IMAGES))


def test_trained_batch_norms_normalize_by_the_batch(normalized):
    """The layer's output in training is that of a batch norm behind the convolution."""
    source, model = normalized
    layer = next(x for x in layers_of(model) if isinstance(x, QUANTIZED_KERNELS) and x.batch_norm)
    norm = next(x for x in source.layers if isinstance(x, layers.BatchNormalization))
    inputs = np.random.default_rng(0).normal(size=(8, 8, 8, 8)).astype("float32")
    found = keras.ops.convert_to_numpy(copy_of_layer(layer)(inputs, training=True))
    mean, deviation = found.mean(axis=(0, 1, 2)), found.std(axis=(0, 1, 2))
    np.testing.assert_allclose(mean, norm.beta, atol=1e-3)
    np.testing.assert_allclose(deviation, abs(keras.ops.convert_to_numpy(norm.gamma)), rtol=0.01)
    # Frozen, it is the folded convolution, in training too.
    frozen = copy_of_layer(layer)
    frozen.freeze()
    np.testing.assert_array_equal(
        keras.ops.convert_to_numpy(frozen(inputs, training=True)),
        keras.ops.convert_to_numpy(frozen(inputs, training=False)),
    )
    assert np.any(
        abs(mean - keras.ops.convert_to_numpy(frozen(inputs)).mean(axis=(0, 1, 2))) > 0.01
    )


def copy_of_layer(layer):
    copy = type(layer).from_config(layer.get_config())
    copy.build(layer.input.shape)
    copy.set_weights(layer.get_weights())
    return copy


def test_bad_input(tiny, quantized):
    with pytest.raises(ValueError, match="`training_ranges` must be one of"):
        QuantizationConfig(training_ranges="free")
    with pytest.raises(ValueError, match="`batch_norm` must be one of"):
        QuantizationConfig(batch_norm="none")
    with pytest.raises(ValueError, match="needs batch norms that follow the batches"):
        fit(compiled(quantized("fixed")), callbacks=[FreezeBatchNorms(3)])
    with pytest.raises(ValueError, match="`ranges` must be one of"):
        FakeQuant(-1, 1, ranges="free")
    with pytest.raises(ValueError, match="`steps` must be at least 0"):
        FreezeRanges(-1)
    with pytest.raises(ValueError, match="`settle` needs a model made by"):
        settle(tiny)
    with pytest.raises(ValueError, match="needs a model made by `quantize_model`"):
        fit(compiled(functional(SIDE, small)), callbacks=[FreezeRanges(3)])
    with pytest.raises(ValueError, match="this model has none"):
        fit(compiled(quantized("fixed")), callbacks=[FreezeRanges(3)])


def test_weights_and_ranges_that_were_lost_are_named(tiny_quantized):
    broken = copy_of(tiny_quantized)
    layer = next(x for x in layers_of(broken) if isinstance(x, QUANTIZED_KERNELS))
    layer.bias.assign(layer.bias * np.nan)
    with pytest.raises(ValueError, match=f"layer '{layer.name}' must be finite"):
        settle(broken)
    collapsed = copy_of(tiny_quantized)
    layer = next(x for x in layers_of(collapsed) if isinstance(x, FakeQuant) and not x.fixed)
    low, high = layer.real_range()
    layer.set_range(low / 50, high / 50)
    with pytest.raises(ValueError, match=f"range of '{layer.name}' has collapsed"):
        settle(collapsed)


def test_ranges_that_tensors_share_stay_fixed():
    def joined(x):
        a = layers.Conv2D(4, 3, padding="same", name="a")(x)
        b = layers.Conv2D(4, 3, padding="same", name="b")(x)
        x = layers.Concatenate(name="join")([a, b])
        return layers.Conv2D(3, 1, name="c")(x)

    config = QuantizationConfig(training_ranges="learned", corrections=())
    model = quantize_model(functional(8, joined), pixels(8, side=8), config, verbose=False)
    kinds = {x.name: x.ranges for x in layers_of(model) if isinstance(x, FakeQuant)}
    assert kinds["a_range"] == kinds["b_range"] == "fixed" and kinds["c_range"] == "learned"
