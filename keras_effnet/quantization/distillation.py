"""Distillation: a quantized model learns from its float model, without labels.

End to end, the loss is the divergence of the predicted classes, and of the features at the end of
each stage if asked for (Hinton et al., 2015, section 2, https://arxiv.org/abs/1503.02531; Romero et
al., 2014, section 2.1, https://arxiv.org/abs/1412.6550). Block-wise, one block after the other
learns to give the float model's features from what the quantized blocks before it give (Li et al.,
2021, section 3.2, https://arxiv.org/abs/2102.05426).
"""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Iterable
from typing import Any

import keras
import numpy as np
from keras import ops

from .averages import averaged_weights
from .boundaries import boundaries, quantized_tensor
from .build import build_model, in_float32
from .calibration import calibration_batches
from .checks import check_values
from .files import read_state, write_state
from .folding import fold
from .graph import Graph, read_model
from .lowering import is_quantized, read_quantized
from .training import require_quantized, settle, without_dropout

END_TO_END, BLOCK_WISE = "end_to_end", "block_wise"
MODES = (END_TO_END, BLOCK_WISE)
# Share of the steps in which the learning rate rises from 0: Adam's first steps are as long as all
# others, whatever the gradient.
WARM_UP = 0.1
# By default there are so many epochs that they make about so many steps, within the bounds.
_STEPS, _LEAST_EPOCHS, _MOST_EPOCHS = 400, 5, 20


@dataclasses.dataclass(frozen=True)
class DistillationConfig:
    """How a quantized model is distilled.

    Args:
        mode: "end_to_end", or "block_wise", which trains one block after the other and end to end
            no more.
        epochs: Most passes over the images (of each block, in block-wise mode), at least 1. By
            default as many as make about 400 steps, but at least 5 and at most 20.
        batch_size: Images of one step, at least 1.
        learning_rate: Largest one of Adam, positive. Weights are stored in units of their range:
            1e-4 is about 1/80 of a kernel's step.
        temperature: Divides the logits of both models, positive, in training and in the choice of
            the best state. At a larger one images count more of which the float model is sure.
        feature_weight: Weight of the squared error of the features at the end of each stage,
            relative to their energy, beside the divergence of the classes; 0 or more.
        validation_share: Share of the images that is held back to choose the best state, in (0, 1).
            Do not calibrate on them (`distillation.held_back`): the start, which is fitted to
            the calibration images, would seem better than it is.
            With `flip` their mirror images are measured too, with `mixup` also their blends.
        patience: Epochs without improvement until training stops, at least 1.
        shift: Most pixels by which an image is moved (edges repeat), at least 0.
        flip: Whether every other image is mirrored.
        mixup: Each image is blended with another one by a part drawn from Beta(mixup, mixup); 0 for
            none, 1 for any part alike. The float model tells what to make of them, and they show
            more of it than the photographs alone do (Beyer et al., 2021, section 3.1,
            https://arxiv.org/abs/2106.05237).
        ema: Momentum of a moving average of the weights, which is then measured and kept, in
            [0, 1); 0 for none.
        seed: Of the split, the order and the augmentation.

    Raises:
        ValueError: If a value is not allowed.
    """

    mode: str = END_TO_END
    epochs: int | None = None
    batch_size: int = 16
    learning_rate: float = 3e-5
    temperature: float = 1.0
    feature_weight: float = 0.0
    validation_share: float = 0.2
    patience: int = 10
    shift: int = 8
    flip: bool = True
    mixup: float = 1.0
    ema: float = 0.95
    seed: int = 0

    def __post_init__(self):
        check_values(
            self,
            mode=(self.mode in MODES, f"one of {MODES}"),
            epochs=(self.epochs is None or self.epochs >= 1, "at least 1"),
            batch_size=(self.batch_size >= 1, "at least 1"),
            learning_rate=(0 < self.learning_rate < np.inf, "positive"),
            temperature=(0 < self.temperature < np.inf, "positive"),
            feature_weight=(0 <= self.feature_weight < np.inf, "at least 0"),
            validation_share=(0 < self.validation_share < 1, "between 0 and 1"),
            patience=(self.patience >= 1, "at least 1"),
            shift=(self.shift >= 0, "at least 0"),
            mixup=(0 <= self.mixup < np.inf, "at least 0"),
            ema=(0 <= self.ema < 1, "in [0, 1)"),
        )


