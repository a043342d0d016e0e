"""export a model as a TFLite file, and verify it in LiteRT

The file has batch size 1. With --quantization int8 it is integer-only: there is no float tensor
between its input and its output, unless --keep-float asks for it. After it is written it is run in
LiteRT and compared with the Keras model: on the evaluation images, else on some of the calibration
images, else on random ones.

examples:
  keras-effnet export-tflite --model EfficientNetV2B0 --output v2b0.tflite
  keras-effnet export-tflite --model EfficientNetB0 --classes 5 --weights flowers.weights.h5 \\
      --labels flowers.txt --quantization int8 --calibration-data photos/train \\
      --evaluation-data photos/validation --output flowers.tflite --report flowers.json
  keras-effnet export-tflite --keras-model mine.keras --quantization float16 --output mine.tflite
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from keras_effnet.cli import exporting

if TYPE_CHECKING:
    import keras

    from keras_effnet.export import TFLiteExport
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
    exporting.run(args, exporting.Format(_RUNTIME, _check, _write, _open, _warnings))


def _check(args: argparse.Namespace) -> None:
    from keras_effnet.export.to_tflite import check_options

    check_options(args.quantization, args.io_dtype)


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
        overwrite=args.overwrite,
    )


def _open(args: argparse.Namespace) -> Predictor:
    from keras_effnet.export import TFLiteRunner

    return TFLiteRunner(args.output, threads=args.threads).predict


def _warnings(args: argparse.Namespace, export: TFLiteExport) -> list[str]:
    floats = len(export.file.inner_floats)
    if args.quantization != "int8" or not floats:
        return []
    return [f"{floats} tensors between input and output are float, as the model asks."]
