"""Opening models of any format to run them: `.keras`, `.tflite` and `.onnx`."""

from __future__ import annotations

import argparse
import json
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
    def images(self) -> tuple[Any, ...]:
        """What two files must share to be given the same images."""
        return self.input_size, self.preprocessing if not self.in_graph else None, self.crop

    @property
    def crop(self) -> tuple[int, str]:
        """How their photographs are cropped."""
        return self.preprocessing.crop_padding, self.preprocessing.interpolation


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
    group.add_argument(
        "--crop",
        choices=("published", "center", "stretch"),
        default="published",
        help="the variant's published evaluation crop, the centre without resizing, or the whole "
        "image out of proportion (default: published)",
    )
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
    spec = get_spec(args.model) if args.model is not None else _spec(told.get("name", ""))
    preprocessing = PreprocessingSpec() if spec is None else spec.preprocessing
    in_graph = told.get("in_graph", True)
    mean, std = told.get("mean", (0.0,)), told.get("std", (1.0,))
    if args.mean is not None:
        mean, std = (args.mean,), (args.std,)
    if any(mean) or any(value != 1 for value in std):
        in_graph = False
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


def _spec(name: str) -> ModelSpec | None:
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
    spec = _spec(model.name)
    if spec is not None and not reads_pixels(model):
        told |= {"in_graph": False}
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
            # (x * scale + offset - mean) / std, as one step on pixels.
            scale, offset = transform["scale"], transform["offset"]
            told["mean"] = tuple((mean - offset) / scale for mean in transform["mean"])
            told["std"] = tuple(std / scale for std in transform["std"])
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"The metadata of {path!r} are damaged: {error}.") from error
    read = runner.file.inputs[0].shape
    if len(read) == 4 and runner.channels_first:
        read = (read[0], *read[2:], read[1])
    return runner.predict, (read, runner.file.outputs[0].shape), told