@dataclasses.dataclass
class Distillation:
    """What `distill` did.

    Attributes:
        before: Mean KL divergence (nats) from the float model, at the temperature, on what is held
            back (see `validation_share`), at the start.
        after: The same of the state that was kept.
        epochs: The same after each epoch, or block.
        kept: Number of the epoch, or block, whose state was kept; 0 is the start, which is kept
            where no state was better by more than chance makes it.
        interrupted: Whether Ctrl-C ended it.
    """

    before: float
    after: float
    epochs: list[float] = dataclasses.field(default_factory=list)
    kept: int = 0
    interrupted: bool = False


def distill(
    float_model: keras.Model,
    quantized_model: keras.Model,
    images: np.ndarray | Iterable,
    config: DistillationConfig | None = None,
    verbose: bool | int = True,
    checkpoint: str | os.PathLike | None = None,
) -> Distillation:
    """Trains a quantized model, in place, to predict what its float model predicts.

    After every epoch the settled model (`settle`) is measured on held-back images, and the best
    state is kept, if it is better than the start by more than chance makes it (`is_better`). Else
    the start is: the model never gets worse on those images. Ctrl-C ends the training and keeps
    the best state so far.

    With a `checkpoint`, the same call goes on where an earlier one, killed or interrupted, ended
    its last epoch, and reaches the same weights bit for bit where the backend repeats itself.

    Args:
        float_model: The teacher: the model that was quantized, or another one with the same input
            and classes, for end-to-end distillation without features. It is not changed.
        quantized_model: The student, from `quantize_model`.
        images: Unlabelled images as the models take them: an array (images, height, width,
            channels), or an iterable of batches. They are kept in memory, pixels in 8 bits. At
            least 2.
        config: How to distill; by default `DistillationConfig()`.
        verbose: Progress as in `fit`: 0 shows none, 1 a bar, 2 a line for each epoch. `loss` is
            the mean of the epoch's steps; `held_back`, end to end, the divergence of the held-back
            images.
        checkpoint: File to keep the state in after every epoch (about five times the weights).
            If it exists, the distillation that it is of goes on: `quantized_model` must be as it
            was when that one began. By default nothing is written.

    Returns:
        The divergences before, during and after.

    Raises:
        TypeError: If a model is no Functional model, or the images are of the wrong type.
        ValueError: If a model is of the wrong kind, the shapes differ, the models have no common
            features, the images are unusable or too few, the loss is not finite (the best state
            is restored and the step named), or the checkpoint is damaged or of a distillation of
            other models, images or settings (they are named).
        OSError: If the checkpoint cannot be written.
    """
    config = DistillationConfig() if config is None else config
    require_quantized(quantized_model, "`quantized_model` of `distill`")
    if is_quantized(float_model):
        raise ValueError(
            "`float_model` must be the float model. Received the quantized model "
            f"{float_model.name!r}; pass the model that it was made of."
        )
    teacher = read_model(float_model, ())
    _check_shapes(float_model, quantized_model)
    batches, _ = calibration_batches(images, teacher, config.batch_size, minimum=2)
    images = np.concatenate([_compact(batch) for batch in batches])
    fold(teacher)
    student = read_quantized(quantized_model)
    held, used, rng = _split(len(images), config)
    begun = {
        "config": dataclasses.asdict(config),
        "float_model": _fingerprint(*float_model.get_weights()),
        "quantized_model": _fingerprint(*quantized_model.get_weights()),
        "images": _fingerprint(images),
    }
    run = _Run(teacher, student, quantized_model, images, held, used, config, rng)
    run.keep_in(checkpoint, begun)
    with without_dropout(quantized_model):
        return run.train(verbose)


def held_back(count: int, config: DistillationConfig) -> np.ndarray:
    """Returns the numbers of the images, of `count`, that `distill` holds back."""
    return _split(count, config)[0]


def _split(count, config):
    rng = np.random.default_rng(config.seed)
    order = rng.permutation(count)
    held = min(count - 1, max(1, round(config.validation_share * count)))
    return order[:held], order[held:], rng


