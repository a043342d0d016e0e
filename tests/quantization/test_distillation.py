"""Distillation improves or keeps the start, and its result is what the file computes."""

import keras
import numpy as np
import pytest
from eager import predict
from hand_made import (
    copy_of,
    folded,
    functional,
    integers_of_file,
    integers_of_model,
    network,
    pixels,
)

from keras_effnet.quantization import (
    DistillationConfig,
    QuantizationConfig,
    distill,
    distillation,
    quantize_model,
    settle,
)
from keras_effnet.quantization.boundaries import boundaries
from keras_effnet.quantization.build import RANGE_SUFFIX, build_model
from keras_effnet.quantization.fake_quant import QUANTIZED_KERNELS
from keras_effnet.quantization.lowering import read_quantized
from keras_effnet.quantization.training import layers_of

FAST = {"learning_rate": 1e-2, "shift": 1, "batch_size": 8, "mixup": 0.0, "ema": 0.0}


@pytest.fixture
def student(tiny_quantized):
    return disturbed(tiny_quantized)


@pytest.fixture(scope="module")
def two_blocks():
    """The least that has blocks, for what does not depend on the network: it is traced sooner."""

    def body(x):
        x = keras.layers.Conv2D(4, 3, padding="same", activation="relu")(x)
        x = keras.layers.Conv2D(4, 3, padding="same")(x)
        x = keras.layers.GlobalAveragePooling2D()(x)
        return keras.layers.Dense(6, activation="softmax")(x)

    return functional(16, body)


@pytest.fixture(scope="module")
def two_blocks_quantized(two_blocks, tiny_images):
    return quantize_model(two_blocks, tiny_images, verbose=False)


@pytest.fixture(scope="module")
def two_blocks_student(two_blocks_quantized):
    return disturbed(two_blocks_quantized)


def disturbed(model):
    """A copy whose kernels are off by some steps."""
    copy, rng = copy_of(model), np.random.default_rng(0)
    for layer in layers_of(copy):
        if isinstance(layer, QUANTIZED_KERNELS):
            kernel = keras.ops.convert_to_numpy(layer.kernel)
            layer.kernel.assign(kernel + rng.normal(size=kernel.shape) * 0.1)
    return copy


def test_held_back_images_are_those_of_the_distillation(monkeypatch):
    found = []

    def run(teacher, student, model, images, held, used, config, rng):
        found.append((images[held], images[used]))
        raise RuntimeError("stop")

    model = functional(8, lambda x: keras.layers.Conv2D(4, 3, activation="relu")(x))
    images = pixels(10, 8)
    quantized = quantize_model(model, images, QuantizationConfig(corrections=()), verbose=False)
    monkeypatch.setattr(distillation, "_Run", run)
    config = DistillationConfig(validation_share=0.3, seed=5)
    with pytest.raises(RuntimeError, match="stop"):
        distill(model, quantized, images, config)
    held = distillation.held_back(10, config)
    np.testing.assert_array_equal(found[0][0], images[held])
    assert len(held) == 3 and len(found[0][1]) == 7
    np.testing.assert_array_equal(
        np.sort(np.concatenate(found[0]).sum(axis=(1, 2, 3))), np.sort(images.sum(axis=(1, 2, 3)))
    )


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="classes"),
        pytest.param({"feature_weight": 1.0, "temperature": 4.0}, id="features"),
        pytest.param({"mode": "block_wise", "epochs": 4}, id="block_wise"),
        pytest.param({"mixup": 0.5, "ema": 0.5}, id="mixup_ema"),
    ],
)
def test_it_improves_and_gives_the_integers_of_the_file(options, tiny, student, tiny_images):
    config = DistillationConfig(**{**FAST, "epochs": 8, **options})
    result = distill(tiny, student, tiny_images, config, verbose=False)
    assert result.after < 0.7 * result.before
    assert result.after == min(result.before, *result.epochs)
    assert result.epochs[result.kept - 1] == result.after
    np.testing.assert_array_equal(
        integers_of_model(student, tiny_images), integers_of_file(student, tiny_images)
    )


