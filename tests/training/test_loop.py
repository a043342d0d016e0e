import signal

import keras
import numpy as np
import pytest
import toy

from keras_effnet.quantization.averages import averaged_weights
from keras_effnet.training import (
    AugmentationConfig,
    EvaluationBatches,
    NonFiniteLossError,
    Observer,
    Phase,
    Replicas,
    TrainingConfig,
    loop,
    read_position,
    restore_checkpoint,
    save_checkpoint,
    train,
)
from keras_effnet.training.loop import BEST, CHECKPOINT, LAST
from keras_effnet.training.teaching import loss_of, losses_of, metrics_of

PHASES = (Phase("head", 1, 1e-2, frozen="all"), Phase("stages", 2, 1e-2, frozen=0))
RANDOM = AugmentationConfig(rand_augment=1, mixup=0.2, cutmix=1.0)


def config_of(**changes):
    values = {"phases": PHASES, "batch_size": 8, "augmentation": RANDOM, "ema": 0.5}
    return TrainingConfig(**(values | changes))


class At(keras.callbacks.Callback):
    """Does something after a step of the whole training, counted from 1."""

    def __init__(self, step, act):
        super().__init__()
        self.left, self.act = step, act

    def on_train_batch_end(self, batch, logs=None):
        self.left -= 1
        if not self.left:
            self.act(self.model)


class Killed(Exception):
    pass


def kill(model):
    raise Killed


@pytest.fixture
def run(tmp_path):
    """Trains the toy in a folder; returns the result and the model."""

    def start(
        name="run",
        config=None,
        resume=False,
        callbacks=(),
        observer=None,
        images=None,
        replicas=None,
        teacher=None,
    ):
        (tmp_path / name).mkdir(exist_ok=True)
        training, validation = (images or toy.colour_images()).split(1 / 3, seed=0)
        model, saved_as = toy.toy_model(), toy.toy_model()
        result = train(
            model,
            training,
            validation,
            tmp_path / name,
            config or config_of(),
            saved_as=saved_as,
            resume=resume,
            callbacks=callbacks,
            observer=observer,
            replicas=replicas,
            teacher=teacher,
        )
        return result, model

    start.folder = lambda name="run": tmp_path / name
    return start


def without_time(history):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in history]


def assert_same(one, other):
    assert without_time(one[0].history) == without_time(other[0].history)
    assert one[0].best == other[0].best
    for weight, twin in zip(one[1].get_weights(), other[1].get_weights(), strict=True):
        np.testing.assert_array_equal(weight, twin)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    training, validation = toy.colour_images().split(1 / 3, seed=0)
    model, folder = toy.toy_model(), tmp_path_factory.mktemp("uninterrupted")
    config, twin = config_of(), toy.toy_model()
    return train(model, training, validation, folder, config, saved_as=twin), model


# Resuming


@pytest.mark.parametrize(
    "step", [pytest.param(2, marks=pytest.mark.slow), 5, pytest.param(7, marks=pytest.mark.slow)]
)
def test_a_run_killed_in_mid_epoch_ends_with_the_same_bits(run, uninterrupted, step):
    """In the head's epoch, and in both of the stages', which have three steps each."""
    config = config_of(checkpoint_steps=1)
    with pytest.raises(Killed):
        run(config=config, callbacks=[At(step, kill)])
    assert read_position(run.folder() / CHECKPOINT).step in (1, 2, 0)
    assert_same(run(config=config, resume=True), uninterrupted)


def test_ctrl_c_finishes_the_step_and_leaves_a_checkpoint(run, uninterrupted):
    ctrl_c = At(2, lambda model: signal.raise_signal(signal.SIGINT))
    before = signal.getsignal(signal.SIGINT)
    result, _ = run(callbacks=[ctrl_c])
    assert result.interrupted
    assert signal.getsignal(signal.SIGINT) is before
    position = read_position(run.folder() / CHECKPOINT)
    assert (position.phase, position.epoch, position.step) == (0, 0, 2)
    assert not (run.folder() / LAST).exists()
    assert_same(run(resume=True), uninterrupted)


