"""fine-tune a variant on your own photographs

First the classifier alone is trained, then the upper stages with it, each with a warm-up and a
cosine schedule. The state that is best on the validation images is kept as best.keras. Ctrl-C
leaves a checkpoint; the same command with --resume goes on from it. Runs on the backend that
KERAS_BACKEND names (tensorflow, jax or torch).

examples:
  keras-effnet train --model EfficientNetV2B0 --train-data photos/train \\
      --validation-data photos/validation --output-dir run
  keras-effnet train --model EfficientNetB0 --train-data photos --rand-augment 2 --mixup 0.2 \\
      --ema 0.999 --output-dir run
  keras-effnet train --model EfficientNetB0 --train-data photos --rand-augment 2 --mixup 0.2 \\
      --ema 0.999 --output-dir run --resume
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import shlex
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keras_effnet.cli import common, opening
from keras_effnet.cli.common import UsageError
from keras_effnet.cli.tables import text_table
from keras_effnet.specs import ModelSpec, PreprocessingSpec, get_spec

if TYPE_CHECKING:
    import keras

    from keras_effnet.data import Labels
    from keras_effnet.training import Images, Phase, Position, Replicas, Result, TrainingConfig

LOG, CURVES, FIGURES, TENSORBOARD = "log.csv", "curves.png", "result.json", "tensorboard"
HEAD, STAGES = "head", "stages"
_FROZEN_STAGES = 3
_VALIDATION_SHARE = 0.2
# Settings that change how a run is watched, and not what comes out of it.
_WITHOUT_EFFECT = ("checkpoint_steps", "strict")
# Time between two updates of the progress line, in seconds.
_REFRESH = 0.2


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model", metavar="NAME", required=True, help="a variant, e.g. EfficientNetV2B0"
    )
    model.add_argument(
        "--weights",
        metavar="NAME|FILE|none",
        default="imagenet",
        help="to begin with: the name of published ones (imagenet, noisy-student, …; see "
        "convert-weights --list), a file, or random ones (default: imagenet)",
    )
    model.add_argument(
        "--size",
        metavar="N",
        type=common.positive_int,
        help="side of the input in pixels (default: the variant's own)",
    )
    model.add_argument("--dropout", metavar="RATE", type=float, help="(default: the variant's own)")
    model.add_argument(
        "--drop-path", metavar="RATE", type=float, help="(default: the variant's own)"
    )
    phases = parser.add_argument_group("phases")
    phases.add_argument(
        "--head-epochs",
        metavar="N",
        type=common.whole_number,
        help="passes in which the classifier alone is trained (default: 3; 0 with --weights none)",
    )
    phases.add_argument(
        "--head-learning-rate",
        metavar="X",
        type=float,
        default=3e-3,
        help="the largest one while the classifier alone is trained (default: 0.003)",
    )
    phases.add_argument(
        "--epochs",
        metavar="N",
        type=common.whole_number,
        default=10,
        help="passes in which the upper stages are trained as well (default: 10)",
    )
    phases.add_argument(
        "--learning-rate", metavar="X", type=float, default=3e-4, help="(default: 0.0003)"
    )
    phases.add_argument(
        "--frozen-stages",
        metavar="N|none",
        type=_stages,
        help="the stem and the stages 1 to N stay as they are; 0: the stem alone (default: "
        f"{_FROZEN_STAGES}; none with --weights none)",
    )
    phases.add_argument(
        "--freeze-batch-norms",
        action="store_true",
        help="keep all batch norms as they are, for small batches",
    )
    add_data(parser)
    add_training(parser)
    add_augmentation(parser)
    running = add_running(parser)
    running.add_argument(
        "--distribute",
        action="store_true",
        help="train on all devices of this machine (JAX, TensorFlow), or of all machines that "
        "TF_CONFIG names (TensorFlow)",
    )
    running.add_argument(
        "--deterministic", action="store_true", help="the same bits on every run on a GPU; slower"
    )


def add_data(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments on the labelled images."""
    data = parser.add_argument_group(
        "images", "a folder per class, a .csv of paths and labels, or an .npz with labels"
    )
    data.add_argument("--train-data", metavar="PATH", help="images to train on")
    data.add_argument(
        "--validation-data", metavar="PATH", help="images to choose the best state by"
    )
    data.add_argument(
        "--validation-share",
        metavar="SHARE",
        type=float,
        help="without them, hold back so much of every class of the training images (default: "
        f"{_VALIDATION_SHARE})",
    )
    data.add_argument(
        "--labels",
        metavar="FILE",
        help="the classes in their order: a text file with one name per line, or a .csv with "
        "index, id and name (default: the folders in alphabetical order)",
    )
    opening.add_crop(data)
    data.add_argument(
        "--strict", action="store_true", help="fail on an unreadable image instead of skipping it"
    )


