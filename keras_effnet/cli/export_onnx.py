"""export a model as an ONNX file, and verify it in onnxruntime

With --quantization int8 the file holds the integers of this package's quantizer between quantize
and dequantize pairs, which onnxruntime turns into integer kernels; how many operators stay in float
is counted in the graph that it runs. After the file is written it is run in onnxruntime and
compared with the Keras model: on the evaluation images, else on some of the calibration images,
else on random ones.

examples:
  keras-effnet export-onnx --model EfficientNetV2B0 --output v2b0.onnx
  keras-effnet export-onnx --model EfficientNetB0 --classes 5 --weights flowers.weights.h5 \\
      --labels flowers.txt --quantization int8 --calibration-data photos/train \\
      --evaluation-data photos/validation --output flowers.onnx --report flowers.json
  keras-effnet export-onnx --keras-model mine.keras --layout nchw --dynamic-batch --output m.onnx
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keras_effnet.cli import exporting

if TYPE_CHECKING:
    import keras

    from keras_effnet.export import ONNXExport
    from keras_effnet.export.verify import Predictor

_RUNTIME = "onnxruntime"


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    exporting.add_model(parser)
    export = parser.add_argument_group("file")
    exporting.add_output(export)
    export.add_argument(
        "--quantization",
        choices=("float32", "int8"),
        default="float32",
        help="int8 quarters the size and computes on integers (default: float32)",
    )
    export.add_argument(
        "--io-dtype",
        choices=("uint8", "int8", "float32"),
        help="type of input and output (default: uint8 for int8 files, which are then given "
        "pixels as they are, else float32)",
    )
    export.add_argument(
        "--activation-dtype",
        choices=("uint8", "int8"),
        help="of int8 files, the type of kernels and of the tensors between: int8 is for ARM, "
        "elsewhere onnxruntime is slow with it, or wrong (default: uint8)",
    )
    export.add_argument(
        "--opset",
        metavar="N",
        type=int,
        default=17,
        help="version of the operators, 13 to 21 (default: 17)",
    )
    export.add_argument(
        "--layout",
        choices=("nhwc", "nchw"),
        default="nhwc",
        help="order of the axes of the input that the file will be given (default: nhwc)",
    )
    export.add_argument(
        "--dynamic-batch", action="store_true", help="leave the batch size open (default: 1)"
    )
    export.add_argument(
        "--external-data",
        action="store_true",
        help="write the weights into a file of their own, OUTPUT.data",
    )
    exporting.add_quantization(parser)
    exporting.add_images(parser)
    exporting.add_verification(parser, _RUNTIME)


def run(args: argparse.Namespace) -> None:
    """Runs the command.

    Raises:
        UsageError: If the arguments cannot work.
        Exception: Whatever goes wrong later.
    """
    form = exporting.Format(_RUNTIME, _check, _write, _open, _warnings, _describe)
    exporting.run(args, form)


def _check(args: argparse.Namespace) -> None:
    from keras_effnet.export.files import check_target
    from keras_effnet.export.to_onnx import check_options

    if args.activation_dtype is not None and args.quantization != "int8":
        raise ValueError(
            "--activation-dtype belongs to --quantization int8. "
            f"Received: --quantization {args.quantization}"
        )
    check_options(args.quantization, args.io_dtype, args.opset, args.layout)
    if args.external_data:
        check_target(f"{args.output}.data", overwrite=args.overwrite)


def _write(
    args: argparse.Namespace,
    source: exporting.Source,
    model: keras.Model,
    calibration: exporting.Calibration | None,
) -> ONNXExport:
    from keras_effnet.export import to_onnx

    return to_onnx(
        model,
        args.output,
        quantization=args.quantization,
        opset=args.opset,
        layout=args.layout,
        dynamic_batch=args.dynamic_batch,
        io_dtype=args.io_dtype,
        activation_dtype=args.activation_dtype or "uint8",
        external_data=args.external_data,
        labels=None if source.labels is None else source.labels.names,
        preprocessing=_preprocessing(source),
        overwrite=args.overwrite,
    )


def _preprocessing(source: exporting.Source) -> dict[str, Any]:
    """What whoever runs the file has to do with a photograph."""
    spec = source.preprocessing
    transform = {
        "interpolation": spec.interpolation,
        "crop_padding": spec.crop_padding,
        "scale": 1.0,
        "offset": 0.0,
        "mean": [0.0] * 3,
        "std": [1.0] * 3,
    }
    if not source.in_graph:
        transform |= {"scale": spec.scale, "offset": spec.offset}
        if spec.mean is not None:
            transform |= {"mean": list(spec.mean), "std": list(spec.std)}
    return transform


def _open(path: Path, args: argparse.Namespace) -> Predictor:
    from keras_effnet.export import ONNXRunner

    return ONNXRunner(path, threads=args.threads).predict


def _warnings(args: argparse.Namespace, export: ONNXExport) -> list[str]:
    floats = export.optimized.float_ops
    if args.quantization != "int8" or not floats:
        return []
    return [
        f"onnxruntime computes {export.optimized.float_nodes} operators of this int8 file in float "
        f"on this processor: {exporting.listing(floats)}."
    ]


def _describe(export: ONNXExport) -> list[str]:
    lines = [f"onnxruntime runs: {exporting.listing(export.optimized.ops)}"]
    if export.external_data is not None:
        size = export.external_data.stat().st_size
        lines.append(f"Weights: {export.external_data} ({size:,} bytes)")
    return lines
