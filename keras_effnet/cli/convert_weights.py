"""convert weights of TensorFlow, PyTorch or keras.applications into one .keras file

Reads TensorFlow checkpoints of the official repositories (V1, Lite, EdgeTPU, V2; also inside the
.tar.gz that they publish), PyTorch files of timm, torchvision and EfficientNet-PyTorch (.pth, .bin,
.safetensors), and files of Keras. Whose names a file has and which variant it is are found; nothing
in it is executed, and every tensor is accounted for. The .keras file holds the whole model, with
the padding, preprocessing and crop that belong to the weights. --list tells which official files
exist.

examples:
  keras-effnet convert-weights --list "EfficientNetB0"
  keras-effnet convert-weights --weights noisy_student_efficientnet-b0.tar.gz --output b0.keras
  keras-effnet convert-weights --weights advprop/efficientnet-b0.tar.gz --preprocessing advprop \\
      --output b0.keras
  keras-effnet convert-weights --weights tf_efficientnet_lite0/model.safetensors \\
      --output lite0.keras
"""

from __future__ import annotations

import argparse

from keras_effnet.cli import common
from keras_effnet.cli.common import UsageError


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--weights",
        metavar="PATH",
        help="the file to convert; of a TensorFlow checkpoint also its prefix or its folder",
    )
    what.add_argument(
        "--list",
        metavar="PATTERN",
        nargs="?",
        const="*",
        help="list the official files of the variants of such a name (default: all), and stop",
    )
    parser.add_argument("--output", metavar="FILE.keras", help="the file to write")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the output file if it exists"
    )
    parser.add_argument(
        "--model", metavar="NAME", help="the variant, where it is not to be found by itself"
    )
    parser.add_argument(
        "--layout",
        metavar="NAME",
        help="whose names the file has: tensorflow, timm, timm-tf (timm's models tf_…), "
        "torchvision, lukemelas or keras (default: found by the names)",
    )
    parser.add_argument(
        "--no-ema",
        action="store_true",
        help="take the weights of the last step in place of their moving average",
    )
    parser.add_argument(
        "--preprocessing",
        metavar="NAME",
        help="imagenet or advprop, where it is not the usual one; AdvProp's checkpoints need it",
    )


def run(args: argparse.Namespace) -> None:
    """Runs the command.

    Raises:
        UsageError: If the arguments cannot work.
        Exception: Whatever goes wrong later.
    """
    if args.list is not None:
        print(_listing(args.list))
        return
    if args.output is None:
        raise UsageError("--output is missing: the .keras file to write.")
    if not args.output.endswith(".keras"):
        raise UsageError(f"--output is a .keras file. Received: {args.output!r}")
    from keras_effnet.export.files import check_target

    common.checked(check_target, args.output, overwrite=args.overwrite)
    common.start_tensorflow()
    from keras_effnet.conversion import LAYOUTS, PREPROCESSINGS, convert_weights
    from keras_effnet.export._console import native_logs_muted
    from keras_effnet.specs import get_spec

    for option, value, allowed in (
        ("--layout", args.layout, LAYOUTS),
        ("--preprocessing", args.preprocessing, PREPROCESSINGS),
    ):
        if value is not None and value not in allowed:
            raise UsageError(f"{option} must be one of {', '.join(allowed)}. Received: {value!r}")
    if args.model is not None:
        common.checked(get_spec, args.model)
    with native_logs_muted():
        conversion = convert_weights(
            args.weights,
            args.output,
            model=args.model,
            layout=args.layout,
            ema=not args.no_ema,
            preprocessing=args.preprocessing,
            overwrite=args.overwrite,
        )
    spec = conversion.spec
    transform = spec.preprocessing
    classes = "no classifier" if conversion.classes is None else f"{conversion.classes} classes"
    print(f"variant        {spec.constructor}, {classes}")
    print(f"layout         {conversion.layout}")
    print(f"tensors        {conversion.tensors} taken, {len(conversion.ignored)} ignored")
    print(f"padding        {spec.padding}")
    print(
        f"preprocessing  x * {transform.scale:.6g} + {transform.offset:.6g}, "
        f"mean {transform.mean}, std {transform.std}"
    )
    print(
        f"input          {spec.resolution} x {spec.resolution}, crop padding "
        f"{transform.crop_padding}, {transform.interpolation}"
    )
    common.say(f"Written: {args.output}")


def _listing(pattern: str) -> str:
    from keras_effnet.cli.tables import text_table
    from keras_effnet.specs import SPECS
    from keras_effnet.weights import list_weights

    sources = list_weights(pattern)
    if not sources:
        raise UsageError(
            f"No official file of a variant with a name like {pattern!r}. All variants: "
            f"{', '.join(SPECS)}"
        )
    cells = [("variant", "weights", "top", "top-1", "from", "file", "address")]
    for source in sources:
        cells.append(
            (
                source.model,
                source.weights,
                "yes" if source.include_top else "no",
                "-" if source.top1 is None else f"{source.top1:.1f}",
                source.source,
                "checkpoint" if source.is_checkpoint else "Keras",
                source.url,
            )
        )
    return text_table(cells, left=(0, 1, 2, 4, 5, 6))
