"""The training loop: phases, epochs, steps, checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import keras

from keras_effnet.builder import deep_graphs
from keras_effnet.models import freeze, freeze_batch_norms
from keras_effnet.quantization.averages import averaged_weights, use_averages
from keras_effnet.quantization.files import whole
from keras_effnet.training.batches import Batch, EvaluationBatches, Images, TrainingBatches
from keras_effnet.training.checkpoint import (
    Position,
    is_finite,
    read_position,
    restore_checkpoint,
    save_checkpoint,
)
from keras_effnet.training.config import Phase, TrainingConfig
from keras_effnet.training.interruption import Interruption, interruptible
from keras_effnet.training.replicas import Replicas
from keras_effnet.training.teaching import loss_of, metrics_of, taught
from keras_effnet.weights import finalize_normalization

CHECKPOINT, BEST, LAST = "checkpoint.npz", "best.keras", "last.keras"


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite; the message tells where."""


class Observer:
    """Is told what a training does; this one ignores it.

    Every method is called between two steps.
    """

    def began(self, phase: Phase, steps: int, position: Position) -> None:
        """A phase begins, or is gone on with; `steps` make an epoch."""

    def stepped(self, phase: Phase, epoch: int, step: int, steps: int, loss: float) -> None:
        """A step is finished; epoch and step count from 1, the loss is the epoch's mean so far."""

    def finished_epoch(self, history: list[dict[str, Any]]) -> None:
        """An epoch is finished; its row is the last one."""

    def skipped(self, name: str, reason: str) -> None:
        """An image could not be read, for the first time. May come from another thread."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What a training did.

    Args:
        history: One row for each epoch: phase, epoch (from 1), steps (of all epochs so far),
            learning_rate (at its end), loss, accuracy, val_accuracy, val_cross_entropy, seconds.
        best: Validation accuracy of the best state, in 0..1.
        unreadable: Images that could not be read, and why.
        interrupted: Whether it was asked to stop before its end; a checkpoint was written.
    """

    history: list[dict[str, Any]]
    best: float
    unreadable: dict[str, str]
    interrupted: bool


def train(
    model: keras.Model,
    training: Images,
    validation: Images,
    folder: Path,
    config: TrainingConfig,
    *,
    saved_as: keras.Model,
    replicas: Replicas | None = None,
    teacher: keras.Model | None = None,
    resume: bool = False,
    observer: Observer | None = None,
    callbacks: Sequence[keras.callbacks.Callback] = (),
) -> Result:
    """Trains a classifier and keeps its best state.

    After every epoch and every `config.checkpoint_steps` steps `folder/checkpoint.npz` is
    replaced. A training that is resumed from it goes on exactly where it stood: on one TensorFlow
    device with the same bits. The best state on the validation images is kept as
    `folder/best.keras`, the state at the end as `folder/last.keras`.

    Args:
        model: Outputs probabilities, `(batch, classes)`; trained in place. Made in the scope of
            the replicas.
        training: Images to train on.
        validation: Images to choose the best state by.
        folder: To write into; it exists.
        config: How to train.
        saved_as: A model of the same weights, in float32, in which states are saved.
        replicas: The devices; one by default.
        teacher: A model of the same input and classes, whose probabilities are learned beside the
            labels, with the weight `config.teacher_weight`. It sees the images as they were varied,
            and is not changed.
        resume: Whether to go on from the folder's checkpoint.
        observer: Is told of the progress.
        callbacks: Keras callbacks: called at the beginning and end of each phase, of epochs
            (counted over all phases; the row of the history as logs) and of steps.

    Returns:
        What was done.

    Raises:
        FileNotFoundError: If there is no checkpoint to resume from.
        ValueError: If the batch size does not suit the images or the devices, a teacher comes
            without a weight or a weight without a teacher, a checkpoint does not fit, or an image
            cannot be read and `config.strict`.
        NonFiniteLossError: If the loss is not finite. The model is put back to the last
            checkpoint.
    """
    replicas = replicas or Replicas()
    observer = observer or Observer()
    replicas.check_batch_size(config.batch_size)
    if (teacher is None) != (config.teacher_weight == 0):
        raise ValueError(
            "A teacher and its weight belong together: pass both, `teacher` and "
            "`config.teacher_weight` above 0, or neither. Received: "
            f"{'no' if teacher is None else 'a'} teacher, weight {config.teacher_weight:g}"
        )
    position = read_position(folder / CHECKPOINT) if resume else Position()
    run = _Run(model, saved_as, teacher, folder, config, replicas, observer, position)
    run.open(training, validation)
    interrupted = False
    # Of several processes all must stop at the same step, which a signal to one cannot tell.
    alone = not replicas.several_processes
    with interruptible() if alone else contextlib.nullcontext(Interruption()) as interruption:
        for index in range(position.phase, len(config.phases)):
            run.begin(index, resume, callbacks)
            resume = False
            interrupted = not run.phase(lambda: interruption.asked)
            if interrupted:
                break
    if not interrupted:
        run.save_model(LAST)
    best = max(position.history, key=run.merit, default={"val_accuracy": -1.0})["val_accuracy"]
    return Result(position.history, best, dict(position.unreadable), interrupted)