def _check_shapes(float_model, quantized_model):
    shapes = [(m.input_shape[1:], m.output_shape[1:]) for m in (float_model, quantized_model)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            "The models must have equal input and output shapes. Received: "
            f"{shapes[0]} (float) and {shapes[1]} (quantized); pass the pair of one quantization."
        )


def _fingerprint(*arrays) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _compact(batch):
    pixels = batch.astype(np.uint8)
    return pixels if np.array_equal(pixels, batch) else batch


def _stage_ends(teacher: Graph, names: list[str]) -> list[str]:
    """Returns the last of the boundaries at each resolution."""
    return list({teacher[name].shape[:-1]: name for name in names}.values())


def _logits(graph: Graph) -> str:
    """Returns the tensor from which softmax or sigmoid makes the output, or the output."""
    output = graph[graph.outputs[0]]
    return output.inputs[0] if output.op in ("softmax", "sigmoid") else output.name


def divergence(target, output, temperature: float):
    """Returns the divergence of each image's classes (nats) between logits of shape (n, classes).

    Its gradient is as large at any temperature as at 1.
    """
    target, output = (
        ops.log_softmax(ops.cast(logits, "float32") / temperature, axis=-1)
        for logits in (target, output)
    )
    return temperature**2 * ops.sum(ops.exp(target) * (target - output), axis=-1)


def _relative_error(target, output):
    """Squared error of each image, relative to the energy of the batch."""
    target, output = ops.cast(target, "float32"), ops.cast(output, "float32")
    energy = ops.maximum(ops.mean(ops.square(target)), 1e-12)
    axes = tuple(range(1, len(target.shape)))
    return ops.mean(ops.square(output - target), axis=axes) / energy


def is_better(before: np.ndarray, after: np.ndarray) -> bool:
    """Returns whether losses fell by more than the standard error of their mean difference.

    Of two states that held-back images do not tell apart, the one that was not chosen by them is
    the safer one (Breiman et al., 1984, Classification and Regression Trees, section 3.4.3).

    Args:
        before: Losses of the same independent images, shape (images,).
        after: The same afterwards.
    """
    gains = np.asarray(before, np.float64) - np.asarray(after, np.float64)
    # One image alone has no spread: it tells nothing.
    return len(gains) > 1 and bool(gains.mean() > gains.std(ddof=1) / np.sqrt(len(gains)))


