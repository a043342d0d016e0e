"""export a model as a TFLite file, and verify it in LiteRT

The file has batch size 1. With --quantization int8 it is integer-only: there is no float tensor
between its input and its output, unless --keep-float asks for it. With --target coral it has the
Edge TPU's operators alone. After it is written it is run in LiteRT and compared with the Keras
model: on the evaluation images, else on some of the calibration images, else on random ones.

examples:
  keras-effnet export-tflite --model EfficientNetV2B0 --output v2b0.tflite
  keras-effnet export-tflite --model EfficientNetB0 --classes 5 --weights flowers.weights.h5 \\
      --labels flowers.txt --quantization int8 --calibration-data photos/train \\
      --evaluation-data photos/validation --output flowers.tflite --report flowers.json
  keras-effnet export-tflite --keras-model mine.keras --quantization float16 --output mine.tflite
  keras-effnet export-tflite --keras-model mine.keras --quantization int8 --target coral \\
      --calibration-data photos/train --min-agreement 0.95 --output mine.tflite \\
      --html-report mine.html
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from keras_effnet.cli import exporting, opening

if TYPE_CHECKING:
    import keras

    from keras_effnet.export import ModelMetadata, TargetReport, TFLiteExport
    from keras_effnet.export.verify import Predictor

_RUNTIME = "LiteRT"


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    exporting.add_model(parser)
    export = parser.add_argument_group("file")
    exporting.add_output(export)
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
        "--target",
        choices=("generic", "android", "coral"),
        default="generic",
        help="the device: any with LiteRT, Android, or Coral's Edge TPU, which needs int8 "
        "(default: generic)",
    )
    metadata = parser.add_argument_group(
        "metadata", "what the file tells of itself, for MediaPipe and Android's tools"
    )
    metadata.add_argument("--name", metavar="TEXT", help="(default: the model's own)")
    metadata.add_argument("--description", metavar="TEXT", help="what the model does")
    metadata.add_argument("--model-version", metavar="TEXT", help="e.g. 1.0")
    metadata.add_argument("--author", metavar="TEXT", help="who made it")
    metadata.add_argument("--license", metavar="TEXT", help="under which it may be used")
    metadata.add_argument(
        "--no-metadata", action="store_true", help="leave them out, the labels too"
    )
    exporting.add_quantization(parser).add_argument(
        "--quantizer",
        choices=("core", "converter"),
        help="who calibrates: this package, or TensorFlow's converter (default: core)",
    )
    exporting.add_images(parser)
    exporting.add_verification(parser, _RUNTIME)


def run(args: argparse.Namespace) -> None:
    """Runs the command.

    Raises:
        UsageError: If the arguments cannot work.
        Exception: Whatever goes wrong later.
    """
    form = exporting.Format(_RUNTIME, _check, _write, _open, _warnings, judge=_judge)
    exporting.run(args, form)


def _check(args: argparse.Namespace) -> None:
    from keras_effnet.export.to_tflite import check_options

    check_options(args.quantization, args.io_dtype, args.target)
    if args.no_metadata:
        for name in ("name", "description", "model_version", "author", "license"):
            if getattr(args, name) is not None:
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} belongs to the metadata: drop --no-metadata.")


def _write(
    args: argparse.Namespace,
    source: exporting.Source,
    model: keras.Model,
    calibration: exporting.Calibration | None,
) -> TFLiteExport:
    from keras_effnet.export import to_tflite

    return to_tflite(
        model,
        args.output,
        quantization=args.quantization,
        calibration_data=calibration,
        io_dtype=args.io_dtype,
        target=args.target,
        metadata=None if args.no_metadata else _metadata(args, source),
        overwrite=args.overwrite,
    )


def _metadata(args: argparse.Namespace, source: exporting.Source) -> ModelMetadata:
    from keras_effnet.export import ModelMetadata

    mean, std = (0.0,), (1.0,)
    if not source.in_graph:
        mean, std = opening.one_step(source.preprocessing)
    return ModelMetadata(
        name=args.name or source.model.name,
        description=args.description or f"Image classifier of {source.classes} classes.",
        version=args.model_version or "",
        author=args.author or "",
        license=args.license or "",
        mean=mean,
        std=std,
        labels=None if source.labels is None else source.labels.names,
    )


def _judge(export: TFLiteExport) -> tuple[TargetReport, ...]:
    from keras_effnet.export import check_file
    from keras_effnet.export.targets import TARGETS

    return tuple(check_file(export.path, target) for target in TARGETS)


def _open(path: Path, args: argparse.Namespace) -> Predictor:
    from keras_effnet.export import TFLiteRunner

    return TFLiteRunner(path, threads=args.threads).predict


def _warnings(args: argparse.Namespace, export: TFLiteExport) -> list[str]:
    floats = len(export.file.inner_floats)
    if args.quantization != "int8" or not floats:
        return []
    return [f"{floats} tensors between input and output are float, as the model asks."]
