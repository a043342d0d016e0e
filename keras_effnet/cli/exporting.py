"""What the export commands share: arguments, model, images, quantization, verification, output.

A command gives its `Format` to `run`, which does the rest.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import math
import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keras_effnet.cli import common, opening
from keras_effnet.cli.common import UsageError
from keras_effnet.specs import ModelSpec, PreprocessingSpec, get_spec

if TYPE_CHECKING:
    import keras
    import numpy as np

    from keras_effnet.data import ImageDataset, Labels
    from keras_effnet.export import ExportReport, Scores, TargetReport, TensorInfo
    from keras_effnet.export.report import Export, ImagesUsed
    from keras_effnet.export.verify import Outputs, Predictor, Thresholds, WorstImage
    from keras_effnet.quantization import Analysis, QuantizationConfig

DEFAULT_CALIBRATION_SAMPLES = 200
# Without evaluation images, the file is compared with the model on this many.
_CALIBRATION_IMAGES_COMPARED = 32
_RANDOM_IMAGES_COMPARED = 4
_IMAGENET_CLASSES = 1000
# The worst images and layers that a report shows, and the images on which layers are measured.
_WORST_IMAGES = 8
_WORST_LAYERS = 6
_ANALYSIS_IMAGES = 16
# Sides of the photographs in the HTML report, in pixels.
_PICTURE_SIDE = 224
_THRESHOLDS = ("min_agreement", "min_sqnr", "min_top1", "max_top1_loss")
# Arguments of this package's quantizer.
_OF_CORE = (
    "calibration_method",
    "corrections",
    "equalize",
    "keep_float",
    "ranges",
    "save_ranges",
)


@dataclass(frozen=True)
class Format:
    """What distinguishes one export command from another.

    Args:
        runtime: Name of what runs the files.
        check: Raises ValueError if arguments of the format's own do not fit each other.
        write: Writes the file, from the arguments, the source, the model (quantized by this
            package, or as it is) and the calibration images that are left to the converter.
        open: A function from images to outputs that runs the file of a path.
        warn: Texts on what the file is, apart from its accuracy.
        describe: What else is to be shown of the file, line by line.
        judge: What each device makes of the file.
    """

    runtime: str
    check: Callable[[argparse.Namespace], None]
    write: Callable[[argparse.Namespace, Source, keras.Model, Calibration | None], Export]
    open: Callable[[Path, argparse.Namespace], Predictor]
    warn: Callable[[argparse.Namespace, Export], list[str]]
    describe: Callable[[Export], list[str]] = lambda export: []
    judge: Callable[[Export], tuple[TargetReport, ...]] = lambda export: ()


# Arguments


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that choose the model."""
    model = parser.add_argument_group("model")
    source = model.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", metavar="NAME", help="a variant, e.g. EfficientNetV2B0")
    source.add_argument("--keras-model", metavar="FILE", help="a saved .keras model of any kind")
    model.add_argument(
        "--weights",
        metavar="NAME|FILE|none",
        help="of --model: the name of published ones (imagenet, noisy-student, …; see "
        "convert-weights --list), a file, or random ones (default: imagenet)",
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


def add_output(group: argparse._ArgumentGroup) -> None:
    """Adds the arguments on the file to be written that every format has."""
    group.add_argument("--output", metavar="FILE", required=True, help="the file to write")
    group.add_argument(
        "--overwrite", action="store_true", help="replace the output and the report if they exist"
    )


def add_quantization(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Adds the arguments of `quantize_model`, and returns their group."""
    group = parser.add_argument_group("quantization", "of --quantization int8")
    group.add_argument(
        "--calibration-method",
        metavar="NAME",
        help="how ranges are found: min_max, moving_average, percentile, mse, entropy, or "
        "consumer, the squared error behind the layer that reads them (default: consumer)",
    )
    group.add_argument(
        "--corrections",
        metavar="LIST",
        type=name_list,
        help="what is corrected, separated by commas: swish_equalization, swish_splitting, "
        "learned_rounding, bias_correction, kernel_reconstruction, and swish_rescaling for fast "
        "files without equalization; or none (default: all but the last)",
    )
    add_equalize(group)
    group.add_argument(
        "--keep-float",
        metavar="LAYERS",
        type=name_list,
        help="names of layers to leave in float, separated by commas",
    )
    group.add_argument(
        "--ranges",
        metavar="FILE.json",
        help="use the ranges of a file that --save-ranges wrote; with --corrections none no "
        "--calibration-data are needed then",
    )
    group.add_argument(
        "--save-ranges", metavar="FILE.json", help="write the ranges, to be used again"
    )
    return group


def add_equalize(group: argparse._ArgumentGroup) -> None:
    """Adds --equalize."""
    group.add_argument(
        "--equalize",
        metavar="auto|all|SHARE",
        type=_equalize,
        help="swishes to equalize: where it saves much noise; all; or at most this share of their "
        "elements, such as 0.25, where each saves most, for a faster file (default: auto)",
    )


def _equalize(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


def add_images(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments on calibration and evaluation images."""
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
    opening.add_crop(images)
    images.add_argument(
        "--seed",
        metavar="N",
        type=common.whole_number,
        default=0,
        help="of the choice of samples (default: 0)",
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


def add_verification(parser: argparse.ArgumentParser, runtime: str) -> None:
    """Adds the arguments of the verification and its report."""
    group = parser.add_argument_group(
        "verification",
        "a file that fails is kept as NAME.failed.EXTENSION, and the exit code is 1",
    )
    group.add_argument(
        "--min-agreement",
        metavar="SHARE",
        type=float,
        help="share of the images, in 0..1, on which the file must choose the class of the Keras "
        "model",
    )
    group.add_argument(
        "--min-sqnr",
        metavar="DB",
        type=float,
        help="signal to noise that the outputs must have, in decibels",
    )
    group.add_argument(
        "--min-top1",
        metavar="SHARE",
        type=float,
        help="share of the evaluation images, in 0..1, that the file must get right",
    )
    group.add_argument(
        "--max-top1-loss",
        metavar="SHARE",
        type=float,
        help="by how much that share may be below the Keras model's, e.g. 0.01",
    )
    group.add_argument("--report", metavar="FILE.json", help="write what was done and measured")
    group.add_argument(
        "--html-report",
        metavar="FILE.html",
        help="write the same as a page, with the worst images and layers",
    )
    group.add_argument(
        "--threads",
        metavar="N",
        type=common.positive_int,
        help=f"of {runtime} during the verification (default: its own choice)",
    )


def name_list(text: str) -> tuple[str, ...]:
    """argparse type: names separated by commas; "none" is no name."""
    names = tuple(name.strip() for name in text.split(",")) if text.strip() != "none" else ()
    if "" in names:
        raise argparse.ArgumentTypeError(f"names separated by commas are needed, not {text!r}")
    return names


# The command


def run(args: argparse.Namespace, form: Format) -> None:
    """Exports a model, verifies the file and reports.

    Args:
        args: The parsed arguments.
        form: Of the file.

    Raises:
        UsageError: If the arguments cannot work.
        Exception: Whatever goes wrong later.
    """
    _complete(args)
    _check(args, form)
    seconds: dict[str, float] = {}
    with common.stage("start", "Starting TensorFlow …", seconds):
        common.start_tensorflow()
    config = _config(args)
    ranges = _ranges(args)
    labels = _read_labels(args)
    with common.stage("model", f"Building {args.model or args.keras_model} …", seconds):
        source = _open_model(args, labels)
    with common.stage("images", "Opening images …", seconds):
        calibration = open_images_of(args.calibration_data, args.calibration_samples, args, source)
        evaluation = open_images_of(
            args.evaluation_data, args.evaluation_samples, args, source, labels
        )

    from keras_effnet.export import ExportReport, write_report
    from keras_effnet.export.html_report import write_html
    from keras_effnet.quantization import quantize_model, save_calibration

    batches = None if calibration is None else Calibration(calibration, args.batch_size)
    model = source.model
    if config is not None and (batches is not None or ranges is not None):
        with common.stage("quantization", "Quantizing …", seconds):
            given = {} if ranges is None else {"ranges": ranges}
            model = quantize_model(model, batches, config, verbose=False, **given)
        batches = None
        if args.save_ranges is not None:
            save_calibration(model, args.save_ranges)
    with common.stage("conversion", f"Converting to {args.quantization} …", seconds):
        export = form.write(args, source, model, batches)
    with common.stage("verification", f"Verifying {args.output} in {form.runtime} …", seconds):
        comparison = _comparison(args, source, calibration, evaluation)
        outputs = _verify(source, form, args, export, comparison)
        keras_scores, scores = outputs.scores()
    thresholds = _thresholds(args)
    failures = thresholds.failures(scores, keras_scores)
    if failures:
        export = _kept_as_failed(export)
    analysis = None
    if model is not source.model and (failures or args.html_report is not None):
        with common.stage("layers", "Measuring the layers …", seconds):
            analysis = _analysis(source.model, model, comparison)
    worst = _worst(outputs)
    paths = comparison.paths([image.index for image in worst])

    report = ExportReport(
        command=args.command_line,
        model={
            "name": source.model.name,
            "weights": str(args.weights or args.keras_model),
            "input_shape": list(source.model.input_shape[1:]),
            "classes": source.classes,
            "parameters": source.model.count_params(),
        },
        sizes={
            "float_bytes": 4 * source.model.count_params(),
            "int8_bytes": int8_bytes(source.model),
        },
        quantizer=_quantizer(args, config, calibration),
        export=export,
        calibration=calibration and _used(args.calibration_data, calibration),
        verification=comparison.used,
        scores=(keras_scores, scores),
        seconds=seconds,
        warnings=(*_warnings(args, scores, comparison), *form.warn(args, export)),
        thresholds=thresholds,
        failures=failures,
        worst=worst,
        worst_paths=paths,
        targets=form.judge(export),
        analysis=analysis,
    )
    if args.report is not None:
        write_report(args.report, report, overwrite=args.overwrite)
    if args.html_report is not None:
        pictures = comparison.pictures([image.index for image in worst])
        names = _class_names(source, evaluation)
        write_html(
            args.html_report, report, names=names, pictures=pictures, overwrite=args.overwrite
        )
    _print(report, form)
    if failures:
        raise RuntimeError(_failure(report))


def _complete(args: argparse.Namespace) -> None:
    """Fills in the defaults that depend on other arguments."""
    args.io_dtype = args.io_dtype or ("uint8" if args.quantization == "int8" else "float32")
    if args.model is not None and args.weights is None:
        args.weights = "imagenet"
    if args.calibration_data is not None and args.calibration_samples is None:
        args.calibration_samples = DEFAULT_CALIBRATION_SAMPLES


def _check(args: argparse.Namespace, form: Format) -> None:
    """Raises UsageError for everything that the arguments alone can tell."""
    from keras_effnet.export.files import check_target

    if args.model is not None:
        common.checked(get_spec, args.model)
        if args.weights == "imagenet" and args.classes not in (None, _IMAGENET_CLASSES):
            raise UsageError(
                f"The ImageNet weights have {_IMAGENET_CLASSES} classes, and an untrained head is "
                f"not worth exporting. Pass --weights FILE. Received: --classes {args.classes}"
            )
        opening.check_weights(args.weights)
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
    common.checked(form.check, args)
    _check_quantizer(args)
    _check_ranges(args)
    if args.calibration_data is not None and args.quantization != "int8":
        raise UsageError(
            "--calibration-data is used by --quantization int8 alone. "
            f"Received: --quantization {args.quantization}"
        )
    if args.model is not None:
        _check_calibration(args, quantized=False)
    common.checked(check_target, args.output, overwrite=args.overwrite)
    written = {"output": args.output}
    for name in ("report", "html_report"):
        path = getattr(args, name)
        if path is None:
            continue
        for other, other_path in written.items():
            if Path(path).resolve() == Path(other_path).resolve():
                raise UsageError(f"{_flag(name)} and {_flag(other)} are the same file.")
        written[name] = path
        common.checked(check_target, path, overwrite=args.overwrite)
    thresholds = _thresholds(args)
    if thresholds.any:
        common.checked(check_target, failed_path(args.output), overwrite=args.overwrite)
    if thresholds.needs_labels and args.evaluation_data is None:
        raise UsageError("--min-top1 and --max-top1-loss need --evaluation-data with labels.")


def _check_quantizer(args: argparse.Namespace) -> None:
    for name in ("quantizer", *_OF_CORE):
        if getattr(args, name, None) is None:
            continue
        flag = _flag(name)
        if args.quantization != "int8":
            raise UsageError(
                f"{flag} belongs to --quantization int8. "
                f"Received: --quantization {args.quantization}"
            )
        if name in _OF_CORE and _is_left_to_converter(args):
            raise UsageError(f"{flag} belongs to --quantizer core. Received: --quantizer converter")


def _check_ranges(args: argparse.Namespace) -> None:
    from keras_effnet.export.files import check_target

    if args.ranges is not None:
        _check_exists("--ranges", args.ranges)
    if args.save_ranges is None:
        return
    for name in ("output", "report", "html_report"):
        other = getattr(args, name)
        if other is not None and Path(other).resolve() == Path(args.save_ranges).resolve():
            raise UsageError(f"--save-ranges and {_flag(name)} are the same file.")
    common.checked(check_target, args.save_ranges, overwrite=args.overwrite)


def _is_left_to_converter(args: argparse.Namespace) -> bool:
    # Of some formats there is no converter that quantizes.
    return getattr(args, "quantizer", None) == "converter"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _check_calibration(args: argparse.Namespace, quantized: bool) -> None:
    known = args.ranges is not None and args.corrections == ()
    needed = args.quantization == "int8" and not quantized and not known
    if needed and args.calibration_data is None:
        raise UsageError(
            "--quantization int8 needs --calibration-data: typical images, from which the ranges "
            "of the activations are taken."
        )
    if quantized and args.quantization != "int8":
        raise UsageError(f"{args.keras_model!r} is quantized: export it with --quantization int8.")
    for name in ("calibration_data", "quantizer", *_OF_CORE):
        if quantized and getattr(args, name, None) is not None:
            raise UsageError(f"{args.keras_model!r} holds its ranges: drop {_flag(name)}.")


def _check_exists(argument: str, path: str) -> None:
    if not Path(path).exists():
        raise UsageError(f"{argument}: there is no {path!r}.")


# Quantization


def _config(args: argparse.Namespace) -> QuantizationConfig | None:
    """How this package is to quantize, or None if it is not to."""
    from keras_effnet.quantization import QuantizationConfig

    if args.quantization != "int8" or _is_left_to_converter(args):
        return None
    given = {
        "method": args.calibration_method,
        "corrections": args.corrections,
        "equalize": args.equalize,
        "keep_float": args.keep_float,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if getattr(args, "target", None) == "coral":
        # The Edge TPU's compiler knows dense kernels of one scale alone.
        given["per_channel_head"] = False
    return common.checked(QuantizationConfig, **given)


def _ranges(args: argparse.Namespace) -> dict[str, Any] | None:
    """The ranges to use, or None if they are to be found."""
    from keras_effnet.quantization import load_calibration

    return None if args.ranges is None else common.checked(load_calibration, args.ranges)


def _quantizer(
    args: argparse.Namespace, config: QuantizationConfig | None, calibration: ImageDataset | None
) -> dict[str, Any] | None:
    """What the report says of how a float model was quantized."""
    if calibration is None and args.ranges is None:
        return None
    if config is None:
        return {"name": "converter"}
    return {"name": "core", **dataclasses.asdict(config), "ranges": args.ranges}


# Model


@dataclass(frozen=True)
class Source:
    """The Keras model to export, and how its images are made."""

    model: keras.Model
    preprocessing: PreprocessingSpec
    in_graph: bool
    labels: Labels | None

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


def _open_model(args: argparse.Namespace, labels: Labels | None) -> Source:
    from keras_effnet.export.to_tflite import reads_pixels
    from keras_effnet.quantization import is_quantized

    if args.model is not None:
        spec = get_spec(args.model)
        classes = args.classes or (_IMAGENET_CLASSES if labels is None else len(labels))
        model = build_variant(args, spec, classes)
        source = Source(model, spec.preprocessing, in_graph=True, labels=labels)
    else:
        model = load_model(args.keras_model)
        _check_calibration(args, is_quantized(model))
        spec = spec_of(model)
        preprocessing = PreprocessingSpec() if spec is None else spec.preprocessing
        in_graph = spec is None or reads_pixels(model)
        source = Source(model, preprocessing, in_graph, labels)
    if labels is not None and len(labels) != source.classes:
        raise UsageError(
            f"{args.labels!r} names {len(labels)} classes, but {model.name!r} has "
            f"{source.classes}. Pass the labels of this model."
        )
    return source


def build_variant(args: argparse.Namespace, spec: ModelSpec, classes: int) -> keras.Model:
    from keras_effnet.models import create_model, locate
    from keras_effnet.weights import check_spec, load_weights

    spec, path = locate(spec, None if args.weights == "none" else args.weights)
    if path is not None:
        check_spec(spec, path, include_preprocessing=True)
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


def load_model(path: str) -> keras.Model:
    """Loads a saved model that classifies RGB images, with the layers of this package.

    Raises:
        ValueError: If it cannot be loaded, or is another kind of model.
    """
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


def spec_of(model: keras.Model) -> ModelSpec | None:
    spec = opening.find_spec(model.name)
    if spec is None:
        common.say(
            f"{model.name!r} is no variant of this package: its input is taken as pixels in "
            "0..255, and images are cropped as EfficientNet V1 does."
        )
    return spec


# Images


class Calibration:
    """The calibration images as batches that can be iterated more than once, with progress."""

    def __init__(self, images: ImageDataset, batch_size: int) -> None:
        self._images, self._batch_size = images, batch_size

    def __len__(self) -> int:
        return math.ceil(len(self._images) / self._batch_size)

    def __iter__(self) -> Iterator[np.ndarray]:
        for images, _ in _batches(self._images, self._batch_size, "calibration"):
            yield images


def open_images_of(
    path: str | None,
    samples: int | None,
    args: argparse.Namespace,
    source: Source,
    labels: Labels | None = None,
    exclude: Collection[Path] = (),
) -> ImageDataset | None:
    """Opens images but those excluded; with `labels`, or without class names, for evaluation."""
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
        exclude=exclude,
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
    """The images on which the file is compared with the Keras model: a set, or an array."""

    used: ImagesUsed
    batch_size: int
    images: ImageDataset | None = None
    array: np.ndarray | None = None
    random: bool = False

    def batches(self) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """Starts a pass, with progress."""
        if self.array is not None:
            return iter([(self.array, None)])
        return _batches(self.images, self.batch_size, "evaluation")

    def sample(self, number: int) -> np.ndarray:
        """The first images."""
        if self.array is not None:
            return self.array[:number]
        images, _ = next(self.images.batches(min(number, len(self.images))))
        return images

    def paths(self, indices: list[int]) -> tuple[str, ...]:
        """Paths of images; none if they do not come from files."""
        if self.images is None or self.images.paths is None:
            return ()
        return tuple(str(self.images.paths[index]) for index in indices)

    def pictures(self, indices: list[int]) -> dict[int, bytes]:
        """Images as JPEG, small; none of random ones."""
        if self.images is None or not indices:
            return {}
        found = {}
        # As pixels in 0..255, before the transform of the batches.
        for index, image in zip(range(max(indices) + 1), self.images.stream(), strict=False):
            if index in indices:
                found[index] = _jpeg(image)
        return found


def _jpeg(image: np.ndarray) -> bytes:
    import numpy as np
    from PIL import Image

    picture = Image.fromarray(np.clip(np.round(image), 0, 255).astype(np.uint8))
    picture.thumbnail((_PICTURE_SIDE, _PICTURE_SIDE))
    encoded = io.BytesIO()
    picture.save(encoded, "JPEG", quality=80)
    return encoded.getvalue()


def _comparison(
    args: argparse.Namespace,
    source: Source,
    calibration: ImageDataset | None,
    evaluation: ImageDataset | None,
) -> _Comparison:
    from keras_effnet.export.report import ImagesUsed

    if evaluation is not None:
        used = _used(args.evaluation_data, evaluation)
        return _Comparison(used, args.batch_size, images=evaluation)
    if calibration is not None:
        batches = calibration.batches(min(_CALIBRATION_IMAGES_COMPARED, len(calibration)))
        images, _ = next(batches)
        used = ImagesUsed(f"{args.calibration_data} (calibration)", len(images), labelled=False)
        return _Comparison(used, args.batch_size, images=calibration, array=images)
    images = _random_images(source, args.seed)
    used = ImagesUsed("random pixels", len(images), labelled=False)
    return _Comparison(used, args.batch_size, array=images, random=True)


def _random_images(source: Source, seed: int) -> np.ndarray:
    import numpy as np

    from keras_effnet.preprocessing import preprocess

    random = np.random.default_rng(seed)
    shape = (_RANDOM_IMAGES_COMPARED, *source.size, 3)
    images = random.integers(0, 256, shape).astype(np.float32)
    return images if source.in_graph else preprocess(images, source.preprocessing)


def _verify(
    source: Source,
    form: Format,
    args: argparse.Namespace,
    export: Export,
    comparison: _Comparison,
) -> Outputs:
    """Runs the Keras model and the written file on the same images."""
    from keras_effnet.export.verify import predict_all

    predictors = {
        "Keras model": source.model.predict_on_batch,
        export.path.name: form.open(export.path, args),
    }
    return predict_all(predictors, comparison.batches())


def _thresholds(args: argparse.Namespace) -> Thresholds:
    from keras_effnet.export.verify import Thresholds

    return common.checked(Thresholds, **{name: getattr(args, name) for name in _THRESHOLDS})


def failed_path(path: str | Path) -> Path:
    """The name under which a file that failed is kept: `m.tflite` -> `m.failed.tflite`."""
    path = Path(path)
    return path.with_name(f"{path.stem}.failed{path.suffix}")


def _kept_as_failed(export: Export) -> Export:
    kept = failed_path(export.path)
    export.path.replace(kept)
    return dataclasses.replace(export, path=kept)


def _analysis(model: keras.Model, quantized: keras.Model, comparison: _Comparison) -> Analysis:
    """What quantization does to every tensor, and what the noisiest layers cost alone."""
    from keras_effnet.export._console import loggers_muted
    from keras_effnet.quantization import analyze

    images = comparison.sample(_ANALYSIS_IMAGES)
    # Each of the models below is run once, which TensorFlow calls expensive retracing.
    with loggers_muted("tensorflow"):
        analysis = analyze(model, quantized, images, layers=(), verbose=False)
        layers = noisiest_layers(analysis)[:_WORST_LAYERS]
        alone = analyze(model, quantized, images, layers=layers, verbose=False)
    return dataclasses.replace(analysis, losses=alone.losses)


def noisiest_layers(analysis: Analysis) -> list[str]:
    """Layers in the order of their least signal to noise, where they add noise of their own."""
    found: dict[str, float] = {}
    before = math.inf
    for row in analysis.rows:
        # Noise is handed on: a layer is to blame for what it loses against the layer before it.
        lost = min(before, 60.0) - row.sqnr if row.kind == "tensor" else 40.0 - row.sqnr
        found[row.layer] = max(found.get(row.layer, -math.inf), lost)
        before = row.sqnr if row.kind == "tensor" else before
    return sorted(found, key=found.get, reverse=True)


def _class_names(source: Source, evaluation: ImageDataset | None) -> tuple[str, ...]:
    if source.labels is not None:
        return source.labels.names
    names = tuple(str(index) for index in range(source.classes))
    known = evaluation is not None and evaluation.labels is not None
    return opening.folder_names(evaluation, names) if known and evaluation.paths else names


def _worst(outputs: Outputs) -> tuple[WorstImage, ...]:
    from keras_effnet.export.verify import worst_images

    reference, found = outputs.arrays.values()
    return worst_images(found, reference, outputs.labels, _WORST_IMAGES)


def _failure(report: ExportReport) -> str:
    layers = ""
    if report.analysis is not None and report.analysis.losses:
        layers = f" Look at the layers {', '.join(report.analysis.worst())}."
    return (
        f"The file fails: {'; '.join(report.failures)}. It is kept as "
        f"{str(report.export.path)!r}.{layers} docs/accuracy.md tells what helps."
    )


def int8_bytes(model: keras.Model) -> int:
    """Bytes of the parameters of a float model in full-integer form.

    Batch norms are folded away, a kernel value takes one byte, and every kernel has an int32 bias
    (TFLite 8-bit quantization specification).
    """
    import keras

    kinds = (keras.layers.Dense, keras.layers.Conv2D, keras.layers.DepthwiseConv2D)
    total = 0
    for layer in model._flatten_layers(include_self=False):
        if isinstance(layer, kinds) and layer.built:
            kernel = layer.kernel.shape
            depthwise = isinstance(layer, keras.layers.DepthwiseConv2D)
            outputs = kernel[-1] * kernel[-2] if depthwise else kernel[-1]
            total += math.prod(kernel) + 4 * outputs
    return total


def _used(path: str, images: ImageDataset) -> ImagesUsed:
    from keras_effnet.export.report import ImagesUsed

    skipped = tuple((str(file), reason) for file, reason in images.skipped)
    return ImagesUsed(path, len(images), images.labels is not None, skipped)


def _warnings(args: argparse.Namespace, scores: Scores, comparison: _Comparison) -> list[str]:
    from keras_effnet.export.report import agreement_warning

    found = []
    if not comparison.random:  # A model has no opinion on noise that could be agreed upon.
        found.append(agreement_warning(args.quantization, scores))
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


def _print(report: ExportReport, form: Format) -> None:
    file = report.export.file
    used = report.verification
    print(f"\nCompared on {used.images} images: {used.source}")
    print(_table(report.scores))
    print(f"\nOperators: {listing(file.ops)}")
    for line in form.describe(report.export):
        print(line)
    for role, tensor in (("Input", file.inputs[0]), ("Output", file.outputs[0])):
        print(f"{role}: {tensor.dtype} {list(tensor.shape)}{_scale(tensor)}")
    for text in report.warnings:
        common.warn(text)
    print(f"Written: {report.export.path} ({file.size:,} bytes)")


def listing(ops: dict[str, int]) -> str:
    """Operators and how often they occur, as one line."""
    return ", ".join(f"{count} {name}" for name, count in ops.items())


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