class _Run:
    """One distillation."""

    def __init__(self, teacher, student, model, images, held, used, config, rng):
        self.teacher, self.model, self.images = teacher, model, images
        self.config, self.rng, self.used = config, rng, used
        self.steps = -(-len(used) // config.batch_size)
        epochs = min(max(round(_STEPS / self.steps), _LEAST_EPOCHS), _MOST_EPOCHS)
        self.epochs = epochs if config.epochs is None else config.epochs
        self.boundaries = boundaries(teacher, student)
        if not self.boundaries and (config.mode == BLOCK_WISE or config.feature_weight):
            raise ValueError(
                f"The models {teacher.name!r} and {model.name!r} have no tensors between blocks in "
                'common; distill with mode="end_to_end" and feature_weight=0.'
            )
        self.names = _logits(teacher), _logits(student)
        self.held, self.views = len(held), self._views(images[held])
        # The scores before they are rounded: the range of a classifier's scores ends where larger
        # ones change no probability, but a temperature brings what lies beyond into the divergence.
        self.scores = model.get_layer(self.names[1]).output
        self.output = keras.Model(model.inputs[0], self.scores)
        # A single output comes without its list.
        self.wanted = self._observed([self.names[0]]).predict(
            self.views, config.batch_size, verbose=0
        )
        # The temperature of the training: at 1 the few doubtful images would choose the best state.
        self.measure = _relative_error
        if self.wanted.ndim == 2:
            self.measure = functools.partial(divergence, temperature=config.temperature)
        # Distances of the held-back images and weights: of the start, and of the best state.
        self.start = self.best = self._settled()
        before = float(self.start[0].mean())
        self.result = Distillation(before, before)
        # Finished blocks; finished epochs of the block after them, and those without improvement.
        self.position = {"block": 0, "epoch": 0, "waited": 0}
        self.checkpoint = None
        self.optimizer_state: list[np.ndarray] = []

    def keep_in(self, path: str | os.PathLike | None, begun: dict[str, Any]) -> None:
        """Names the file of the state, and goes on with the state in it."""
        self.checkpoint, self.begun = path, begun
        if path is None:
            return
        if not os.path.exists(path):
            self._save()
            return
        arrays, facts = read_state(path)
        wrong = [key for key in begun if facts.get("begun", {}).get(key) != begun[key]]
        if wrong:
            raise ValueError(
                f"The checkpoint {str(path)!r} belongs to a distillation with another "
                f"{', '.join(wrong)}. Go on with the same, or name another file."
            )
        self.used, distances, *arrays = arrays
        count = len(self.model.weights)
        self.model.set_weights(arrays[:count])
        self.best = distances, arrays[count : 2 * count]
        self.optimizer_state = arrays[2 * count :]
        self.position = facts["position"]
        self.result = Distillation(**facts["result"])
        self.rng.bit_generator.state = facts["random"]

    def _save(self, trainer=None):
        """Writes the state: of the optimizer too, in the middle of a block."""
        if self.checkpoint is None:
            return
        optimizer = [] if trainer is None else trainer.optimizer.variables
        distances, best = self.best
        arrays = [self.used, distances, *self.model.get_weights(), *best]
        facts = {
            "begun": self.begun,
            "position": self.position,
            "result": dataclasses.asdict(self.result),
            "random": self.rng.bit_generator.state,
        }
        arrays += [ops.convert_to_numpy(variable) for variable in optimizer]
        write_state(self.checkpoint, arrays, facts)

    def train(self, verbose: int) -> Distillation:
        """Trains, and leaves the best state in the model."""
        try:
            if self.config.mode == END_TO_END:
                self._end_to_end(verbose)
            else:
                self._block_wise(verbose)
        except KeyboardInterrupt:
            self.result.interrupted = True
        finally:
            if not is_better(self.start[0], self.best[0]):
                self.best = self.start
                self.result.after, self.result.kept = self.result.before, 0
            self.model.set_weights(self.best[1])
        return self.result

    def _end_to_end(self, verbose):
        config = self.config
        ends = _stage_ends(self.teacher, self.boundaries) if config.feature_weight else []
        teacher = self._observed([self.names[0], *ends])
        tensors = [self.scores, *(quantized_tensor(self.model, name) for name in ends)]
        trainer = keras.Model(self.model.inputs[0], tensors)
        losses = [self.measure] + [_relative_error] * len(ends)
        weights = [1.0] + [config.feature_weight / max(len(ends), 1)] * len(ends)
        self._compile(trainer, losses, weights)
        position = self.position
        while position["epoch"] < self.epochs and position["waited"] < config.patience:
            bar, loss = self._epoch(verbose, trainer, lambda batch: batch, teacher)
            position["waited"] = 0 if self._keep_if_better(trainer) else position["waited"] + 1
            values = [("loss", loss), ("held_back", self.result.epochs[-1])]
            bar.update(self.steps, values, finalize=True)
            position["epoch"] += 1
            self._save(trainer)

    def _block_wise(self, verbose):
        position, ends = self.position, (*self.boundaries, None)
        for block in range(position["block"], len(ends)):
            start, end = ends[block - 1] if block else None, ends[block]
            name, own = (end, end) if end else self.names
            output = quantized_tensor(self.model, own)
            if start is None:
                trainer = keras.Model(self.model.inputs[0], output)
                entering = lambda batch: batch  # noqa: E731
            else:
                entrance = quantized_tensor(self.model, start)
                trainer = keras.Model(entrance, output)
                entering = keras.Model(self.model.inputs[0], entrance).predict_on_batch
            self._compile(trainer, [_relative_error], [1.0])
            teacher = self._observed([name])
            while position["epoch"] < self.epochs:
                bar, loss = self._epoch(verbose, trainer, entering, teacher)
                bar.update(self.steps, [("loss", loss)], finalize=True)
                position["epoch"] += 1
                if position["epoch"] < self.epochs:
                    self._save(trainer)
            self._keep_if_better(trainer)
            self.model.set_weights(self.best[1])
            position.update(block=block + 1, epoch=0)
            self._save()

    def _compile(self, trainer, losses, weights):
        config = self.config
        steps = self.steps * self.epochs
        schedule = keras.optimizers.schedules.CosineDecay(
            0.0,
            max(1, steps - int(WARM_UP * steps)),
            warmup_target=config.learning_rate,
            warmup_steps=int(WARM_UP * steps),
        )
        trainer.compile(
            keras.optimizers.Adam(
                schedule if int(WARM_UP * steps) else config.learning_rate,
                use_ema=config.ema > 0,
                ema_momentum=config.ema or 0.99,
            ),
            loss=losses,
            loss_weights=weights,
            # XLA would compile for longer than a short distillation takes.
            jit_compile=False if keras.backend.backend() == "tensorflow" else "auto",
        )
        if self.optimizer_state:
            trainer.optimizer.build(trainer.trainable_variables)
            for variable, value in zip(
                trainer.optimizer.variables, self.optimizer_state, strict=True
            ):
                variable.assign(value)
            self.optimizer_state = []

    def _epoch(self, verbose, trainer, entering, teacher):
        """Trains on all images once; returns the bar, not finished, and the mean loss of a step."""
        config, epoch = self.config, len(self.result.epochs) + 1
        bar, losses = keras.utils.Progbar(self.steps, verbose=int(verbose)), []
        self.rng.shuffle(self.used)
        for step in range(self.steps):
            chosen = self.used[step * config.batch_size : (step + 1) * config.batch_size]
            batch = self._augment(self.images[chosen].astype(np.float32))
            targets = teacher.predict_on_batch(batch)
            logs = trainer.train_on_batch(entering(batch), targets, return_dict=True)
            loss = float(logs["loss"])
            if not np.isfinite(loss):
                raise ValueError(
                    f"The loss must be finite. Received: {loss} in step {step + 1} of epoch "
                    f"{epoch}. The best state was restored; lower `learning_rate`."
                )
            losses.append(loss)
            bar.update(step + 1, [("loss", loss)], finalize=False)
        # The bar shows means until it is finished, and then what it is given last.
        return bar, np.mean(losses)

    def _views(self, images):
        """Returns images to measure with, and what the training makes of such images.

        Few images have few doubtful ones, on which almost all of the divergence lies: with 40
        images it is one or two, and the best state by them is one by chance.
        """
        views = [images]
        if self.config.flip:
            views.append(images[:, :, ::-1])
        if self.config.mixup:
            halves = np.float32(0.5) * images
            views.append((halves + np.roll(halves, 1, axis=0)).astype(images.dtype))
        return np.concatenate(views)

    def _augment(self, batch):
        shift = self.config.shift
        height, width = batch.shape[1:3]
        padded = np.pad(batch, ((0, 0), (shift, shift), (shift, shift), (0, 0)), mode="edge")
        for index, image in enumerate(padded):
            top, left = self.rng.integers(0, 2 * shift + 1, 2)
            crop = image[top : top + height, left : left + width]
            mirrored = self.config.flip and self.rng.random() < 0.5
            batch[index] = crop[:, ::-1] if mirrored else crop
        if self.config.mixup:
            parts = self.rng.beta(self.config.mixup, self.config.mixup, (len(batch), 1, 1, 1))
            parts = parts.astype(np.float32)
            batch = (1 - parts) * batch + parts * batch[::-1]
        return batch

    def _keep_if_better(self, trainer) -> bool:
        """Measures the settled model, and keeps it if it is the best so far."""
        with averaged_weights(trainer):
            state = self._settled()
        result = self.result
        result.epochs.append(float(state[0].mean()))
        better = result.epochs[-1] < result.after
        if better:
            result.after, result.kept, self.best = result.epochs[-1], len(result.epochs), state
        return better

    def _settled(self) -> tuple[np.ndarray, list[np.ndarray]]:
        """Returns the distances of the held-back images and the weights of the settled model."""
        trained = self.model.get_weights()
        try:
            settle(self.model)
            output = self.output.predict(self.views, self.config.batch_size, verbose=0)
            distances = ops.convert_to_numpy(self.measure(self.wanted, output))
            # The views of one image are not independent.
            distances = distances.reshape(-1, self.held).mean(axis=0)
            return distances, self.model.get_weights()
        finally:
            self.model.set_weights(trained)

    @in_float32()
    def _observed(self, names):
        return build_model(self.teacher, quantized=False, observed=tuple(names))
