"""Opening models of any format to run them: `.keras`, `.tflite` and `.onnx`."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keras_effnet.cli import common
from keras_effnet.cli.common import UsageError
from keras_effnet.specs import ModelSpec, PreprocessingSpec, get_spec

if TYPE_CHECKING:
    import numpy as np

    from keras_effnet.data import ImageDataset, Labels

KERAS, TFLITE, ONNX = ".keras", ".tflite", ".onnx"
FORMATS = (KERAS, TFLITE, ONNX)
_CHANNELS = 3
# Files hold means and standard deviations as float32.
_ROUNDING = 1e-5
# No classifier of photographs is larger, a damaged file's is: images are held in batches of floats.
_LARGEST_INPUT, _MOST_CLASSES = 2**22, 2**20


@dataclass(frozen=True)
class OpenedFile:
    """A model that can be run.

    Args:
        path: Of the file.
        size: In bytes.
        predict: From images, float32 of shape `(n, height, width, 3)` in the scale of the input,
            to outputs `(n, classes)`.
        input_size: `(height, width)` in pixels.
        classes: Number of classes.
        preprocessing: How images are made for it.
        in_graph: Whether it takes pixels in 0..255 as they are.
        labels: Names of the classes that the file carries, or None.
    """

    path: str
    size: int
    predict: Callable[[np.ndarray], np.ndarray]
    input_size: tuple[int, int]
    classes: int
    preprocessing: PreprocessingSpec
    in_graph: bool
    labels: tuple[str, ...] | None

    @property
    def crop(self) -> tuple[int, str]:
        """How photographs are cropped."""
        return self.preprocessing.crop_padding, self.preprocessing.interpolation

    @property
    def normalization(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """`(mean, std)`, three values each: the input is (pixel - mean) / std."""
        return (
            ((0.0,) * _CHANNELS, (1.0,) * _CHANNELS)
            if self.in_graph
            else one_step(self.preprocessing)
        )

    def takes_images_of(self, other: OpenedFile) -> bool:
        """Whether both are given the same images."""
        numbers = zip(sum(self.normalization, ()), sum(other.normalization, ()), strict=True)
        return (self.input_size, self.crop) == (other.input_size, other.crop) and all(
            math.isclose(mine, its, rel_tol=_ROUNDING, abs_tol=_ROUNDING) for mine, its in numbers
        )

    def describe(self) -> str:
        """What it takes and gives, for messages."""
        height, width = self.input_size
        padding, interpolation = self.crop
        if self.in_graph:
            pixels = "as they are"
        else:
            mean, std = (", ".join(f"{x:.6g}" for x in values) for values in self.normalization)
            pixels = f"as (pixel - mean) / std with mean {mean} and std {std}"
        return (
            f"{height} x {width} pixels {pixels}, cropped with a padding of {padding} and "
            f"{interpolation}, {self.classes} classes"
        )


def check_weights(weights: str) -> None:
    """Raises UsageError if --weights is no name of a training, nor a file, nor none."""
    from keras_effnet.weights import weights_names

    names = ("none", *weights_names())
    if weights not in names and not Path(weights).exists():
        raise UsageError(
            f"--weights: there is no {weights!r}. Pass a file, or one of: {', '.join(names)}."
        )


def one_step(preprocessing: PreprocessingSpec) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """An input transform as one step on pixels in 0..255.

    Args:
        preprocessing: The transform `(x * scale + offset - mean) / std`.

    Returns:
        `(mean, std)` of the same transform `(x - mean) / std`, three values each.
    """
    scale, offset = preprocessing.scale, preprocessing.offset
    means = preprocessing.mean or (0.0,) * _CHANNELS
    stds = preprocessing.std or (1.0,) * _CHANNELS
    return tuple((mean - offset) / scale for mean in means), tuple(std / scale for std in stds)


def add_files(parser: argparse.ArgumentParser, *, several: bool) -> None:
    """Adds the arguments that name the files and say how their images are made."""
    if several:
        parser.add_argument(
            "files", metavar="FILE", nargs="+", help="a .keras, .tflite or .onnx file"
        )
    else:
        parser.add_argument("file", metavar="FILE", help="a .keras, .tflite or .onnx file")
    group = parser.add_argument_group("images")
    group.add_argument(
        "--model",
        metavar="NAME",
        help="the variant whose crop is used, where the file does not tell, e.g. EfficientNetV2B0",
    )
    group.add_argument(
        "--mean",
        metavar="X",
        type=float,
        help="of pixels in 0..255, where the file does not tell: the input is (pixel - mean) / std "
        "(default: pixels as they are)",
    )
    group.add_argument("--std", metavar="X", type=float, help="see --mean")
    add_crop(group)
    group.add_argument(
        "--labels",
        metavar="FILE",
        help="the model's classes, where the file does not tell: a text file with one name per "
        "line, or a .csv with index, id (or wnid) and name",
    )
    parser.add_argument(
        "--threads",
        metavar="N",
        type=common.positive_int,
        help="of the runtime (default: its own choice)",
    )


def add_crop(group: argparse._ArgumentGroup) -> None:
    """Adds the argument on how photographs become inputs, which all commands on images share."""
    group.add_argument(
        "--crop",
        choices=("published", "center", "stretch"),
        default="published",
        help="the variant's published evaluation crop, the centre without resizing, or the whole "
        "image out of proportion (default: published)",
    )


def check_files(args: argparse.Namespace, paths: list[str]) -> None:
    """Raises UsageError for what the arguments alone can tell."""
    for path in paths:
        if Path(path).suffix.lower() not in FORMATS:
            raise UsageError(
                f"A model is a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file. Received: {path!r}"
            )
        if not Path(path).is_file():
            raise UsageError(f"There is no file {path!r}.")
    if (args.mean is None) != (args.std is None):
        raise UsageError("--mean and --std are given together or not at all.")
    if args.std is not None and not args.std > 0:
        raise UsageError(f"--std must be positive. Received: {args.std:g}")
    if args.model is not None:
        common.checked(get_spec, args.model)
    if args.labels is not None and not Path(args.labels).is_file():
        raise UsageError(f"--labels: there is no {args.labels!r}.")


def open_file(path: str, args: argparse.Namespace) -> OpenedFile:
    """Opens a file.

    Args:
        path: Of the file.
        args: With the arguments of `add_files`.

    Returns:
        The model.

    Raises:
        ImportError: If its runtime is not installed; the message says how to install it.
        ValueError: If it is damaged, or reads no RGB images, or gives no vector of scores.
    """
    opened = {KERAS: _open_keras, TFLITE: _open_tflite, ONNX: _open_onnx}[Path(path).suffix.lower()]
    predict, shapes, told = opened(path, args)
    read, given = shapes
    if len(read) != 4 or read[-1] != _CHANNELS or len(given) != 2 or min(read[1:3]) < 1:
        raise ValueError(
            "The model must read RGB images (batch, height, width, 3) of a known size and give "
            f"(batch, classes). Received: {path!r} with the shapes {read} and {given}"
        )
    if read[1] * read[2] > _LARGEST_INPUT or given[-1] > _MOST_CLASSES:
        raise ValueError(
            f"A model reads at most {_LARGEST_INPUT:,} pixels and gives at most {_MOST_CLASSES:,} "
            f"classes. Received: {path!r} with the shapes {read} and {given}: it is damaged, or no "
            "classifier of photographs."
        )
    spec = get_spec(args.model) if args.model is not None else find_spec(told.get("name", ""))
    if spec is None and args.crop == "published":
        common.say(
            f"{path} does not tell its variant: images are cropped as EfficientNet V1 does, unless "
            "--model names another."
        )
    preprocessing = PreprocessingSpec() if spec is None else spec.preprocessing
    mean, std = told.get("mean", (0.0,)), told.get("std", (1.0,))
    if args.mean is not None:
        mean, std = (args.mean,), (args.std,)
    in_graph = not any(mean) and all(value == 1 for value in std)
    if not in_graph:
        preprocessing = PreprocessingSpec(
            scale=1.0,
            offset=0.0,
            mean=tuple(mean) * (_CHANNELS // len(mean)),
            std=tuple(std) * (_CHANNELS // len(std)),
            crop_padding=preprocessing.crop_padding,
            interpolation=preprocessing.interpolation,
        )
    labels = told.get("labels")
    if labels is not None and len(labels) != given[-1]:
        raise ValueError(
            f"{path!r} names {len(labels)} classes and has {given[-1]}: it is damaged, or its "
            "metadata belong to another model."
        )
    return OpenedFile(
        path=path,
        size=Path(path).stat().st_size,
        predict=predict,
        input_size=tuple(read[1:3]),
        classes=given[-1],
        preprocessing=preprocessing,
        in_graph=in_graph,
        labels=labels,
    )


def read_classes(args: argparse.Namespace, file: OpenedFile) -> Labels | None:
    """The classes, of --labels or else of the file; None if neither tells.

    Raises:
        UsageError: If --labels are unreadable or of another number than the classes.
    """
    from keras_effnet.data import Labels, read_labels

    if args.labels is None:
        if file.labels is None or len(set(file.labels)) < len(file.labels):
            # Two classes of one name, as ImageNet has, cannot tell folders apart.
            return None
        return Labels(file.labels)
    labels = common.checked(read_labels, args.labels)
    if len(labels) != file.classes:
        raise UsageError(
            f"{args.labels!r} names {len(labels)} classes, but {file.path!r} has {file.classes}. "
            "Pass the labels of this model."
        )
    return labels


def class_names(args: argparse.Namespace, file: OpenedFile) -> tuple[str, ...]:
    """Readable names of the classes; their indices where nothing tells."""
    labels = read_classes(args, file)
    if labels is not None:
        return labels.names
    return file.labels or tuple(str(index) for index in range(file.classes))


def folder_names(images: ImageDataset, names: tuple[str, ...]) -> tuple[str, ...]:
    """Names of classes that are the folders of labelled photographs.

    Args:
        images: From a folder of one sub-folder per class.
        names: What classes without images are called.

    Returns:
        The names, in the order of the classes.
    """
    found = dict(enumerate(names))
    for path, label in zip(images.paths, images.labels, strict=True):
        found[int(label)] = path.parent.name
    return tuple(found[index] for index in range(len(names)))


def open_data(
    path: str,
    file: OpenedFile,
    args: argparse.Namespace,
    *,
    labels: Labels | None = None,
    samples: int | None = None,
) -> ImageDataset:
    """Opens images as a file takes them, and tells which cannot be read."""
    from keras_effnet.data import open_images

    images = open_images(
        path,
        file.input_size,
        preprocessing=file.preprocessing,
        in_graph_preprocessing=file.in_graph,
        labels=labels,
        classes=file.classes,
        crop=args.crop,
        samples=samples,
        seed=getattr(args, "seed", 0),
        strict=getattr(args, "strict", False),
    )
    for skipped, reason in images.skipped:
        common.say(f"skipped {skipped}: {reason}")
    return images


def find_spec(name: str) -> ModelSpec | None:
    """The spec of a name, or None if there is none."""
    try:
        return get_spec(name)
    except ValueError:
        return None


def _open_keras(path: str, args: argparse.Namespace):
    from keras_effnet.cli.exporting import load_model

    common.start_tensorflow()
    from keras_effnet.export.to_tflite import reads_pixels

    model = load_model(path)
    told = {"name": model.name}
    spec = find_spec(model.name)
    if spec is not None and not reads_pixels(model):
        told["mean"], told["std"] = one_step(spec.preprocessing)
    return model.predict_on_batch, (model.input_shape, model.output_shape), told


def _open_tflite(path: str, args: argparse.Namespace):
    from keras_effnet.export import TFLiteRunner, read_metadata, read_tflite
    from keras_effnet.export.probe import check_runs

    read_tflite(path)
    check_runs(path)
    runner = TFLiteRunner(path, threads=args.threads)
    metadata = read_metadata(path)
    told = {}
    if metadata is not None:
        told = {
            "name": metadata.name,
            "mean": metadata.mean,
            "std": metadata.std,
            "labels": metadata.labels,
        }
    shapes = runner.file.inputs[0].shape, runner.file.outputs[0].shape
    return runner.predict, shapes, told


def _open_onnx(path: str, args: argparse.Namespace):
    from keras_effnet.export import ONNXRunner

    runner = ONNXRunner(path, threads=args.threads)
    told: dict[str, Any] = {}
    metadata = runner.file.metadata
    if "variant" in metadata:
        told["name"] = metadata["variant"]
    try:
        transform = json.loads(metadata.get("preprocessing", "{}"))
        if "labels" in metadata:
            told["labels"] = tuple(json.loads(metadata["labels"]))
        if {"scale", "offset", "mean", "std"} <= set(transform):
            fields = {name: transform[name] for name in ("scale", "offset", "mean", "std")}
            told["mean"], told["std"] = one_step(PreprocessingSpec(**fields))
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"The metadata of {path!r} are damaged: {error}.") from error
    read = runner.file.inputs[0].shape
    if len(read) == 4 and runner.channels_first:
        read = (read[0], *read[2:], read[1])
    return runner.predict, (read, runner.file.outputs[0].shape), told
