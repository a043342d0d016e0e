"""list the variants with their size and accuracy, and draw how the family scales

The counts are computed from the plans, no model is built. `phi` tells to which phi of compound
scaling each axis of a variant corresponds, relative to the unscaled variant of the same stages.
int8 bytes are those of the parameters in full-integer form; a file has some per cent more.

examples:
  keras-effnet family
  keras-effnet family "EfficientNetV2*" --csv
  keras-effnet family --output family.png
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from typing import Any

from keras_effnet.cli import common
from keras_effnet.cli.common import UsageError
from keras_effnet.cli.tables import text_table
from keras_effnet.scaling import COMPOUND, resolve
from keras_effnet.specs import SPECS, ModelSpec, list_models

_AXES = ("depth", "width", "resolution")


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument(
        "pattern",
        metavar="PATTERN",
        nargs="?",
        default="*",
        help='only variants of such a name, e.g. "EfficientNetB*" (default: all)',
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--csv", action="store_true", help="print comma-separated values")
    form.add_argument("--json", action="store_true", help="print a JSON list")
    form.add_argument("--markdown", action="store_true", help="print a Markdown table")
    parser.add_argument(
        "--output",
        metavar="FILE.png",
        help="draw multiply-adds and parameters against phi, compound and along one axis alone",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the output file if it exists"
    )


def run(args: argparse.Namespace) -> None:
    """Runs the command.

    Raises:
        UsageError: If the arguments cannot work.
        ImportError: If the plot is asked for and matplotlib is not installed.
        OSError: If the plot cannot be written.
    """
    from keras_effnet.export.files import check_target, write_whole

    names = list_models(args.pattern)
    if not names:
        raise UsageError(
            f"No variant has a name like {args.pattern!r}. All variants: {', '.join(SPECS)}"
        )
    if args.output is not None:
        if not args.output.lower().endswith(".png"):
            raise UsageError(f"--output is a PNG file. Received: {args.output!r}")
        common.checked(check_target, args.output, overwrite=args.overwrite)
    rows = [row(SPECS[name]) for name in names]
    if args.output is not None:
        from keras_effnet.plotting import draw_family, png

        write_whole(args.output, png(draw_family()), overwrite=args.overwrite)
    if args.json:
        print(json.dumps(rows, indent=2))
    elif args.csv:
        writer = csv.DictWriter(sys.stdout, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    elif args.markdown:
        print(markdown(rows))
    else:
        print(_table(rows))
    if args.output is not None:
        common.say(f"Written: {args.output}")


def row(spec: ModelSpec) -> dict[str, Any]:
    """What is known of a variant, as plain values; None where nothing is."""
    plan = resolve(spec)
    # Of which variant this one is a scaling, if of any.
    relatives = [other for other in SPECS.values() if other.stages == spec.stages]
    base = next(other for other in relatives if other.width == other.depth == 1)
    phi = COMPOUND.phi_of(spec, base) if len(relatives) > 1 else dict.fromkeys(_AXES)
    published = spec.published
    return {
        "name": spec.constructor,
        "resolution": spec.resolution,
        "parameters": plan.parameters,
        "multiply_adds": plan.multiply_adds,
        "int8_bytes": plan.int8_bytes,
        "top1": None if published is None else published.top1,
        **{f"phi_{axis}": None if phi[axis] is None else round(phi[axis], 2) for axis in _AXES},
        "source": None if published is None else published.source,
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table in Markdown, as the README has it."""
    header = ("variant", "input", "parameters", "multiply-adds", "top-1 (published)", "source")
    lines = [header, ("---", "--:", "--:", "--:", "--:", "---")]
    for each in rows:
        lines.append(
            (
                f"`{each['name']}`",
                str(each["resolution"]),
                f"{each['parameters'] / 1e6:.1f} M",
                f"{each['multiply_adds'] / 1e9:.3g} G",
                _number(each["top1"], ".1f"),
                each["source"] or "for images of 32 x 32, ours",
            )
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def _table(rows: list[dict[str, Any]]) -> str:
    cells = [
        (
            "variant",
            "input",
            "parameters",
            "multiply-adds",
            "int8 bytes",
            "top-1",
            *(f"phi {axis}" for axis in _AXES),
            "accuracy from",
        )
    ]
    for each in rows:
        cells.append(
            (
                each["name"],
                str(each["resolution"]),
                f"{each['parameters']:,}",
                f"{each['multiply_adds'] / 1e9:.3g} G",
                f"{each['int8_bytes']:,}",
                _number(each["top1"], ".1f"),
                *(_number(each[f"phi_{axis}"], ".1f") for axis in _AXES),
                each["source"] or "-",
            )
        )
    return text_table(cells, left=(0, 9))