@pytest.mark.slow
def test_a_finished_run_that_is_resumed_stays_as_it_is(run, uninterrupted):
    run()
    assert_same(run(resume=True), uninterrupted)


def test_another_seed_gives_another_run(run, uninterrupted):
    """Or the equalities above would prove nothing."""
    result, model = run(config=config_of(seed=1))
    assert without_time(result.history) != without_time(uninterrupted[0].history)


def test_resuming_needs_a_checkpoint_of_the_same_model(run):
    with pytest.raises(FileNotFoundError, match="There is no checkpoint"):
        run(resume=True)
    run(config=config_of(phases=PHASES[:1]))
    path = run.folder() / CHECKPOINT
    other = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    other.compile("sgd", "mse")
    other.optimizer.build(other.trainable_variables)
    with pytest.raises(ValueError, match="belongs to another model or optimizer: it holds"):
        restore_checkpoint(path, other)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="is no checkpoint"):
        run(resume=True)


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(run, monkeypatch):
    result, model = run(config=config_of(phases=PHASES[:1]))
    path = run.folder() / CHECKPOINT
    before = path.read_bytes()

    def full(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(path, model, read_position(path))
    assert path.read_bytes() == before
    assert not list(run.folder().glob(".part-*"))


# What is trained


def weights_of(model, name):
    return [weight.copy() for weight in model.get_layer(name).get_weights()]


class Snapshots(keras.callbacks.Callback):
    """The weights of layers at the beginning of each phase."""

    def __init__(self):
        super().__init__()
        self.taken = []

    def on_train_begin(self, logs=None):
        self.taken.append({layer.name: layer.get_weights() for layer in self.model.layers})


def changed(before, after, name):
    return any(np.any(one != other) for one, other in zip(before[name], after[name], strict=True))


def test_first_the_head_then_the_upper_stages(run):
    snapshots = Snapshots()
    _, model = run(callbacks=[snapshots])
    head, stages = snapshots.taken
    end = {layer.name: layer.get_weights() for layer in model.layers}
    assert changed(head, stages, "predictions")
    assert not any(changed(head, stages, name) for name in head if name != "predictions")
    for name in ("predictions", "block1a_project_conv", "block1a_project_bn"):
        assert changed(stages, end, name)
    assert not any(changed(stages, end, name) for name in ("stem_conv", "stem_bn"))


def test_after_the_head_everything_if_nothing_is_frozen(run):
    snapshots = Snapshots()
    phases = (PHASES[0], Phase("all", 1, 1e-2))
    _, model = run(config=config_of(phases=phases), callbacks=[snapshots])
    end = {layer.name: layer.get_weights() for layer in model.layers}
    for name in ("stem_conv", "stem_bn", "block1a_project_conv", "predictions"):
        assert changed(snapshots.taken[1], end, name)


def test_it_learns_and_keeps_the_best_and_the_last_state(run):
    still = AugmentationConfig(min_area=1, flip=False)
    phases = (Phase("all", 12, 5e-2),)
    result, model = run(config=config_of(phases=phases, augmentation=still))
    assert result.history[-1]["loss"] < 0.8 * result.history[0]["loss"]
    assert result.best == max(row["val_accuracy"] for row in result.history) > 0.9
    assert not result.interrupted and not result.unreadable
    _, validation = toy.colour_images().split(1 / 3, seed=0)
    pixels = toy.colour_arrays()[0][validation.indices]
    best = keras.models.load_model(run.folder() / BEST)
    accuracy = np.mean(best.predict(pixels, verbose=0).argmax(axis=1) == validation.labels)
    assert accuracy == pytest.approx(result.best)
    last = keras.models.load_model(run.folder() / LAST)
    for weight, twin in zip(last.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(weight, twin)


@pytest.mark.parametrize(("best_by", "kept"), [("accuracy", [1, 2]), ("cross_entropy", [1, 2, 4])])
def test_what_the_best_state_is(best_by, kept, run, monkeypatch):
    scripted = iter([(0.8, 0.5), (0.9, 0.4), (0.9, 0.45), (0.7, 0.3), (0.8, 0.35)])
    saved, epochs = [], []

    def evaluate(self):
        epochs.append(len(epochs) + 1)
        return dict(zip(("val_accuracy", "val_cross_entropy"), next(scripted), strict=True))

    monkeypatch.setattr(loop._Run, "_evaluate", evaluate)
    monkeypatch.setattr(
        loop._Run, "save_model", lambda self, name: saved.append((name, epochs[-1]))
    )
    config = config_of(phases=(Phase("one", 2, 1e-3), Phase("two", 3, 1e-3)), best_by=best_by)
    result, _ = run(config=config)
    assert [epoch for name, epoch in saved if name == BEST] == kept
    assert result.best == result.history[kept[-1] - 1]["val_accuracy"]


def test_the_learning_rate_rises_and_falls(run):
    rates = []

    class Rates(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            rates.append(float(self.model.optimizer.learning_rate))

    run(config=config_of(phases=(Phase("all", 4, 1e-2),), warm_up=0.25), callbacks=[Rates()])
    # Twelve steps, of which three rise from 0.
    np.testing.assert_allclose(rates[:4], [0, 1e-2 / 3, 2e-2 / 3, 1e-2], rtol=1e-5)
    np.testing.assert_allclose(
        rates[3:], 1e-2 * (1 + np.cos(np.pi * np.arange(9) / 9)) / 2, rtol=1e-4
    )


def test_the_average_is_evaluated_and_the_own_weights_come_back(run):
    _, model = run(config=config_of(phases=PHASES[:1]), callbacks=())
    optimizer = model.optimizer
    average = optimizer._model_variables_moving_average[0]
    variable = model.trainable_variables[0]
    variable.assign(variable + 1)
    own = keras.ops.convert_to_numpy(variable)
    with averaged_weights(model):
        np.testing.assert_array_equal(variable, average)
    np.testing.assert_array_equal(variable, own)


def test_half_precision_scales_the_loss_and_saves_float32(tmp_path):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = toy.toy_model()
    finally:
        keras.config.set_dtype_policy(before)
    saved_as = toy.toy_model()
    training, validation = toy.colour_images().split(1 / 3, seed=0)
    config = config_of(phases=(Phase("all", 2, 1e-2),), mixed_precision="float16")
    result = train(model, training, validation, tmp_path, config, saved_as=saved_as)
    assert "LossScale" in type(model.optimizer).__name__
    assert len(result.history) == 2
    last = keras.models.load_model(tmp_path / LAST)
    assert {layer.compute_dtype for layer in last.layers} == {"float32"}
    for weight, twin in zip(last.get_weights(), model.get_weights(), strict=True):
        assert weight.dtype == np.float32
        np.testing.assert_array_equal(weight, twin)


# What goes wrong


def poison(model):
    variable = model.get_layer("predictions").bias
    variable.assign(variable * np.nan)


def test_a_loss_that_is_no_number_ends_it_at_the_last_good_state(run):
    config, poisoned = config_of(checkpoint_steps=1), []

    def act(model):
        poisoned.append(model)
        poison(model)

    with pytest.raises(
        NonFiniteLossError,
        match="loss became nan in step 3 of epoch 1 of 'stages'. The last good state, "
        "after 0 epochs and 1 steps .*lower learning rate",
    ):
        run(config=config, callbacks=[At(5, act)])
    position = read_position(run.folder() / CHECKPOINT)
    assert (position.phase, position.epoch, position.step) == (1, 0, 1)
    assert all(np.all(np.isfinite(weight)) for weight in poisoned[0].get_weights())
    with np.load(run.folder() / CHECKPOINT) as file:
        arrays = [file[name] for name in file if file[name].dtype.kind == "f"]
    assert len(arrays) > 10 and all(np.all(np.isfinite(array)) for array in arrays)


def test_a_last_update_that_is_no_number_does_not_pass_for_an_end(run):
    with pytest.raises(NonFiniteLossError, match="step 3 of epoch 1 of 'head'"):
        run(config=config_of(phases=PHASES[:1]), callbacks=[At(3, poison)])


class Hiding(Replicas):
    """Hides what goes wrong in a batch behind an error of its own, as TensorFlow does."""

    def feed(self, produce, size, targets, batch_size):
        try:
            yield from produce(slice(None))
        except ValueError as error:
            raise RuntimeError("PyFunction failed") from error


@pytest.mark.parametrize("replicas", [None, Hiding()])
def test_what_goes_wrong_in_a_batch_is_raised_as_it_is(run, monkeypatch, replicas):
    images = toy.colour_images()

    def read(self, number):
        raise OSError("gone")

    monkeypatch.setattr(type(images), "read", read)
    with pytest.raises(ValueError, match="None of the 8 images of a batch can be read"):
        run(images=images, replicas=replicas)


class Told(Observer):
    def __init__(self):
        self.events = []

    def began(self, phase, steps, position):
        self.events.append((phase.name, steps))

    def stepped(self, phase, epoch, step, steps, loss):
        self.events.append((epoch, step))

    def finished_epoch(self, history):
        self.events.append(len(history))


def test_the_observer_is_told_everything_in_order(run):
    told = Told()
    run(observer=told)
    epoch = [(1, 1), (1, 2), (1, 3)]
    second = [(2, step) for _, step in epoch]
    assert told.events == [("head", 3), *epoch, 1, ("stages", 3), *epoch, 2, *second, 3]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"phases": ()}, "one or more phases"),
        ({"phases": (PHASES[0], PHASES[0])}, "each with a name of its own"),
        ({"batch_size": 0}, "`batch_size` must be at least 1. Received: 0"),
        ({"warm_up": 1}, "`warm_up`"),
        ({"label_smoothing": 1}, "`label_smoothing`"),
        ({"teacher_weight": 1.1}, "`teacher_weight` must be in 0..1"),
        ({"teacher_temperature": 0.0}, "`teacher_temperature` must be positive"),
        ({"ema": 1.0}, "`ema`"),
        ({"class_weights": "some"}, "`class_weights` must be one of"),
        ({"best_by": "loss"}, "`best_by` must be one of"),
        ({"mixed_precision": "float8"}, "`mixed_precision`"),
        ({"checkpoint_steps": 0}, "`checkpoint_steps`"),
    ],
)
def test_configs_refuse_what_is_not_allowed(values, message):
    with pytest.raises(ValueError, match=message):
        config_of(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0, 1e-3), "`epochs` must be at least 1"),
        ((1, 0.0), "`learning_rate` must be positive"),
        ((1, 1e-3, "some"), "`frozen` must be 'all', the number of a stage, or None"),
    ],
)
def test_phases_refuse_what_is_not_allowed(values, message):
    with pytest.raises(ValueError, match=message):
        Phase("name", *values)


