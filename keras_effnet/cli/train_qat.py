"""quantize a model, train it as quantized, and compare float, PTQ and QAT

The float model is calibrated and quantized (PTQ: post-training quantization); then the quantized
model is trained, with labels, or by --distill from the float model without any (QAT:
quantization-aware training). All three are exported as TFLite files and run in LiteRT on the same
images. Ctrl-C leaves a checkpoint; during --distill, one of the last whole epoch, and the best
state so far is exported. The same command with --resume goes on from it, as it does after a crash.
Runs on TensorFlow, which exports.

examples:
  keras-effnet train-qat --keras-model run/best.keras --train-data photos/train \\
      --evaluation-data photos/test --output-dir qat
  keras-effnet train-qat --model EfficientNetB0 --classes 5 --weights flowers.weights.h5 \\
      --train-data photos/train --distill --evaluation-data photos/test --output-dir qat
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keras_effnet.cli import common, exporting, opening, train
from keras_effnet.cli.common import UsageError
from keras_effnet.cli.tables import text_table
from keras_effnet.specs import get_spec

if TYPE_CHECKING:
    import keras

    from keras_effnet.data import ImageDataset
    from keras_effnet.export import Scores
    from keras_effnet.quantization import Distillation, DistillationConfig, QuantizationConfig
    from keras_effnet.training import Replicas, Result

FLOAT_FILE, PTQ_FILE, QAT_FILE = "float.tflite", "ptq.tflite", "qat.tflite"
PTQ_MODEL, QAT_MODEL, REPORT = "ptq.keras", "qat.keras", "report.json"
# In training with labels; those of distillation are its own.
_DEFAULTS = {"epochs": 5, "learning_rate": 3e-5, "ema": 0.95, "mixup": 1.0}
_FREEZE_AFTER = 0.3
# Outputs of a softmax sum to 1; in float32 over 1000 classes to within this.
_SUM_TOLERANCE = 1e-3
_NOT_BETTER = (
    "QAT is PTQ: no trained state was better by more than chance makes it, on the images by which "
    "the best state is chosen. Train on more images, for longer or with another --learning-rate, "
    "or use the PTQ file."
)
# Only in training with labels.
_OF_LABELS = {
    "label_smoothing": 0.0,
    "teacher_weight": 0.99,
    "weight_decay": 0.0,
    "class_weights": "none",
    "warm_up": 0.1,
    "min_area": 0.8,
    "rand_augment": 0,
    "magnitude": 9.0,
    "cutmix": 0.0,
    "checkpoint_steps": 500,
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    exporting.add_model(parser)
    train.add_data(parser)
    images = parser.add_argument_group("calibration and evaluation")
    images.add_argument(
        "--calibration-data",
        metavar="PATH",
        help="typical images, labelled or not (default: the training images); files by which the "
        "best state is chosen are left out",
    )
    images.add_argument(
        "--calibration-samples",
        metavar="N",
        type=common.positive_int,
        default=exporting.DEFAULT_CALIBRATION_SAMPLES,
        help=f"use at most so many of them (default: {exporting.DEFAULT_CALIBRATION_SAMPLES})",
    )
    images.add_argument(
        "--evaluation-data",
        metavar="PATH",
        help="images of the comparison (default: --validation-data, or what is held back of the "
        "training images; with --distill, the training images)",
    )
    quantization = parser.add_argument_group("quantization")
    quantization.add_argument(
        "--calibration-method",
        metavar="NAME",
        default="consumer",
        help="how ranges are found, as of export-tflite (default: consumer)",
    )
    quantization.add_argument(
        "--corrections",
        metavar="LIST",
        type=exporting.name_list,
        help="what is corrected before the training, separated by commas, as of export-tflite; or "
        "none (default: what usually helps)",
    )
    exporting.add_equalize(quantization)
    quantization.add_argument(
        "--training-ranges",
        choices=("fixed", "moving_average", "learned"),
        default="fixed",
        help="what the training does to the ranges (default: fixed)",
    )
    quantization.add_argument(
        "--freeze-ranges-after",
        metavar="SHARE",
        type=float,
        help=f"of the steps, moving averages of ranges are frozen (default: {_FREEZE_AFTER})",
    )
    training = parser.add_argument_group("training")
    training.add_argument(
        "--epochs",
        metavar="N",
        type=common.positive_int,
        help="passes over the images (default: 5; with --distill as many as make about 400 steps, "
        "but at least 5 and at most 20)",
    )
    training.add_argument(
        "--learning-rate",
        metavar="X",
        type=float,
        help="the largest one (default: 3e-5)",
    )
    training.add_argument(
        "--batch-size", metavar="N", type=common.positive_int, default=16, help="(default: 16)"
    )
    training.add_argument(
        "--seed",
        metavar="N",
        type=common.whole_number,
        default=0,
        help="of everything random (default: 0)",
    )
    training.add_argument(
        "--ema",
        metavar="MOMENTUM",
        type=float,
        help="evaluate and keep a moving average of the weights; 0 for none (default: 0.95)",
    )
    training.add_argument(
        "--temperature",
        metavar="X",
        type=float,
        help="of the logits of both models, where the float model is learned from (default: 1)",
    )
    labelled = parser.add_argument_group("training with labels")
    labelled.add_argument("--label-smoothing", metavar="X", type=float, help="(default: 0)")
    labelled.add_argument(
        "--teacher-weight",
        metavar="SHARE",
        type=float,
        help="of the divergence from the float model in the loss, beside the labels; with it the "
        "files agree more with the float model, and dropout is left out (default: 0.99)",
    )
    labelled.add_argument("--weight-decay", metavar="X", type=float, help="(default: 0)")
    labelled.add_argument("--warm-up", metavar="SHARE", type=float, help="(default: 0.1)")
    labelled.add_argument(
        "--class-weights",
        choices=("none", "balanced"),
        help="balanced: images of rare classes weigh more (default: none)",
    )
    train.add_augmentation(parser, _OF_LABELS["min_area"], _DEFAULTS["mixup"])
    distillation = parser.add_argument_group("distillation")
    distillation.add_argument(
        "--distill", action="store_true", help="learn from the float model; no labels are needed"
    )
    distillation.add_argument(
        "--distill-mode", choices=("end_to_end", "block_wise"), help="(default: end_to_end)"
    )
    distillation.add_argument(
        "--feature-weight",
        metavar="X",
        type=float,
        help="of the features at the end of each stage, beside the classes (default: 0)",
    )
    running = train.add_running(parser)
    running.add_argument(
        "--distribute",
        action="store_true",
        help="train with labels on all devices of this machine, or of all machines that TF_CONFIG "
        "names",
    )
    # Whether one of them was given shows when it is checked.
    parser.set_defaults(mixed_precision=None, **dict.fromkeys((*_OF_LABELS, *_DEFAULTS)))


def run(args: argparse.Namespace) -> None:
    """Runs the command.

    Raises:
        UsageError: If the arguments cannot work.
        KeyboardInterrupt: If training with labels was interrupted; a checkpoint was left.
        Exception: Whatever goes wrong later.
    """
    _check(args)
    seconds: dict[str, float] = {}
    with common.stage("start", "Starting TensorFlow …", seconds):
        common.start_tensorflow()
        import keras

        if keras.backend.backend() != "tensorflow":
            raise UsageError(
                "train-qat exports, which needs the TensorFlow backend: set "
                f"KERAS_BACKEND=tensorflow. Received: {keras.backend.backend()}"
            )
        from keras_effnet.export._console import loggers_muted
        from keras_effnet.export._optional import import_litert
        from keras_effnet.plotting import check_installed

        # What only the end of the run needs.
        import_litert()
        check_installed()
        from keras_effnet.training import make_replicas

        replicas = common.checked(make_replicas, args.distribute)
    if replicas.count > 1:
        common.say(f"Training on {replicas.description}.")
    from keras_effnet.quantization import QuantizationConfig

    quantization = common.checked(
        QuantizationConfig,
        method=args.calibration_method,
        training_ranges=args.training_ranges,
        **{
            name: getattr(args, name)
            for name in ("corrections", "equalize")
            if getattr(args, name) is not None
        },
    )
    with common.stage("model", f"Building {args.model or args.keras_model} …", seconds):
        source = _open_model(args)
    kind = _Distilled if args.distill else _Labelled
    job = kind(args, source, quantization, seconds, replicas)
    with common.stage("images", "Opening images …", seconds):
        job.open_all()
        # PTQ is fitted to the calibration images, so it would seem better on them than it is.
        source_of_calibration = args.calibration_data or args.train_data
        calibration = job.open(source_of_calibration, args.calibration_samples, job.held_back())
    folder = train.open_run(args, job.settings(), replicas)
    quantized = _quantize(args, source, calibration, quantization, folder, seconds, replicas)
    with common.stage("training", "Training the quantized model …", seconds):
        figures = job.train(quantized, folder)
    if not replicas.writes:
        return
    from keras_effnet.quantization import settle

    settle(quantized)
    with common.stage("export", "Exporting to TFLite …", seconds):
        _export(source.model, quantized, folder)
    # Each of several models is traced once or twice, which TensorFlow calls expensive.
    with common.stage("evaluation", "Evaluating in LiteRT …", seconds), loggers_muted("tensorflow"):
        scores = _evaluate(source.model, folder, job)
    _report(args, folder, scores, figures, job, quantization, seconds)


def _check(args: argparse.Namespace) -> None:
    """Raises UsageError for what the arguments alone can tell."""
    if args.model is not None:
        common.checked(get_spec, args.model)
        if args.weights == "none":
            raise UsageError("Random weights are not worth quantizing. Pass --weights FILE.")
        args.weights = args.weights or "imagenet"
        opening.check_weights(args.weights)
    else:
        if not Path(args.keras_model).exists():
            raise UsageError(f"--keras-model: there is no {args.keras_model!r}.")
        for name in ("weights", "classes", "size"):
            if getattr(args, name) is not None:
                raise UsageError(f"--{name} belongs to --model; a --keras-model has its own.")
    train.check_data(args)
    for name in ("calibration_data", "evaluation_data"):
        path = getattr(args, name)
        if path is not None and not Path(path).exists():
            raise UsageError(f"--{name.replace('_', '-')}: there is no {path!r}.")
    if args.calibration_data is not None and args.validation_data is not None:
        if Path(args.calibration_data).resolve() == Path(args.validation_data).resolve():
            raise UsageError(
                "--calibration-data and --validation-data must differ: on its calibration images "
                "PTQ seems better than it is, and the validation images tell whether to keep it. "
                f"Received: {args.calibration_data!r} for both"
            )
    if args.freeze_ranges_after is not None:
        if args.training_ranges != "moving_average":
            raise UsageError("--freeze-ranges-after belongs to --training-ranges moving_average.")
        if not 0 <= args.freeze_ranges_after <= 1:
            raise UsageError(
                f"--freeze-ranges-after is in 0..1. Received: {args.freeze_ranges_after:g}"
            )
    wrong = {
        True: (*_OF_LABELS, "tensorboard", "validation_data", "validation_share", "distribute"),
        False: ("distill_mode", "feature_weight"),
    }[args.distill]
    for name in wrong:
        if getattr(args, name) not in (None, False):
            flag = "--" + name.replace("_", "-")
            raise UsageError(
                f"{flag} belongs to training with labels: drop it, or --distill."
                if args.distill
                else f"{flag} belongs to --distill."
            )
    if args.teacher_weight == 0 and args.temperature is not None:
        raise UsageError(
            "--temperature is for learning from the float model: drop it, or --teacher-weight 0."
        )
    if args.distill and args.training_ranges == "moving_average":
        raise UsageError(
            "--distill freezes no moving averages: use --training-ranges fixed or learned."
        )
    for name, default in (_OF_LABELS if args.distill else _OF_LABELS | _DEFAULTS).items():
        if getattr(args, name) is None:
            setattr(args, name, default)


def _open_model(args: argparse.Namespace) -> exporting.Source:
    from keras_effnet.export.to_tflite import reads_pixels
    from keras_effnet.quantization import is_quantized
    from keras_effnet.specs import PreprocessingSpec

    if args.model is not None:
        spec = get_spec(args.model)
        model = exporting.build_variant(args, spec, args.classes or 1000)
        return exporting.Source(model, spec.preprocessing, in_graph=True, labels=None)
    model = exporting.load_model(args.keras_model)
    if is_quantized(model):
        raise UsageError(
            f"{args.keras_model!r} is quantized already. Pass the float model that it was made of."
        )
    spec = exporting.spec_of(model)
    preprocessing = PreprocessingSpec() if spec is None else spec.preprocessing
    in_graph = spec is None or reads_pixels(model)
    return exporting.Source(model, preprocessing, in_graph, labels=None)


class _Job:
    """Training with labels or without: its images, its settings and the training itself."""

    evaluation: Any

    def __init__(
        self,
        args: argparse.Namespace,
        source: exporting.Source,
        quantization: QuantizationConfig,
        seconds: dict[str, float],
        replicas: Replicas,
    ) -> None:
        self.args, self.source, self.quantization = args, source, quantization
        self.seconds, self.replicas = seconds, replicas
        self.warnings: list[str] = []

    def open(
        self, path: str, samples: int | None = None, exclude: Collection[Path] = ()
    ) -> ImageDataset:
        """Opens images in the scale of the model's input."""
        from keras_effnet.data import read_labels

        args = self.args
        labels = None if args.labels is None else common.checked(read_labels, args.labels)
        return exporting.open_images_of(path, samples, args, self.source, labels, exclude)

    def _told(self) -> dict[str, Any]:
        args = self.args
        return {
            "command": "train-qat",
            "model": {
                name: getattr(args, name)
                for name in ("model", "keras_model", "weights", "classes", "size")
            },
            "calibration": {
                name: getattr(args, name)
                for name in ("calibration_data", "calibration_samples", "seed")
            },
            "quantization": dataclasses.asdict(self.quantization),
        }