@pytest.mark.slow
@pytest.mark.parametrize("training_ranges", ["moving_average", "learned"])
def test_ranges_move_with_it(training_ranges, tiny, tiny_images):
    config = QuantizationConfig(training_ranges=training_ranges, corrections=())
    student = disturbed(quantize_model(tiny, tiny_images, config, verbose=False))
    before = [layer.params for layer in layers_of(student) if hasattr(layer, "params")]
    result = distill(
        tiny, student, tiny_images, DistillationConfig(**FAST, epochs=6), verbose=False
    )
    assert result.after < result.before
    after = [layer.params for layer in layers_of(student) if hasattr(layer, "params")]
    assert sum(a != b for a, b in zip(before, after, strict=True)) > 5
    np.testing.assert_array_equal(
        integers_of_model(student, tiny_images), integers_of_file(student, tiny_images)
    )


def test_blocks_are_separated_where_one_tensor_holds_everything(tiny, tiny_quantized):
    found = boundaries(folded(tiny), read_quantized(tiny_quantized))
    assert found
    graph = folded(tiny)
    names = list(graph.nodes)
    for name in found:
        place = names.index(name)
        # Nothing behind the boundary reads anything before it.
        for node in list(graph)[place + 1 :]:
            assert all(names.index(source) >= place for source in node.inputs)


def test_it_keeps_the_start_where_training_harms(two_blocks, two_blocks_quantized, tiny_images):
    student = copy_of(two_blocks_quantized)
    start = student.get_weights()
    config = DistillationConfig(epochs=3, learning_rate=10.0, patience=1)
    result = distill(two_blocks, student, tiny_images, config, verbose=False)
    assert len(result.epochs) == 1 and result.kept == 0
    assert result.after == result.before < result.epochs[0]
    for a, b in zip(start, student.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("gains", "expected"),
    [
        ([0.2, 0.1, 0.3, 0.2], True),
        # Their mean is 0.05, its standard error 0.29.
        ([0.8, -0.4, 0.3, -0.5], False),
        # 0.2 and 0.19, 0.2 and 0.21.
        ([0.2, 0.66, -0.26, 0.2], True),
        ([0.2, 0.72, -0.32, 0.2], False),
        ([0.0, 0.0, 0.0], False),
        ([1.0], False),
    ],
)
def test_a_gain_is_one_where_it_exceeds_its_standard_error(gains, expected):
    before = np.arange(len(gains)) + 1.0
    assert distillation.is_better(before, before - gains) is expected
    assert not distillation.is_better(before - gains, before)


@pytest.mark.parametrize(("spread", "kept"), [(0.01, 2), (0.4, 0)])
def test_the_start_is_kept_where_chance_makes_the_best_state(
    spread, kept, two_blocks, two_blocks_student, tiny_images, monkeypatch
):
    noise = spread * np.array([1, -1, 1, -1, 0])
    # The start, and then every epoch.
    states = [np.ones(5) + shift for shift in (0, 0.3, noise - 0.1, 0.1 + noise)]
    left, settled = list(states), distillation._Run._settled

    def measured(self):
        return left.pop(0), settled(self)[1]

    monkeypatch.setattr(distillation._Run, "_settled", measured)
    start, student = copy_of(two_blocks_student), copy_of(two_blocks_student)
    settle(start)
    config = DistillationConfig(**FAST, epochs=3)
    result = distill(two_blocks, student, tiny_images, config, verbose=False)
    assert not left and result.kept == kept
    np.testing.assert_allclose(result.epochs, [1.3, 0.9, 1.1])
    np.testing.assert_allclose([result.before, result.after], [1, 0.9 if kept else 1])
    pairs = zip(start.get_weights(), student.get_weights(), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs) == (kept == 0)


