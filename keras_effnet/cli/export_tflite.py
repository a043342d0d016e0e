"""export a model as a TFLite file, and verify it in LiteRT

The file has batch size 1. With --quantization int8 it is integer-only: there is no float tensor
between its input and its output. After it is written it is run in LiteRT and compared with the
Keras model: on the evaluation images, else on some of the calibration images, else on random
ones.

examples:
  keras-effnet export-tflite --model EfficientNetV2B0 --output v2b0.tflite
  keras-effnet export-tflite --model EfficientNetB0 --classes 5 --weights flowers.weights.h5 \\
      --labels flowers.txt --quantization int8 --calibration-data photos/train \\
      --evaluation-data photos/validation --output flowers.tflite --report flowers.json
  keras-effnet export-tflite --keras-model mine.keras --quantization float16 --output mine.tflite
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keras_effnet.cli import common
from keras_effnet.cli.common import UsageError
from keras_effnet.specs import ModelSpec, PreprocessingSpec, get_spec

if TYPE_CHECKING:
    import keras
    import numpy as np

    from keras_effnet.data import ImageDataset, Labels
    from keras_effnet.export import ExportReport, Scores, TensorInfo, TFLiteExport
    from keras_effnet.export.report import ImagesUsed

DEFAULT_CALIBRATION_SAMPLES = 200
# Without evaluation images, the file is compared with the model on this many.
_CALIBRATION_IMAGES_COMPARED = 32
_RANDOM_IMAGES_COMPARED = 4
_IMAGENET_CLASSES = 1000


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    model = parser.add_argument_group("model")
    source = model.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", metavar="NAME", help="a variant, e.g. EfficientNetV2B0")
    source.add_argument("--keras-model", metavar="FILE", help="a saved .keras model of any kind")
    model.add_argument(
        "--weights",
        metavar="imagenet|none|FILE",
        help="of --model: the published ones, random ones, or a file (default: imagenet)",
    )
    model.add_argument(
        "--classes", metavar="N", type=common.positive_int, help="of --model (default: 1000)"
    )
    model.add_argument(
        "--size",
        metavar="N",
        type=common.positive_int,
        help="side of the input of --model in pixels (default: the variant's own)",
    )

    export = parser.add_argument_group("file")
    export.add_argument("--output", metavar="FILE", required=True, help="the file to write")
    export.add_argument(
        "--quantization",
        choices=("float32", "float16", "dynamic", "int8"),
        default="float32",
        help="float16 halves the size, dynamic quarters it (int8 weights), int8 is integer-only "
        "(default: float32)",
    )
    export.add_argument(
        "--io-dtype",
        choices=("uint8", "int8", "float32"),
        help="type of input and output (default: uint8 for int8 files, which are then given "
        "pixels as they are, else float32)",
    )
    export.add_argument(
        "--overwrite", action="store_true", help="replace the output and the report if they exist"
    )

    images = parser.add_argument_group(
        "images", "a folder, a folder per class, a .csv of paths and labels, or an .npz"
    )
    images.add_argument("--calibration-data", metavar="PATH", help="typical images, for int8")
    images.add_argument(
        "--calibration-samples",
        metavar="N",
        type=common.positive_int,
        help=f"use at most so many of them (default: {DEFAULT_CALIBRATION_SAMPLES})",
    )
    images.add_argument(
        "--evaluation-data", metavar="PATH", help="labelled images, for top-1, top-5 and agreement"
    )
    images.add_argument(
        "--evaluation-samples",
        metavar="N",
        type=common.positive_int,
        help="use at most so many of them (default: all)",
    )
    images.add_argument(
        "--labels",
        metavar="FILE",
        help="the model's classes: a text file with one name per line, or a .csv with index, id "
        "(or wnid) and name",
    )
    images.add_argument(
        "--crop",
        choices=("published", "center", "stretch"),
        default="published",
        help="the variant's published evaluation crop, the centre without resizing, or the whole "
        "image out of proportion (default: published)",
    )
    images.add_argument(
        "--seed", metavar="N", type=int, default=0, help="of the choice of samples (default: 0)"
    )
    images.add_argument(
        "--strict", action="store_true", help="fail on an unreadable image instead of skipping it"
    )
    images.add_argument(
        "--batch-size",
        metavar="N",
        type=common.positive_int,
        default=16,
        help="of the Keras model's predictions (default: 16)",
    )

    parser.add_argument("--report", metavar="FILE.json", help="write what was done and measured")
    parser.add_argument(
        "--threads",
        metavar="N",
        type=common.positive_int,
        help="of LiteRT during the verification (default: its own choice)",
    )


def run(args: argparse.Namespace) -> None:
    """Runs the command.

    Raises:
        UsageError: If the arguments cannot work.
        Exception: Whatever goes wrong later.
    """
    _complete(args)
    _check(args)
    seconds: dict[str, float] = {}
    with common.stage("start", "Starting TensorFlow …", seconds):
        common.start_tensorflow()
    labels = _read_labels(args)
    with common.stage("model", f"Building {args.model or args.keras_model} …", seconds):
        source = _open_model(args, labels)
    with common.stage("images", "Opening images …", seconds):
        calibration = _open(args.calibration_data, args.calibration_samples, args, source)
        evaluation = _open(args.evaluation_data, args.evaluation_samples, args, source, labels)

    from keras_effnet.export import ExportReport, to_tflite, write_report

    with common.stage("conversion", f"Converting to {args.quantization} …", seconds):
        export = to_tflite(
            source.model,
            args.output,
            quantization=args.quantization,
            calibration_data=calibration and _Calibration(calibration, args.batch_size),
            io_dtype=args.io_dtype,
            overwrite=args.overwrite,
        )
    with common.stage("verification", f"Verifying {args.output} in LiteRT …", seconds):
        comparison = _comparison(args, source, calibration, evaluation)
        scores = _verify(args, source, comparison)

    report = ExportReport(
        command=args.command_line,
        model={
            "name": source.model.name,
            "weights": str(args.weights or args.keras_model),
            "input_shape": list(source.model.input_shape[1:]),
            "classes": source.classes,
            "parameters": source.model.count_params(),
        },
        export=export,
        calibration=calibration and _used(args.calibration_data, calibration),
        verification=comparison.used,
        scores=scores,
        seconds=seconds,
        warnings=tuple(_warnings(args, export, scores[1], comparison)),
    )
    if args.report is not None:
        write_report(args.report, report, overwrite=args.overwrite)
    _print(report)


# Arguments


def _complete(args: argparse.Namespace) -> None:
    """Fills in the defaults that depend on other arguments."""
    args.io_dtype = args.io_dtype or ("uint8" if args.quantization == "int8" else "float32")
    if args.model is not None and args.weights is None:
        args.weights = "imagenet"
    if args.calibration_data is not None and args.calibration_samples is None:
        args.calibration_samples = DEFAULT_CALIBRATION_SAMPLES


def _check(args: argparse.Namespace) -> None:
    """Raises UsageError for everything that the arguments alone can tell."""
    from keras_effnet.export.files import check_target
    from keras_effnet.export.to_tflite import check_options

    if args.model is not None:
        common.checked(get_spec, args.model)
        if args.weights == "imagenet" and args.classes not in (None, _IMAGENET_CLASSES):
            raise UsageError(
                f"The ImageNet weights have {_IMAGENET_CLASSES} classes, and an untrained head is "
                f"not worth exporting. Pass --weights FILE. Received: --classes {args.classes}"
            )
        if args.weights not in ("imagenet", "none"):
            _check_exists("--weights", args.weights)
    else:
        _check_exists("--keras-model", args.keras_model)
        for name in ("weights", "classes", "size"):
            if getattr(args, name) is not None:
                raise UsageError(f"--{name} belongs to --model; a --keras-model has its own.")
    for name in ("calibration", "evaluation"):
        data, samples = getattr(args, f"{name}_data"), getattr(args, f"{name}_samples")
        if data is not None:
            _check_exists(f"--{name}-data", data)
        elif samples is not None:
            raise UsageError(f"--{name}-samples needs --{name}-data.")
    if args.labels is not None:
        _check_exists("--labels", args.labels)
    common.checked(check_options, args.quantization, args.io_dtype)
    if args.calibration_data is not None and args.quantization != "int8":
        raise UsageError(
            "--calibration-data is used by --quantization int8 alone. "
            f"Received: --quantization {args.quantization}"
        )
    if args.model is not None:
        _check_calibration(args, quantized=False)
    common.checked(check_target, args.output, overwrite=args.overwrite)
    if args.report is not None:
        if Path(args.report).resolve() == Path(args.output).resolve():
            raise UsageError("--report and --output are the same file.")
        common.checked(check_target, args.report, overwrite=args.overwrite)


def _check_calibration(args: argparse.Namespace, quantized: bool) -> None:
    needed = args.quantization == "int8" and not quantized
    if needed and args.calibration_data is None:
        raise UsageError(
            "--quantization int8 needs --calibration-data: typical images, from which the ranges "
            "of the activations are taken."
        )
    if quantized and args.quantization != "int8":
        raise UsageError(f"{args.keras_model!r} is quantized: export it with --quantization int8.")
    if quantized and args.calibration_data is not None:
        raise UsageError(f"{args.keras_model!r} holds its ranges: drop --calibration-data.")


def _check_exists(argument: str, path: str) -> None:
    if not Path(path).exists():
        raise UsageError(f"{argument}: there is no {path!r}.")


# Model


@dataclass(frozen=True)
class _Source:
    """The Keras model to export, and how its images are made."""

    model: keras.Model
    preprocessing: PreprocessingSpec
    in_graph: bool

    @property
    def classes(self) -> int:
        return self.model.output_shape[-1]

    @property
    def size(self) -> tuple[int, int]:
        return self.model.input_shape[1:3]


def _read_labels(args: argparse.Namespace) -> Labels | None:
    from keras_effnet.data import read_labels

    if args.labels is None:
        return None
    labels = read_labels(args.labels)
    if args.model is not None and args.classes is not None and len(labels) != args.classes:
        raise UsageError(
            f"{args.labels!r} names {len(labels)} classes. Received: --classes {args.classes}"
        )
    return labels


def _open_model(args: argparse.Namespace, labels: Labels | None) -> _Source:
    from keras_effnet.export.to_tflite import reads_pixels
    from keras_effnet.quantization import is_quantized

    if args.model is not None:
        spec = get_spec(args.model)
        classes = args.classes or (_IMAGENET_CLASSES if labels is None else len(labels))
        model = _create(args, spec, classes)
        source = _Source(model, spec.preprocessing, in_graph=True)
    else:
        model = _load(args.keras_model)
        _check_calibration(args, is_quantized(model))
        spec = _spec_of(model)
        preprocessing = PreprocessingSpec() if spec is None else spec.preprocessing
        source = _Source(model, preprocessing, in_graph=spec is None or reads_pixels(model))
    if labels is not None and len(labels) != source.classes:
        raise UsageError(
            f"{args.labels!r} names {len(labels)} classes, but {model.name!r} has "
            f"{source.classes}. Pass the labels of this model."
        )
    return source


def _create(args: argparse.Namespace, spec: ModelSpec, classes: int) -> keras.Model:
    from keras_effnet.models import create_model
    from keras_effnet.weights import load_weights, locate_weights

    path = None if args.weights == "none" else locate_weights(spec, args.weights)
    size = args.size or spec.resolution
    model = create_model(spec, weights=None, classes=classes, input_shape=(size, size, 3))
    if path is None:
        return model
    with warnings.catch_warnings():
        # An untrained classifier is worth a warning in training; here it is an error.
        warnings.filterwarnings("ignore", message="The classifier of model")
        loaded = load_weights(model, path)
    if loaded.skipped_head is not None:
        raise UsageError(
            f"{args.weights!r} does not fit the classifier of {args.model} with {classes} "
            f"classes: {loaded.skipped_head}. Pass --classes, or the --labels, that belong to "
            "these weights."
        )
    return model


def _load(path: str) -> keras.Model:
    import keras

    # Their layers are registered when they are imported.
    import keras_effnet.models
    import keras_effnet.quantization  # noqa: F401

    try:
        model = keras.models.load_model(path, compile=False)
    except Exception as error:  # Archives and configurations fail in many ways.
        raise ValueError(f"{path!r} cannot be loaded as a Keras model: {error}") from error
    shapes = [tensor.shape for tensor in (*(model.inputs or ()), *(model.outputs or ()))]
    if [len(shape) for shape in shapes] != [4, 2] or shapes[0][-1] != 3:
        raise ValueError(
            "The model must read RGB images (batch, height, width, 3) and give (batch, classes). "
            f"Received: {path!r} with inputs and outputs of the shapes {shapes}"
        )
    return model


def _spec_of(model: keras.Model) -> ModelSpec | None:
    try:
        return get_spec(model.name)
    except ValueError:
        common.say(
            f"{model.name!r} is no variant of this package: its input is taken as pixels in "
            "0..255, and images are cropped as EfficientNet V1 does."
        )
        return None


# Images


class _Calibration:
    """The calibration images as batches that can be iterated more than once, with progress."""

    def __init__(self, images: ImageDataset, batch_size: int) -> None:
        self._images, self._batch_size = images, batch_size

    def __iter__(self) -> Iterator[np.ndarray]:
        for images, _ in _batches(self._images, self._batch_size, "calibration"):
            yield images


def _open(
    path: str | None,
    samples: int | None,
    args: argparse.Namespace,
    source: _Source,
    labels: Labels | None = None,
) -> ImageDataset | None:
    """Opens images; with `labels`, or without any class names, for evaluation."""
    from keras_effnet.data import open_images

    if path is None:
        return None
    images = open_images(
        path,
        source.size,
        preprocessing=source.preprocessing,
        in_graph_preprocessing=source.in_graph,
        labels=labels,
        classes=source.classes if path == args.evaluation_data else None,
        crop=args.crop,
        samples=samples,
        seed=args.seed,
        strict=args.strict,
    )
    for file, reason in images.skipped:
        common.say(f"skipped {file}: {reason}")
    return images


def _batches(images: ImageDataset, batch_size: int, what: str) -> Iterator[Any]:
    total = math.ceil(len(images) / batch_size)
    return common.progress(images.batches(batch_size), total, f"{what} batches")


# Verification


@dataclass(frozen=True)
class _Comparison:
    """The images on which the file is compared with the Keras model."""

    batches: Iterator[tuple[np.ndarray, np.ndarray | None]]
    used: ImagesUsed
    random: bool = False


def _comparison(
    args: argparse.Namespace,
    source: _Source,
    calibration: ImageDataset | None,
    evaluation: ImageDataset | None,
) -> _Comparison:
    from keras_effnet.export.report import ImagesUsed

    if evaluation is not None:
        used = _used(args.evaluation_data, evaluation)
        return _Comparison(_batches(evaluation, args.batch_size, "evaluation"), used)
    if calibration is not None:
        batches = calibration.batches(min(_CALIBRATION_IMAGES_COMPARED, len(calibration)))
        images, _ = next(batches)
        used = ImagesUsed(f"{args.calibration_data} (calibration)", len(images), labelled=False)
        return _Comparison(iter([(images, None)]), used)
    images = _random_images(source, args.seed)
    used = ImagesUsed("random pixels", len(images), labelled=False)
    return _Comparison(iter([(images, None)]), used, random=True)


def _random_images(source: _Source, seed: int) -> np.ndarray:
    import numpy as np

    from keras_effnet.preprocessing import preprocess

    random = np.random.default_rng(seed)
    shape = (_RANDOM_IMAGES_COMPARED, *source.size, 3)
    images = random.integers(0, 256, shape).astype(np.float32)
    return images if source.in_graph else preprocess(images, source.preprocessing)


def _verify(
    args: argparse.Namespace, source: _Source, comparison: _Comparison
) -> tuple[Scores, ...]:
    """Runs the Keras model and the written file on the same images."""
    from keras_effnet.export import TFLiteRunner, compare

    runner = TFLiteRunner(args.output, threads=args.threads)
    predictors = {
        "Keras model": source.model.predict_on_batch,
        Path(args.output).name: runner.predict,
    }
    return tuple(compare(predictors, comparison.batches))


def _used(path: str, images: ImageDataset) -> ImagesUsed:
    from keras_effnet.export.report import ImagesUsed

    skipped = tuple((str(file), reason) for file, reason in images.skipped)
    return ImagesUsed(path, len(images), images.labels is not None, skipped)


def _warnings(
    args: argparse.Namespace, export: TFLiteExport, scores: Scores, comparison: _Comparison
) -> list[str]:
    from keras_effnet.export.report import agreement_warning

    found = []
    if not comparison.random:  # A model has no opinion on noise that could be agreed upon.
        found.append(agreement_warning(args.quantization, scores))
    floats = len(export.file.inner_floats)
    if args.quantization == "int8" and floats:
        found.append(f"{floats} tensors between input and output are float, as the model asks.")
    if args.weights == "none":
        found.append(
            "The weights are random (--weights none): the file is of no use but for tests."
        )
    if args.calibration_data and args.evaluation_data:
        if Path(args.calibration_data).resolve() == Path(args.evaluation_data).resolve():
            found.append(
                "The file was evaluated on its own calibration images, so the figures flatter it."
            )
    return [text for text in found if text is not None]


# What the user sees


def _print(report: ExportReport) -> None:
    file = report.export.file
    used = report.verification
    print(f"\nCompared on {used.images} images: {used.source}")
    print(_table(report.scores))
    ops = ", ".join(f"{count} {name}" for name, count in file.ops.items())
    print(f"\nOperators: {ops}")
    for role, tensor in (("Input", file.inputs[0]), ("Output", file.outputs[0])):
        print(f"{role}: {tensor.dtype} {list(tensor.shape)}{_scale(tensor)}")
    for text in report.warnings:
        common.warn(text)
    print(f"Written: {report.export.path} ({file.size:,} bytes)")


def _table(scores: tuple[Scores, ...]) -> str:
    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.1%}"

    rows = [("", "top-1", "top-5", "agreement", "mean |diff|", "max |diff|", "SQNR")]
    for each in scores:
        rows.append(
            (
                each.name,
                share(each.top1),
                share(each.top5),
                share(each.agreement),
                f"{each.mean_abs_difference:.2g}",
                f"{each.max_abs_difference:.2g}",
                "-" if each.sqnr_db is None else f"{each.sqnr_db:.1f} dB",
            )
        )
    first = max(len(row[0]) for row in rows)
    return "\n".join(
        row[0].ljust(first) + "".join(cell.rjust(13) for cell in row[1:]) for row in rows
    )


def _scale(tensor: TensorInfo) -> str:
    if len(tensor.scale) != 1:
        return ""
    return f", scale {tensor.scale[0]:.6g}, zero point {tensor.zero_point[0]}"