def add_training(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments on the optimizer and the loss."""
    training = parser.add_argument_group("training")
    training.add_argument(
        "--batch-size", metavar="N", type=common.positive_int, default=32, help="(default: 32)"
    )
    training.add_argument(
        "--warm-up",
        metavar="SHARE",
        type=float,
        default=0.1,
        help="part of each phase in which the learning rate rises (default: 0.1)",
    )
    training.add_argument(
        "--weight-decay", metavar="X", type=float, default=1e-5, help="of AdamW (default: 1e-5)"
    )
    training.add_argument(
        "--label-smoothing", metavar="X", type=float, default=0.1, help="(default: 0.1)"
    )
    training.add_argument(
        "--ema",
        metavar="MOMENTUM",
        type=float,
        default=0.0,
        help="evaluate and keep a moving average of the weights, e.g. 0.999 (default: 0, none)",
    )
    training.add_argument(
        "--class-weights",
        choices=("none", "balanced"),
        default="none",
        help="balanced: images of rare classes weigh more (default: none)",
    )
    training.add_argument(
        "--mixed-precision",
        choices=("float16", "bfloat16"),
        help="of the arithmetic; the saved model has float32 (default: float32)",
    )
    training.add_argument(
        "--seed", metavar="N", type=common.whole_number, default=0, help="of everything random"
    )


def add_augmentation(
    parser: argparse.ArgumentParser, min_area: float = 0.35, mixup: float = 0.0
) -> None:
    """Adds the arguments on what is done to training images, and the defaults of some."""
    group = parser.add_argument_group("augmentation")
    group.add_argument(
        "--min-area",
        metavar="SHARE",
        type=float,
        default=min_area,
        help="least part of a photograph that a random crop keeps; 1 for no random crops "
        f"(default: {min_area:g})",
    )
    group.add_argument("--no-flip", action="store_true", help="never mirror an image")
    group.add_argument(
        "--rand-augment",
        metavar="N",
        type=common.whole_number,
        default=0,
        help="random operations on each image, e.g. 2 (default: 0)",
    )
    group.add_argument(
        "--magnitude", metavar="X", type=float, default=9.0, help="theirs, in 0..10 (default: 9)"
    )
    group.add_argument(
        "--mixup",
        metavar="ALPHA",
        type=float,
        default=mixup,
        help=f"0 for none (default: {mixup:g})",
    )
    group.add_argument(
        "--cutmix", metavar="ALPHA", type=float, default=0.0, help="e.g. 1 (default: 0, none)"
    )


def add_running(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Adds the arguments on the folder of the run and its checkpoints."""
    running = parser.add_argument_group("run")
    running.add_argument(
        "--output-dir", metavar="DIR", required=True, help="folder of checkpoint, models and logs"
    )
    group = running.add_mutually_exclusive_group()
    group.add_argument("--resume", action="store_true", help="go on with the run in that folder")
    group.add_argument("--overwrite", action="store_true", help="replace what is in that folder")
    running.add_argument(
        "--checkpoint-steps",
        metavar="N",
        type=common.positive_int,
        default=500,
        help="write a checkpoint after so many steps, beside the one of every epoch (default: 500)",
    )
    running.add_argument(
        "--tensorboard", action="store_true", help=f"log for TensorBoard in DIR/{TENSORBOARD}, too"
    )
    return running


def _stages(text: str) -> int | str:
    return text if text == "none" else common.whole_number(text)


def run(args: argparse.Namespace) -> None:
    """Runs the command.

    Raises:
        UsageError: If the arguments cannot work.
        KeyboardInterrupt: If it was interrupted; a checkpoint was left.
        Exception: Whatever goes wrong later.
    """
    spec = common.checked(get_spec, args.model)
    config = common.checked(make_config, args, _phases(args))
    check_data(args)
    opening.check_weights(args.weights)
    seconds: dict[str, float] = {}
    with common.stage("start", "Starting Keras …", seconds):
        replicas = start_keras(args.distribute, args.deterministic)
    size = args.size or spec.resolution
    with common.stage("images", "Opening images …", seconds):
        training, validation, names = open_images_of(args, spec.preprocessing, (size, size))
    settings = {
        "command": "train",
        "model": {
            name: getattr(args, name) for name in ("model", "weights", "dropout", "drop_path")
        }
        | {"size": size},
        **settings_of(config, training, validation, names),
    }
    folder = open_run(args, settings, replicas)
    from keras_effnet.models import locate
    from keras_effnet.weights import finalize_normalization

    with common.stage("model", f"Building {args.model} …", seconds):
        spec, weights = locate(spec, None if args.weights == "none" else args.weights)
        saved_as = _build(args, spec, size, len(names), None if args.resume else weights)
        with mixed_precision(config), replicas.scope():
            model = _build(args, spec, size, len(names), None)
        model.set_weights(saved_as.get_weights())
        finalize_normalization(model)
    write_labels(folder, names, replicas)
    result = train_in(
        folder, args, model, training, validation, config, saved_as=saved_as, replicas=replicas
    )
    if replicas.writes:
        finish(folder, args, result)


def _phases(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The phases, of which those without epochs are left out."""
    random = args.weights == "none"
    head_epochs = args.head_epochs if args.head_epochs is not None else (0 if random else 3)
    frozen = args.frozen_stages
    if frozen is None:
        frozen = "none" if random else _FROZEN_STAGES
    phases = [
        {
            "name": HEAD,
            "epochs": head_epochs,
            "learning_rate": args.head_learning_rate,
            "frozen": "all",
        },
        {
            "name": STAGES,
            "epochs": args.epochs,
            "learning_rate": args.learning_rate,
            "frozen": None if frozen == "none" else frozen,
            "freeze_batch_norms": args.freeze_batch_norms,
        },
    ]
    phases = [phase for phase in phases if phase["epochs"]]
    if not phases:
        raise UsageError("There is nothing to train with --head-epochs 0 and --epochs 0.")
    return phases


def make_config(
    args: argparse.Namespace, phases: list[dict[str, Any]], **further: Any
) -> TrainingConfig:
    """The configuration that the arguments describe, with the further values.

    Raises:
        ValueError: If a value is not allowed.
    """
    from keras_effnet.training.config import AugmentationConfig, Phase, TrainingConfig

    return TrainingConfig(
        phases=tuple(Phase(**phase) for phase in phases),
        batch_size=args.batch_size,
        warm_up=args.warm_up,
        weight_decay=args.weight_decay,
        label_smoothing=args.label_smoothing,
        ema=args.ema,
        class_weights=args.class_weights,
        augmentation=AugmentationConfig(
            min_area=args.min_area,
            flip=not args.no_flip,
            rand_augment=args.rand_augment,
            magnitude=args.magnitude,
            mixup=args.mixup,
            cutmix=args.cutmix,
        ),
        mixed_precision=args.mixed_precision,
        checkpoint_steps=args.checkpoint_steps,
        seed=args.seed,
        strict=args.strict,
        **further,
    )


def check_data(args: argparse.Namespace) -> None:
    """Raises UsageError for what the arguments on images and folder alone can tell."""
    if args.tensorboard:
        missing = [name for name in ("tensorflow", "tensorboard") if not _is_installed(name)]
        if missing:
            raise UsageError(
                f"--tensorboard needs {' and '.join(missing)}: pip install {' '.join(missing)}."
            )
    if args.train_data is None:
        raise UsageError("--train-data is needed: a folder with a sub-folder for each class.")
    for name in ("train_data", "validation_data", "labels"):
        path = getattr(args, name)
        if path is not None and not Path(path).exists():
            raise UsageError(f"--{name.replace('_', '-')}: there is no {path!r}.")
    if args.validation_share is not None:
        if args.validation_data is not None:
            raise UsageError("--validation-share and --validation-data exclude each other.")
        if not 0 < args.validation_share < 1:
            raise UsageError(
                f"--validation-share is between 0 and 1. Received: {args.validation_share:g}"
            )


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def start_keras(distribute: bool, deterministic: bool) -> Replicas:
    """Imports Keras on the user's backend, and connects the devices.

    Raises:
        UsageError: If the backend cannot do what is asked.
    """
    from keras_effnet.export._console import native_logs_muted

    with native_logs_muted():
        import keras  # noqa: F401

        from keras_effnet.plotting import check_installed
        from keras_effnet.training import make_deterministic, make_replicas

        check_installed()  # The curves are drawn at the end; it would be missed too late.
        replicas = common.checked(make_replicas, distribute)
        if deterministic:
            common.checked(make_deterministic)
    if replicas.count > 1:
        common.say(f"Training on {replicas.description}.")
    return replicas


def open_images_of(
    args: argparse.Namespace,
    preprocessing: PreprocessingSpec,
    size: tuple[int, int],
    *,
    classes: int | None = None,
    in_graph: bool = True,
) -> tuple[Images, Images, Labels]:
    """Opens the training and the validation images.

    Args:
        args: With the arguments of `add_data`.
        preprocessing: How images are cropped, and what makes the model's input of pixels.
        size: `(height, width)` in pixels.
        classes: Number of classes that a model has already.
        in_graph: Whether the model makes its input of pixels itself.

    Returns:
        Both, and the classes.

    Raises:
        UsageError: If they are not labelled, or do not suit each other.
    """
    from keras_effnet.data import Labels, open_images, read_labels
    from keras_effnet.training import Images

    labels = None if args.labels is None else common.checked(read_labels, args.labels)

    def open_one(path: str, labels: Labels | None) -> Any:
        found = open_images(
            path,
            size,
            preprocessing=preprocessing,
            labels=labels,
            classes=classes,
            crop=args.crop,
            strict=args.strict,
        )
        for file, reason in found.skipped:
            common.say(f"skipped {file}: {reason}")
        if found.labels is None:
            raise UsageError(
                f"{path!r} holds images without labels. Training needs a folder for each class, a "
                ".csv with labels, or an .npz with labels."
            )
        return found

    trained = open_one(args.train_data, labels)
    names = labels or Labels(_class_names(Path(args.train_data), trained.labels, classes))
    if len(names) < 2:
        raise UsageError(f"Two or more classes are needed. Received: {', '.join(names.names)}")
    transform = None if in_graph else preprocessing

    def made(dataset: Any) -> Images:
        return Images(dataset, len(names), preprocessing, transform, args.crop)

    training = made(trained)
    if args.validation_data is None:
        share = args.validation_share or _VALIDATION_SHARE
        return *common.checked(training.split, share, args.seed), names
    return training, made(open_one(args.validation_data, names)), names


def _class_names(path: Path, labels: Any, classes: int | None) -> tuple[str, ...]:
    if path.is_dir():
        folders = (entry.name for entry in path.iterdir() if entry.is_dir())
        return tuple(sorted(name for name in folders if not name.startswith(".")))
    return tuple(str(index) for index in range(classes or int(labels.max()) + 1))


def settings_of(
    config: TrainingConfig, training: Images, validation: Images, names: Labels
) -> dict[str, Any]:
    """All of a training that its result depends on, as JSON data."""
    import keras

    from keras_effnet.training import fingerprint

    told = dataclasses.asdict(config)
    return {
        "config": {name: value for name, value in told.items() if name not in _WITHOUT_EFFECT},
        "classes": list(names.names),
        "crop": training.crop,
        "training images": fingerprint(training),
        "validation images": fingerprint(validation),
        "backend": keras.backend.backend(),
    }


def open_run(args: argparse.Namespace, settings: dict[str, Any], replicas: Replicas) -> Path:
    """Makes or checks the folder of the run.

    Raises:
        UsageError: If it cannot be used.
    """
    from keras_effnet.training import open_folder

    folder = Path(args.output_dir)
    # Of several processes, the others find the folder as the first one makes it.
    if replicas.writes or args.resume:
        common.checked(open_folder, folder, settings, resume=args.resume, overwrite=args.overwrite)
    return folder


def write_labels(folder: Path, names: Labels, replicas: Replicas) -> None:
    """Writes the classes in a form that all commands read."""
    import csv

    from keras_effnet.quantization.files import whole

    if not replicas.writes:
        return
    name = "labels.txt" if names.ids is None else "labels.csv"
    with whole(folder / name) as temporary, open(temporary, "w", encoding="utf-8") as file:
        if names.ids is None:
            file.writelines(f"{name}\n" for name in names.names)
        else:
            rows = zip(range(len(names)), names.ids, names.names, strict=True)
            csv.writer(file).writerows([("index", "id", "name"), *rows])


def _build(
    args: argparse.Namespace, spec: ModelSpec, size: int, classes: int, weights: Path | None
) -> keras.Model:
    import keras

    from keras_effnet.models import create_model

    # The new classifier is random.
    keras.utils.set_random_seed(args.seed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = create_model(
            spec,
            weights=weights,
            classes=classes,
            input_shape=(size, size, 3),
            dropout_rate=args.dropout,
            drop_path_rate=args.drop_path,
        )
    for warning in caught:
        common.say(f"note: {common.one_line(warning.message)}")
    return model


@contextlib.contextmanager
def mixed_precision(config: TrainingConfig) -> Iterator[None]:
    """In which a model of the config's precision is built."""
    import keras

    before = keras.config.dtype_policy()
    if config.mixed_precision is not None:
        keras.config.set_dtype_policy(f"mixed_{config.mixed_precision}")
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def train_in(
    folder: Path,
    args: argparse.Namespace,
    model: keras.Model,
    training: Images,
    validation: Images,
    config: TrainingConfig,
    **arguments: Any,
) -> Result:
    """Trains with progress on stderr, and tells how to resume if it is interrupted.

    Raises:
        KeyboardInterrupt: If it was interrupted.
    """
    import keras

    from keras_effnet.training import train

    arguments["callbacks"] = [*arguments.get("callbacks", ())]
    replicas = arguments.get("replicas")
    if args.tensorboard and (replicas is None or replicas.writes):
        board = keras.callbacks.TensorBoard(log_dir=str(folder / TENSORBOARD), write_graph=False)
        arguments["callbacks"].append(board)
    watcher = _Watcher(folder, shown=replicas is None or replicas.writes)
    resume_line = f"Go on with: {shlex.join(_resumed(args.command_line))}"
    common.say(
        f"Training on {len(training)} images of {training.classes} classes, "
        f"validating on {len(validation)} …"
    )
    try:
        result = train(
            model, training, validation, folder, config,
            resume=args.resume, observer=watcher, **arguments,
        )  # fmt: skip
    except KeyboardInterrupt:
        watcher.clear()
        common.say(f"Stopped at once; the last checkpoint counts. {resume_line}")
        raise
    if result.interrupted:
        watcher.clear()
        common.say(f"Stopped; the checkpoint is written. {resume_line}")
        raise KeyboardInterrupt
    return result


def _resumed(command_line: tuple[str, ...]) -> list[str]:
    words = [word for word in command_line if word not in ("--resume", "--overwrite")]
    return [*words, "--resume"]


def finish(folder: Path, args: argparse.Namespace, result: Result) -> None:
    """Draws the curves, writes the figures and shows them."""
    from keras_effnet.export.report import package_versions
    from keras_effnet.plotting import png
    from keras_effnet.quantization.files import whole, write_json
    from keras_effnet.training import draw_curves
    from keras_effnet.training.loop import BEST, LAST

    with whole(folder / CURVES) as temporary:
        temporary.write_bytes(png(draw_curves(result.history)))
    figures = {
        "command": list(args.command_line),
        "best_val_accuracy": result.best,
        "history": result.history,
        "unreadable": result.unreadable,
        "versions": package_versions(),
    }
    write_json(folder / FIGURES, figures)
    print(f"\n{_table(result.history)}\n")
    if result.unreadable:
        common.warn(
            f"{len(result.unreadable)} images could not be read and were skipped; "
            f"{FIGURES} names them."
        )
    print(f"Best: {result.best:.1%} of the validation images.")
    print(f"Written to {folder}/: {BEST}, {LAST}, {LOG}, {CURVES}, {FIGURES}")


def _table(history: list[dict[str, Any]]) -> str:
    rows = [("phase", "epoch", "loss", "accuracy", "val loss", "val accuracy", "seconds")]
    rows += [
        (
            row["phase"],
            str(row["epoch"]),
            f"{row['loss']:.4f}",
            f"{row['accuracy']:.1%}",
            f"{row['val_cross_entropy']:.4f}",
            f"{row['val_accuracy']:.1%}",
            f"{row['seconds']:.0f}",
        )
        for row in history
    ]
    return text_table(rows)


class _Watcher:
    """Shows progress on stderr and writes the log."""

    def __init__(self, folder: Path, shown: bool) -> None:
        self._folder, self._shown = folder, shown
        self._line = shown and sys.stderr.isatty()
        self._start, self._first, self._last = 0.0, 0, 0.0

    def began(self, phase: Phase, steps: int, position: Position) -> None:
        if not self._shown:
            return
        done = f", going on after epoch {position.epoch}" if position.epoch else ""
        done += f", step {position.step}" if position.step else ""
        common.say(f"Phase {phase.name}: {phase.epochs} epochs of {steps} steps{done}")

    def stepped(self, phase: Phase, epoch: int, step: int, steps: int, loss: float) -> None:
        now = time.perf_counter()
        if step <= self._first or not self._start:
            self._start, self._first = now, step
        if not self._line or (now - self._last < _REFRESH and step < steps):
            return
        self._last = now
        done = step - self._first
        left = f", {(steps - step) * (now - self._start) / done:.0f} s left" if done else ""
        filled = 20 * step // steps
        print(
            f"\r  epoch {epoch}/{phase.epochs} [{'=' * filled}{' ' * (20 - filled)}] "
            f"{step}/{steps}, loss {loss:.4f}{left}\033[K",
            end="",
            file=sys.stderr,
            flush=True,
        )

    def finished_epoch(self, history: list[dict[str, Any]]) -> None:
        from keras_effnet.training import write_log

        self._start = 0.0
        if not self._shown:
            return
        write_log(self._folder / LOG, history)
        self.clear()
        row = history[-1]
        common.say(
            f"  {row['phase']} {row['epoch']}: loss {row['loss']:.4f}, accuracy "
            f"{row['accuracy']:.1%}, validation {row['val_accuracy']:.1%}"
        )

    def skipped(self, name: str, reason: str) -> None:
        self.clear()
        common.say(f"skipped {name}: {reason}")

    def clear(self) -> None:
        """Removes the progress line."""
        if self._line:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