def test_the_teacher_and_the_dropout_are_left_alone(tiny_images):
    def dropping(x):
        x = keras.layers.GlobalAveragePooling2D()(x)
        return keras.layers.Dense(3)(keras.layers.Dropout(0.5, name="drop")(x))

    teacher = functional(16, dropping)
    weights = [weight.copy() for weight in teacher.get_weights()]
    student = quantize_model(teacher, tiny_images, verbose=False)
    distill(teacher, student, tiny_images, DistillationConfig(epochs=1), verbose=False)
    assert student.get_layer("drop").rate == 0.5
    for a, b in zip(weights, teacher.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_batches_serve_as_images(two_blocks, two_blocks_student, tiny_images):
    batches = [(tiny_images[:10], np.zeros(10)), (tiny_images[10:], np.zeros(14))]
    config = DistillationConfig(**FAST, epochs=1)
    found, expected = (
        distill(two_blocks, copy_of(two_blocks_student), images, config, verbose=False)
        for images in (batches, tiny_images)
    )
    assert found == expected


def test_the_average_is_measured_and_kept(tiny, student, tiny_images):
    """An average over more steps than there are lags behind the weights."""
    config = {**FAST, "epochs": 1, "batch_size": 1}
    last = distill(tiny, copy_of(student), tiny_images, DistillationConfig(**config), verbose=False)
    config["ema"] = 0.97
    average = distill(tiny, student, tiny_images, DistillationConfig(**config), verbose=False)
    assert 1.2 * last.after < average.after < 0.8 * average.before


def test_mixup_blends_with_another_image(two_blocks, two_blocks_student, tiny_images, monkeypatch):
    seen, epoch = [], distillation._Run._epoch

    def watched(self, verbose, trainer, entering, teacher):
        return epoch(self, verbose, trainer, lambda batch: seen.append(batch) or batch, teacher)

    monkeypatch.setattr(distillation._Run, "_epoch", watched)
    images = np.zeros((16, *tiny_images.shape[1:]), np.float32)
    images[::2] = 200
    images[:, :4] = 40  # Not constant.
    config = DistillationConfig(**{**FAST, "shift": 0, "epochs": 3, "flip": False, "mixup": 0.7})
    distill(two_blocks, copy_of(two_blocks_student), images, config, verbose=False)
    levels = np.concatenate(seen)[:, -1, 0, 0]
    assert 0 <= levels.min() and levels.max() <= 200
    blended = ~np.isin(levels, (0, 200))
    assert 0 < blended.sum() < len(levels)


def test_mirror_images_and_blends_are_measured_too(
    two_blocks, two_blocks_student, tiny_images, monkeypatch
):
    runs, train = [], distillation._Run.train

    def watched(self, verbose):
        runs.append(self)
        return train(self, verbose)

    monkeypatch.setattr(distillation._Run, "train", watched)
    for options in ({"mixup": 0.5}, {"flip": False}):
        config = DistillationConfig(**{**FAST, "epochs": 1, **options})
        distill(two_blocks, copy_of(two_blocks_student), tiny_images, config, verbose=False)
    all_views, plain = (run.views.astype(np.float32) for run in runs)
    assert len(plain) == 5 and len(all_views) == 15  # A fifth of the images.
    held, mirrored, blended = np.split(all_views, 3)
    np.testing.assert_array_equal(held, plain)
    np.testing.assert_array_equal(mirrored, plain[:, :, ::-1])
    assert np.abs(blended - (plain + plain[[-1, 0, 1, 2, 3]]) / 2).max() <= 0.5
    scores = two_blocks.predict(all_views, verbose=0)
    np.testing.assert_allclose(keras.ops.softmax(runs[0].wanted), scores, atol=1e-5)
    # The views of one photograph count as one.
    of_views = runs[0].measure(runs[0].wanted, predict(runs[0].output, all_views))
    distances = np.asarray(of_views).reshape(3, 5).mean(axis=0)
    np.testing.assert_allclose(runs[0].best[0], distances, rtol=1e-4)


def test_a_temperature_sees_beyond_the_range(two_blocks, two_blocks_student, tiny_images, capsys):
    """A range of scores that cuts off what changes no probability is no error to be learned."""
    graph = read_quantized(two_blocks_student)
    scores = graph[graph.outputs[0]].inputs[0]
    config = DistillationConfig(epochs=1, learning_rate=1e-9, temperature=4.0)
    losses = []
    for narrow in (False, True):
        student = copy_of(two_blocks_student)
        if narrow:
            layer = student.get_layer(scores + RANGE_SUFFIX)
            layer.set_range(*(bound / 4 for bound in layer.real_range()))
        distill(two_blocks, student, tiny_images, config, verbose=2)
        losses.append(float(capsys.readouterr().out.rsplit("loss: ", 1)[1].split()[0]))
    assert losses[0] == losses[1]


def test_an_epoch_ends_with_its_mean_loss_and_the_held_back_divergence(
    two_blocks, two_blocks_student, tiny_images, capsys, monkeypatch
):
    losses, original = [], keras.Model.train_on_batch

    def train_on_batch(*args, **kwargs):
        logs = original(*args, **kwargs)
        losses.append(float(logs["loss"]))
        return logs

    monkeypatch.setattr(keras.Model, "train_on_batch", train_on_batch)
    config = DistillationConfig(**FAST | {"epochs": 2, "batch_size": 4})
    student = copy_of(two_blocks_student)
    found = distill(two_blocks, student, tiny_images, config, verbose=2)
    lines = [line for line in capsys.readouterr().out.splitlines() if "loss" in line]
    steps = np.reshape(losses, (2, -1))
    assert np.all(np.ptp(steps, axis=1) > 0)
    for line, loss, divergence in zip(lines, steps.mean(axis=1), found.epochs, strict=True):
        shown = dict(part.split(": ") for part in line.split(" - ") if ": " in part)
        np.testing.assert_allclose(float(shown["loss"]), loss, rtol=1e-3)
        np.testing.assert_allclose(float(shown["held_back"]), divergence, rtol=1e-3)


def test_the_best_state_is_chosen_at_the_temperature(two_blocks, two_blocks_student, tiny_images):
    graphs = folded(two_blocks), read_quantized(two_blocks_student)
    found = []
    for temperature in (1.0, 4.0):
        config = DistillationConfig(
            epochs=1, learning_rate=1e-9, temperature=temperature, flip=False, mixup=0.0
        )
        student = copy_of(two_blocks_student)
        found.append(distill(two_blocks, student, tiny_images, config, verbose=False).before)
    order = np.random.default_rng(0).permutation(len(tiny_images))
    held = tiny_images[order[: round(0.2 * len(tiny_images))]]
    for temperature, before in zip((1.0, 4.0), found, strict=True):
        target, output = (
            predict(part, held)
            for part in (
                build_model(
                    graphs[0],
                    quantized=False,
                    observed=tuple(graphs[0][graphs[0].outputs[0]].inputs),
                ),
                keras.Model(
                    two_blocks_student.inputs[0],
                    two_blocks_student.get_layer(graphs[1][graphs[1].outputs[0]].inputs[0]).output,
                ),
            )
        )
        expected = distillation.divergence(target, output, temperature)
        np.testing.assert_allclose(before, np.mean(expected), rtol=1e-4)


def test_features_without_classes(tiny_images):
    def trunk(x):
        x = keras.layers.Conv2D(4, 3, padding="same", activation="relu")(x)
        return keras.layers.Conv2D(4, 3, padding="same")(x)

    teacher = functional(16, trunk)
    student = disturbed(quantize_model(teacher, tiny_images, verbose=False))
    config = DistillationConfig(**{**FAST, "learning_rate": 3e-3}, epochs=12, patience=12)
    result = distill(teacher, student, tiny_images, config, verbose=False)
    assert result.after < 0.9 * result.before


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("mode", "layer_wise"),
        ("epochs", 0),
        ("batch_size", 0),
        ("learning_rate", 0.0),
        ("temperature", 0.0),
        ("feature_weight", -1.0),
        ("validation_share", 1.0),
        ("patience", 0),
        ("shift", -1),
        ("mixup", -0.5),
        ("ema", 1.0),
    ],
)
def test_bad_options_are_named(option, value):
    with pytest.raises(ValueError, match=f"`{option}` must be .* Received: {value!r}"):
        DistillationConfig(**{option: value})