# A teacher


def test_a_teacher_takes_the_place_of_the_labels(run):
    keras.utils.set_random_seed(1)
    teacher = toy.toy_model()
    teacher.set_weights([0.1 * np.random.default_rng(2).normal(size=w.shape) + w for w in
                         teacher.get_weights()])  # fmt: skip
    before = [weight.copy() for weight in teacher.get_weights()]
    phases = (Phase("all", 8, 3e-2),)
    plain = AugmentationConfig(min_area=1.0, flip=False)
    images, _ = toy.colour_images().split(1 / 3, seed=0)
    batch = next(EvaluationBatches(images, 8).batches()).images
    wanted = teacher.predict(batch, verbose=0)
    distance = {}
    for share in (0.0, 1.0):
        config = config_of(
            phases=phases, augmentation=plain, ema=0.0, label_smoothing=0.0, teacher_weight=share
        )
        _, model = run(f"share {share}", config, teacher=teacher if share else None)
        distance[share] = abs(model.predict(batch, verbose=0) - wanted).mean()
    assert distance[1.0] < 0.5 * distance[0.0]
    for weight, twin in zip(teacher.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, twin)


def softmax(logits):
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("share", [0.0, 0.75, 1.0])
def test_the_loss_is_that_of_labels_and_teacher(share, temperature):
    rng = np.random.default_rng(0)
    of_teacher, of_student = rng.normal(size=(2, 6, 4)) * 2
    labels = np.eye(4)[rng.integers(0, 4, 6)]
    targets = np.concatenate([labels, softmax(of_teacher)], axis=1).astype("float32")

    def mean_loss(share, logits):
        found = loss_of(share, temperature, 0.0)(targets, softmax(logits).astype("float32"))
        return float(keras.ops.mean(found))

    found = mean_loss(share, of_student)
    plain = -(labels * np.log(softmax(of_student))).sum(axis=1).mean()
    soft, own = softmax(of_teacher / temperature), softmax(of_student / temperature)
    divergence = (soft * np.log(soft / own)).sum(axis=1).mean()
    expected = (1 - share) * plain + share * temperature**2 * divergence
    assert found == pytest.approx(expected, rel=1e-4)
    # It is least where the student does what the teacher does.
    best = mean_loss(1.0, of_teacher)
    assert best == pytest.approx(0, abs=1e-5) and divergence > 0.1