class _Run:
    def __init__(
        self, model, saved_as, teacher, folder, config, replicas, observer, position
    ) -> None:
        self.model, self.saved_as, self.teacher = model, saved_as, teacher
        self.folder, self.config = folder, config
        self.replicas, self.observer, self.position = replicas, observer, position

    def open(self, training: Images, validation: Images) -> None:
        self.batches = TrainingBatches(
            training, self.config, self.position.unreadable, self.observer.skipped
        )
        self.validation = EvaluationBatches(validation, self.config.batch_size)
        self.replicas.adapt(self.model)
        self.trainable = {layer: layer.trainable for layer in self.model.layers}

    def begin(self, index: int, resume: bool, callbacks: Sequence[Any]) -> None:
        """Makes everything ready for a phase."""
        phase, position = self.config.phases[index], self.position
        if not resume:
            position.phase, position.epoch, position.step, position.sums = index, 0, 0, {}
        self._freeze(phase)
        keras.utils.set_random_seed(self.config.seed + index)
        with self.replicas.scope():
            compile_model(self.model, self.config, phase, self.batches.steps)
            self.model.optimizer.build(self.model.trainable_variables)
        if resume:
            restore_checkpoint(self.folder / CHECKPOINT, self.model)
        else:
            # So that there is always a good state to go back to.
            self._save_checkpoint()
        self.callbacks = keras.callbacks.CallbackList(
            list(callbacks), model=self.model, epochs=phase.epochs, steps=self.batches.steps
        )
        self.callbacks.on_train_begin()
        self.observer.began(phase, self.batches.steps, position)

    def _freeze(self, phase: Phase) -> None:
        # Layer by layer: on TensorFlow, Keras 3.15 does not hand on what the model is set to.
        for layer, trainable in self.trainable.items():
            layer.trainable = trainable
        if phase.frozen == "all":
            freeze(self.model)
        elif phase.frozen is not None:
            freeze(self.model, phase.frozen)
        if phase.freeze_batch_norms:
            freeze_batch_norms(self.model)

    def phase(self, stop: Callable[[], bool]) -> bool:
        """Trains until the phase ends, or until `stop()`; returns whether it ended."""
        phase, position = self.config.phases[self.position.phase], self.position
        while position.epoch < phase.epochs:
            if not self._epoch(phase, stop):
                return False
            if not is_finite(self.model):
                # The last step's loss was finite, and its update was not.
                self._fail(phase, position.step - 1, math.nan)
            with averaged_weights(self.model):
                figures = self._evaluate()
                if all(self.merit(figures) > self.merit(row) for row in position.history):
                    self.save_model(BEST)
            self._finish_epoch(phase, figures)
            if stop():
                return False
        self.callbacks.on_train_end()
        # What comes after begins with the average.
        use_averages(self.model)
        return True

    def merit(self, row: dict[str, Any]) -> tuple[float, ...]:
        """What is larger for a better epoch."""
        merits = (row["val_accuracy"], -row["val_cross_entropy"])
        return merits if self.config.best_by == "accuracy" else merits[1:]

    def _epoch(self, phase: Phase, stop: Callable[[], bool]) -> bool:
        position, steps = self.position, self.batches.steps
        self.started = time.perf_counter()
        self.callbacks.on_epoch_begin(len(position.history))

        def produce(rows: slice) -> Iterator[Batch]:
            return self._taught(self.batches.epoch(position.phase, epoch, rows, first))

        epoch, first = position.epoch, position.step
        with self._own_errors(self.batches):
            fed = self._feed(produce, self.batches.images)
            for step in range(first, steps):
                batch = next(fed)
                self.callbacks.on_train_batch_begin(step)
                logs = self.replicas.train(self.model, batch)
                if not math.isfinite(logs["loss"]):
                    self._fail(phase, step, logs["loss"])
                for name in ("loss", "accuracy"):
                    position.sums[name] = position.sums.get(name, 0.0) + logs[name]
                position.step = step + 1
                self.callbacks.on_train_batch_end(step, logs)
                mean = position.sums["loss"] / position.step
                self.observer.stepped(phase, epoch + 1, step + 1, steps, mean)
                if stop():
                    self._save_checkpoint()
                    return False
                if position.step % self.config.checkpoint_steps == 0 and position.step < steps:
                    self._save_checkpoint()
        return True

    def _feed(self, produce: Callable[[slice], Iterator[Batch]], images: Images) -> Iterator[Any]:
        targets = images.classes * (1 if self.teacher is None else 2)
        return self.replicas.feed(produce, images.size, targets, self.config.batch_size)

    def _taught(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        return batches if self.teacher is None else (taught(self.teacher, each) for each in batches)

    def _finish_epoch(self, phase: Phase, figures: dict[str, float]) -> None:
        position, steps = self.position, self.batches.steps
        row = {
            "phase": phase.name,
            "epoch": position.epoch + 1,
            "steps": len(position.history) * steps + steps,
            "learning_rate": float(self.model.optimizer.learning_rate),
            **{name: total / steps for name, total in position.sums.items()},
            **figures,
            # Of the part since it was started or resumed.
            "seconds": round(time.perf_counter() - self.started, 2),
        }
        figures = {name: value for name, value in row.items() if isinstance(value, float)}
        self.callbacks.on_epoch_end(len(position.history), figures)
        position.history.append(row)
        position.epoch, position.step, position.sums = position.epoch + 1, 0, {}
        self._save_checkpoint()
        self.observer.finished_epoch(position.history)

    def _evaluate(self) -> dict[str, float]:
        with self._own_errors(self.validation):
            fed = self._feed(
                lambda rows: self._taught(self.validation.batches(rows)), self.validation.images
            )
            steps = range(self.validation.steps)
            figures = self.replicas.test(self.model, (next(fed) for _ in steps))
        return {f"val_{name}": value for name, value in figures.items()}

    @contextlib.contextmanager
    def _own_errors(self, batches: TrainingBatches | EvaluationBatches) -> Iterator[None]:
        """Raises what went wrong in a batch, not what TensorFlow makes of it."""
        try:
            yield
        except Exception as error:
            if batches.error is not None and batches.error is not error:
                raise batches.error from error
            raise

    def _save_checkpoint(self) -> None:
        if is_finite(self.model):
            path = self.folder / CHECKPOINT
            save_checkpoint(path, self.model, self.position, self.replicas.writes)

    def save_model(self, name: str) -> None:
        """Saves the weights as they are."""
        weights = self.model.get_weights()
        if not self.replicas.writes:
            return
        self.saved_as.set_weights(weights)
        finalize_normalization(self.saved_as)
        with whole(self.folder / name) as temporary, deep_graphs():
            self.saved_as.save(temporary)

    def _fail(self, phase: Phase, step: int, loss: float) -> None:
        epoch = self.position.epoch + 1
        where = f"The loss became {loss} in step {step + 1} of epoch {epoch} of {phase.name!r}."
        path = self.folder / CHECKPOINT
        if not self.replicas.writes and not path.is_file():
            raise NonFiniteLossError(f"{where} The first process keeps the last good state.")
        good = read_position(path)
        restore_checkpoint(path, self.model)
        raise NonFiniteLossError(
            f"{where} The last good state, after {good.epoch} epochs and {good.step} steps "
            f"of this phase, is kept in {str(path)!r}. Train again with a lower learning rate"
            + (", or without float16." if self.config.mixed_precision == "float16" else ".")
        )


def compile_model(model: keras.Model, config: TrainingConfig, phase: Phase, steps: int) -> None:
    """Compiles a model for a phase.

    Args:
        model: Outputs probabilities.
        config: Of the training.
        phase: Of it.
        steps: In an epoch.
    """
    total = steps * phase.epochs
    warm_up = int(config.warm_up * total)
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0 if warm_up else phase.learning_rate,
        max(1, total - warm_up),
        warmup_target=phase.learning_rate if warm_up else None,
        warmup_steps=warm_up,
    )
    optimizer = keras.optimizers.AdamW(
        schedule,
        weight_decay=config.weight_decay,
        use_ema=config.ema > 0,
        ema_momentum=config.ema or 0.99,
    )
    optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    if config.teacher_weight:
        loss = loss_of(config.teacher_weight, config.teacher_temperature, config.label_smoothing)
        metrics = metrics_of(config.teacher_weight, config.teacher_temperature)
    else:
        loss = keras.losses.CategoricalCrossentropy(label_smoothing=config.label_smoothing)
        metrics = [
            keras.metrics.CategoricalAccuracy(name="accuracy"),
            keras.metrics.CategoricalCrossentropy(name="cross_entropy"),
        ]
    model.compile(
        optimizer,
        loss=loss,
        weighted_metrics=metrics,
        # Elsewhere than on JAX, compiling takes longer than many fine-tunings.
        jit_compile=keras.backend.backend() == "jax",
    )