class _Labelled(_Job):
    def held_back(self) -> list[Path]:
        """Returns the files by which the best state is chosen."""
        return self.validation.paths

    def open_all(self) -> None:
        args, source = self.args, self.source
        self.config = common.checked(
            train.make_config,
            args,
            [self._phase()],
            teacher_weight=args.teacher_weight,
            teacher_temperature=1.0 if args.temperature is None else args.temperature,
            # Few images change their class.
            best_by="cross_entropy",
        )
        common.checked(self.replicas.check_batch_size, args.batch_size)
        self.training, self.validation, self.names = train.open_images_of(
            args,
            source.preprocessing,
            source.size,
            classes=source.classes,
            in_graph=source.in_graph,
        )
        self.evaluation = None
        if args.evaluation_data is not None:
            self.evaluation = self.open(args.evaluation_data)
        else:
            self.warnings.append(
                "The files were compared on the images by which the best state was chosen; pass "
                "--evaluation-data for images that the training never saw."
            )

    def _phase(self) -> dict[str, Any]:
        args = self.args
        return {"name": "qat", "epochs": args.epochs, "learning_rate": args.learning_rate}

    def settings(self) -> dict[str, Any]:
        return self._told() | train.settings_of(
            self.config, self.training, self.validation, self.names
        )

    def train(self, quantized: keras.Model, folder: Path) -> dict[str, Any]:
        from keras_effnet.quantization import FreezeRanges
        from keras_effnet.quantization.training import unrounded_outputs, without_dropout

        args = self.args
        _check_probabilities(quantized, self.training)
        callbacks = []
        if args.training_ranges == "moving_average":
            (phase,) = self.config.phases
            steps = phase.epochs * (len(self.training) // args.batch_size)
            share = args.freeze_ranges_after
            share = _FREEZE_AFTER if share is None else share
            callbacks.append(FreezeRanges(round(share * steps)))
        # The states are saved in the model without an optimizer.
        with self.replicas.scope():
            trained = _copy(quantized)
        teacher = self.source.model if args.teacher_weight else None
        with contextlib.ExitStack() as stack:
            stack.enter_context(unrounded_outputs(trained))
            if teacher is not None:
                stack.enter_context(without_dropout(trained))
            result: Result = train.train_in(
                folder, args, trained, self.training, self.validation, self.config,
                saved_as=quantized, replicas=self.replicas, teacher=teacher, callbacks=callbacks,
            )  # fmt: skip
        if self.replicas.writes:
            train.finish(folder, args, result)
            # The states were saved in `quantized`: it holds the last one.
            quantized.set_weights(self._kept(folder, teacher))
        return {
            "history": result.history,
            "best_val_accuracy": result.best,
            "unreadable": result.unreadable,
        }

    def _kept(self, folder: Path, teacher: keras.Model | None) -> list[Any]:
        """Returns the weights of the best state, or of PTQ if that is as good but for chance."""
        from keras_effnet.quantization.distillation import is_better
        from keras_effnet.quantization.training import unrounded_outputs
        from keras_effnet.training import EvaluationBatches
        from keras_effnet.training.loop import BEST
        from keras_effnet.training.teaching import losses_of

        losses, weights = [], []
        for name in (PTQ_MODEL, BEST):
            model = exporting.load_model(str(folder / name))
            batches = EvaluationBatches(self.validation, self.args.batch_size)
            with unrounded_outputs(model):
                losses.append(losses_of(model, teacher, batches, self.config))
            weights.append(model.get_weights())
        if is_better(*losses):
            return weights[1]
        self.warnings.append(_NOT_BETTER)
        return weights[0]

    def batches(self) -> Any:
        """Starts a pass over the evaluation images and labels."""
        if self.evaluation is not None:
            return self.evaluation.batches(self.args.batch_size)
        return _as_evaluation(self.validation, self.args.batch_size)

    @property
    def evaluated_on(self) -> str:
        return self.args.evaluation_data or self.args.validation_data or "held-back images"


class _Distilled(_Job):
    def held_back(self) -> list[Path]:
        """Returns the files by which the best state is chosen."""
        from keras_effnet.quantization.distillation import held_back

        paths = self.training.paths
        return [paths[i] for i in held_back(len(paths), self.config)] if paths else []

    def open_all(self) -> None:
        args = self.args
        self.config: DistillationConfig = common.checked(self._config)
        self.training: ImageDataset = self.open(args.train_data)
        if args.evaluation_data is not None:
            self.evaluation = self.open(args.evaluation_data)
        else:
            self.evaluation = self.training
            self.warnings.append(
                "The files were compared on the training images, so the figures flatter QAT; pass "
                "--evaluation-data."
            )

    def _config(self) -> DistillationConfig:
        from keras_effnet.quantization import DistillationConfig

        args = self.args
        given = {
            "epochs": args.epochs,
            "learning_rate": args.learning_rate,
            "mode": args.distill_mode,
            "temperature": args.temperature,
            "feature_weight": args.feature_weight,
            "ema": args.ema,
            "mixup": args.mixup,
        }
        return DistillationConfig(
            batch_size=args.batch_size,
            flip=not args.no_flip,
            seed=args.seed,
            **{name: value for name, value in given.items() if value is not None},
        )

    def settings(self) -> dict[str, Any]:
        return self._told() | {
            "distillation": dataclasses.asdict(self.config),
            "training images": len(self.training),
        }

    def train(self, quantized: keras.Model, folder: Path) -> dict[str, Any]:
        from keras_effnet.export._console import loggers_muted
        from keras_effnet.quantization import distill
        from keras_effnet.training.loop import CHECKPOINT

        args = self.args
        images = exporting.Calibration(self.training, args.batch_size)
        # Keras shows progress on stdout, which is for results. TensorFlow's warnings are those
        # of the evaluation.
        with contextlib.redirect_stdout(sys.stderr), loggers_muted("tensorflow"):
            result: Distillation = distill(
                self.source.model,
                quantized,
                images,
                self.config,
                verbose=1 if sys.stderr.isatty() else 2,
                checkpoint=folder / CHECKPOINT,
            )
        common.say(
            f"  divergence from the float model on held-back images: {result.before:.4g} before, "
            f"{result.after:.4g} after {len(result.epochs)} epochs"
        )
        if result.interrupted:
            common.say(
                "Interrupted: the best state so far is exported. The same command with --resume "
                "goes on."
            )
        if result.epochs and not result.kept:
            self.warnings.append(_NOT_BETTER)
        return {"distillation": dataclasses.asdict(result)}

    def batches(self) -> Any:
        """Starts a pass over the evaluation images and labels."""
        return self.evaluation.batches(self.args.batch_size)

    @property
    def evaluated_on(self) -> str:
        return self.args.evaluation_data or self.args.train_data


def _copy(model: keras.Model) -> keras.Model:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / PTQ_MODEL
        model.save(path)
        return exporting.load_model(str(path))


def _check_probabilities(model: keras.Model, images: Any) -> None:
    import numpy as np

    from keras_effnet.training import EvaluationBatches

    batch = next(EvaluationBatches(images, min(4, len(images))).batches())
    outputs = model.predict_on_batch(batch.images)
    sums = outputs.sum(axis=-1)
    # The integer softmax has steps of 1/256.
    tolerance = max(_SUM_TOLERANCE, outputs.shape[-1] / 256)
    if outputs.min() < 0 or np.any(np.abs(sums - 1) > tolerance):
        raise UsageError(
            "Training with labels needs a model that ends in a softmax; the outputs of this one "
            f"sum to {sums.min():.3g}..{sums.max():.3g}. Add a softmax, or use --distill."
        )


def _as_evaluation(images: Any, batch_size: int) -> Any:
    from keras_effnet.training import EvaluationBatches

    for batch in EvaluationBatches(images, batch_size).batches():
        used = batch.weights > 0
        yield batch.images[used], batch.targets[used].argmax(axis=-1)


def _quantize(
    args: argparse.Namespace,
    source: exporting.Source,
    calibration: ImageDataset,
    config: QuantizationConfig,
    folder: Path,
    seconds: dict[str, float],
    replicas: Replicas,
) -> keras.Model:
    """Calibrates, or takes what an earlier run calibrated; each process does it for itself."""
    from keras_effnet.quantization import quantize_model
    from keras_effnet.quantization.files import whole

    if args.resume:
        return exporting.load_model(str(folder / PTQ_MODEL))
    with common.stage("calibration", f"Calibrating on {len(calibration)} images …", seconds):
        batches = exporting.Calibration(calibration, args.batch_size)
        quantized = quantize_model(source.model, batches, config, verbose=False)
    common.checked(replicas.check_same, quantized)
    if replicas.writes:
        with whole(folder / PTQ_MODEL) as temporary:
            quantized.save(temporary)
    return quantized


def _export(model: keras.Model, quantized: keras.Model, folder: Path) -> None:
    from keras_effnet.export import to_tflite
    from keras_effnet.quantization.files import whole

    ptq = exporting.load_model(str(folder / PTQ_MODEL))
    to_tflite(model, folder / FLOAT_FILE, overwrite=True)
    to_tflite(ptq, folder / PTQ_FILE, quantization="int8", overwrite=True)
    to_tflite(quantized, folder / QAT_FILE, quantization="int8", overwrite=True)
    ptq.set_weights(quantized.get_weights())
    with whole(folder / QAT_MODEL) as temporary:
        ptq.save(temporary)


def _evaluate(model: keras.Model, folder: Path, job: _Job) -> tuple[Scores, ...]:
    """Runs all forms on the same images; the Keras model is what they agree with or not."""
    from keras_effnet.export import TFLiteRunner
    from keras_effnet.export.verify import predict_all

    predictors = {"Keras, float": model.predict_on_batch}
    for name, file in (("float", FLOAT_FILE), ("PTQ", PTQ_FILE), ("QAT", QAT_FILE)):
        predictors[name] = TFLiteRunner(folder / file).predict
    return tuple(predict_all(predictors, job.batches()).scores())


def _is_worse(before: Scores, after: Scores) -> bool:
    """Returns whether all figures fell: one alone may do so by a few images."""
    return (
        after.agreement < before.agreement
        and (after.top1 is None or after.top1 < before.top1)
        # None: no noise at all, which what agrees less cannot have.
        and (before.sqnr_db is None or after.sqnr_db < before.sqnr_db)
    )


def _report(
    args: argparse.Namespace,
    folder: Path,
    scores: tuple[Scores, ...],
    figures: dict[str, Any],
    job: _Job,
    config: QuantizationConfig,
    seconds: dict[str, float],
) -> None:
    from keras_effnet.export.report import package_versions
    from keras_effnet.quantization.files import write_json

    files = (None, FLOAT_FILE, PTQ_FILE, QAT_FILE)
    rows = [
        {"file": file, "bytes": file and (folder / file).stat().st_size} | dataclasses.asdict(score)
        for file, score in zip(files, scores, strict=True)
    ]
    _, _, ptq, qat = scores
    if _is_worse(ptq, qat):
        job.warnings.append(
            "Training made the quantized model worse. Use the PTQ file, or train with a lower "
            "--learning-rate, or with --distill."
        )
    report = {
        "command": list(args.command_line),
        "quantization": dataclasses.asdict(config),
        "training": figures,
        "evaluation": {"source": job.evaluated_on, "images": qat.images},
        "rows": rows,
        "warnings": job.warnings,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "versions": package_versions(),
    }
    write_json(folder / REPORT, report)
    print(f"\nOn {qat.images} images: {job.evaluated_on}\n{_table(rows)}\n")
    for text in job.warnings:
        common.warn(text)
    written = ", ".join((FLOAT_FILE, PTQ_FILE, QAT_FILE, PTQ_MODEL, QAT_MODEL, REPORT))
    print(f"Written to {folder}/: {written}")


def _table(rows: list[dict[str, Any]]) -> str:
    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.1%}"

    cells = [("", "top-1", "agreement", "SQNR dB", "bytes")]
    for row in rows:
        sqnr, size = row["sqnr_db"], row["bytes"]
        cells.append(
            (
                row["name"],
                share(row["top1"]),
                share(row["agreement"]),
                "-" if sqnr is None else f"{sqnr:.1f}",
                "-" if size is None else f"{size:,}",
            )
        )
    return text_table(cells)