def test_accuracy_is_that_of_the_labels_and_the_cross_entropy_the_loss():
    labels = np.eye(3)[[0, 1]]
    wanted = np.array([[0.1, 0.8, 0.1], [0.2, 0.6, 0.2]])
    # One probability is too small for float32.
    outputs = np.array([[0.2, 0.8, 0.0], [0.1, 0.5, 0.4]])
    targets = np.concatenate([labels, wanted], axis=1).astype("float32")
    accuracy, cross_entropy = (
        float(metric(targets, outputs.astype("float32"))) for metric in metrics_of(0.5, 3.0)
    )
    assert accuracy == 0.5
    outputs = np.maximum(outputs, 1e-7)
    soft, own = (softmax(np.log(each) / 3) for each in (wanted, outputs))
    divergence = 9 * (soft * np.log(soft / own)).sum(axis=1)
    expected = 0.5 * divergence - 0.5 * (labels * np.log(outputs)).sum(axis=1)
    assert cross_entropy == pytest.approx(expected.mean(), rel=1e-4)


@pytest.mark.parametrize("share", [0.0, 0.75])
def test_the_losses_of_images_are_what_the_best_state_is_chosen_by(share, run):
    config = config_of(
        phases=(Phase("one", 1, 1e-2),), teacher_weight=share, teacher_temperature=2.0, ema=0.0
    )
    teacher = toy.toy_model() if share else None
    result, model = run(config=config, teacher=teacher)
    _, validation = toy.colour_images().split(1 / 3, seed=0)
    # The last batch is not full.
    batches = EvaluationBatches(validation, len(validation) - 1)
    losses = losses_of(model, teacher, batches, config)
    assert losses.shape == (len(validation),) and losses.std() > 0
    expected = result.history[-1]["val_cross_entropy"]
    np.testing.assert_allclose(losses.mean(), expected, rtol=1e-5)


@pytest.mark.parametrize(("share", "given"), [(0.5, False), (0.0, True)])
def test_a_teacher_and_its_weight_belong_together(run, share, given):
    teacher = toy.toy_model() if given else None
    with pytest.raises(ValueError, match="belong together.*Received: .* teacher, weight"):
        run(config=config_of(teacher_weight=share), teacher=teacher)
    assert not any(run.folder().iterdir())