def test_bad_input(tiny, tiny_quantized, tiny_images):
    with pytest.raises(ValueError, match="quantize it first"):
        distill(tiny, tiny, tiny_images)
    with pytest.raises(ValueError, match="must be the float model"):
        distill(tiny_quantized, tiny_quantized, tiny_images)
    with pytest.raises(ValueError, match=r"at least 2 image\(s\)"):
        distill(tiny, tiny_quantized, tiny_images[:1])
    with pytest.raises(ValueError, match="equal input and output shapes"):
        distill(functional(32, network), tiny_quantized, pixels(4, side=32))
    with pytest.raises(ValueError, match="looks? scaled already"):
        distill(tiny, tiny_quantized, tiny_images / 255)
    other = functional(16, lambda x: keras.layers.Dense(6)(keras.layers.Flatten()(x)))
    with pytest.raises(ValueError, match="have no tensors between blocks in common"):
        distill(other, tiny_quantized, tiny_images, DistillationConfig(feature_weight=1.0))


def test_a_loss_that_is_not_finite_restores_the_best_state(
    two_blocks, two_blocks_quantized, tiny_images, monkeypatch
):
    student = copy_of(two_blocks_quantized)
    start = student.get_weights()
    train = keras.Model.train_on_batch

    def fail_later(model, *arguments, **options):
        logs = train(model, *arguments, **options)
        return {"loss": np.nan} if int(model.optimizer.iterations) == 2 else logs

    monkeypatch.setattr(keras.Model, "train_on_batch", fail_later)
    config = DistillationConfig(**FAST)
    with pytest.raises(ValueError, match="Received: nan in step 2 of epoch 1"):
        distill(two_blocks, student, tiny_images, config, verbose=False)
    for a, b in zip(start, student.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_an_interrupt_keeps_the_best_state(
    two_blocks, two_blocks_quantized, tiny_images, monkeypatch
):
    student = copy_of(two_blocks_quantized)
    start = student.get_weights()

    def interrupt(bar, step, *args, **kwargs):
        if step == 2:  # The first step of a warm-up moves nothing.
            raise KeyboardInterrupt

    monkeypatch.setattr(keras.utils.Progbar, "update", interrupt)
    config = DistillationConfig(learning_rate=1.0)
    result = distill(two_blocks, student, tiny_images, config, verbose=False)
    assert result.interrupted and result.kept == 0
    for a, b in zip(start, student.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("options", "stops"),
    [
        pytest.param({"epochs": 4, "patience": 9}, 3, id="end_to_end"),
        # One epoch into the second of several blocks.
        pytest.param(
            {"epochs": 2, "mode": "block_wise"}, 4, id="block_wise", marks=pytest.mark.slow
        ),
        pytest.param(
            {"epochs": 3, "mixup": 0.5, "ema": 0.9}, 3, id="mixup_ema", marks=pytest.mark.slow
        ),
    ],
)
def test_a_killed_distillation_goes_on_to_the_same_weights(
    options, stops, two_blocks, two_blocks_student, tiny_images, tmp_path, monkeypatch
):
    config = DistillationConfig(**{**FAST, **options})
    whole, path = copy_of(two_blocks_student), tmp_path / "checkpoint.npz"
    expected = distill(two_blocks, whole, tiny_images, config, verbose=False)

    begun = copy_of(two_blocks_student)
    epoch, calls = distillation._Run._epoch, []

    def killed(self, *args):
        calls.append(args)
        if len(calls) == stops:
            raise SystemExit
        return epoch(self, *args)

    monkeypatch.setattr(distillation._Run, "_epoch", killed)
    with pytest.raises(SystemExit):
        distill(two_blocks, begun, tiny_images, config, verbose=False, checkpoint=path)
    assert len(calls) == stops
    resumed = copy_of(two_blocks_student)
    result = distill(two_blocks, resumed, tiny_images, config, verbose=False, checkpoint=path)
    assert result == expected
    for got, wanted in zip(resumed.get_weights(), whole.get_weights(), strict=True):
        np.testing.assert_array_equal(got, wanted)
    # It is finished: nothing is trained again.
    calls.clear()
    again = copy_of(two_blocks_student)
    assert (
        distill(two_blocks, again, tiny_images, config, verbose=False, checkpoint=path) == expected
    )
    assert not calls
    np.testing.assert_array_equal(again.get_weights()[0], whole.get_weights()[0])

    other = DistillationConfig(**{**FAST, **options, "seed": 1})
    with pytest.raises(ValueError, match="belongs to a distillation with another config"):
        distill(
            two_blocks,
            copy_of(two_blocks_student),
            tiny_images,
            other,
            verbose=False,
            checkpoint=path,
        )
    with pytest.raises(ValueError, match="another quantized_model, images"):
        distill(two_blocks, resumed, tiny_images[1:], config, verbose=False, checkpoint=path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="is no checkpoint"):
        distill(
            two_blocks,
            copy_of(two_blocks_student),
            tiny_images,
            config,
            verbose=False,
            checkpoint=path,
        )


@pytest.mark.parametrize(("count", "epochs"), [(7, 20), (13 * 8, 20), (51 * 8, 10), (99 * 8, 5)])
def test_few_images_are_passed_more_often(count, epochs, tiny, student, tiny_images, monkeypatch):
    calls = []

    def skipped(*args):
        calls.append(args)
        return keras.utils.Progbar(None, verbose=0), 0.0

    monkeypatch.setattr(distillation._Run, "_epoch", skipped)
    state = np.zeros(2), student.get_weights()
    monkeypatch.setattr(distillation._Run, "_settled", lambda self: state)
    images = np.resize(tiny_images, (count, *tiny_images.shape[1:]))
    config = DistillationConfig(**FAST, patience=99)
    distill(tiny, student, images, config, verbose=False)
    assert len(calls) == epochs


def test_settled_models_stay_settled(tiny, student, tiny_images):
    distill(tiny, student, tiny_images, DistillationConfig(**FAST, epochs=2), verbose=False)
    weights = student.get_weights()
    settle(student)
    for a, b in zip(weights, student.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
