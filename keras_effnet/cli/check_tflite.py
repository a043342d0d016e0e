"""judge a .tflite file, of whatever origin, by the device that it is for

Tells which operators are mapped to the device's accelerator, which are not and why, where the graph
would split, whether the parameters fit on chip, and what to change. The exit code is 1 if the
device does not take the file as it is. --variants tells instead which variants of this package fit
on the Edge TPU.

examples:
  keras-effnet check-tflite flowers.tflite --target coral
  keras-effnet check-tflite downloaded.tflite --target android --json
  keras-effnet check-tflite --variants "EfficientNet*"
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keras_effnet.cli.common import UsageError
from keras_effnet.cli.tables import text_table
from keras_effnet.scaling import resolve
from keras_effnet.specs import SPECS, list_models

if TYPE_CHECKING:
    from keras_effnet.export.check import TargetReport

_SHOWN = 12


class NotTaken(Exception):
    """The device does not take the file; exit code 1."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument("file", metavar="FILE", nargs="?", help="a .tflite file")
    parser.add_argument(
        "--target",
        choices=("generic", "android", "coral"),
        default="coral",
        help="the device: any with LiteRT, Android, or Coral's Edge TPU (default: coral)",
    )
    parser.add_argument(
        "--variants",
        metavar="PATTERN",
        nargs="?",
        const="*",
        help="list the variants of such a name (default: all) with their int8 parameters and "
        "whether they stay on the Edge TPU's chip, and stop",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument(
        "--markdown", action="store_true", help="print the table of --variants in Markdown"
    )


def run(args: argparse.Namespace) -> None:
    """Runs the command.

    Raises:
        NotTaken: If the device does not take the file.
        UsageError: If the arguments cannot work.
        Exception: Whatever goes wrong later.
    """
    if (args.file is None) == (args.variants is None):
        raise UsageError("Either a FILE or --variants is needed.")
    if args.variants is not None:
        names = list_models(args.variants)
        if not names:
            raise UsageError(
                f"No variant has a name like {args.variants!r}. All variants: {', '.join(SPECS)}"
            )
        rows = variant_rows(names)
        if args.json:
            print(json.dumps(rows, indent=2))
        else:
            print(markdown(rows) if args.markdown else _variant_table(rows))
        return
    if args.markdown:
        raise UsageError("--markdown belongs to --variants.")
    if not Path(args.file).is_file():
        raise UsageError(f"There is no file {args.file!r}.")
    from keras_effnet.export.check import check_file

    report = check_file(args.file, args.target)
    if args.json:
        print(json.dumps({"file": args.file, **report.as_json()}, indent=2, ensure_ascii=False))
    else:
        print(_text(args.file, report))
    if not report.fits:
        raise NotTaken(f"{args.target} does not take {args.file!r} as it is.")


# One file


def _text(path: str, report: TargetReport) -> str:
    from keras_effnet.export.check import AT_RISK, MAPPED, NOT_MAPPED

    counts = [f"{report.count(MAPPED)} of {len(report.operators)} operators mapped"]
    for status in (AT_RISK, NOT_MAPPED):
        if report.count(status):
            counts.append(f"{report.count(status)} {status}")
    parts = [f"{path}: {report.size:,} bytes, for {report.title}\n{', '.join(counts)}"]
    cells = [("operator", "version", "count", "verdict")]
    cells += [
        (op, str(version), str(count), status)
        for (op, version, status), count in report.histogram().items()
    ]
    parts.append(text_table(cells, left=(0, 3)))
    doubtful = [verdict for verdict in report.operators if verdict.status != MAPPED]
    if doubtful:
        cells = [("#", "operator", "output", "verdict", "why")]
        cells += [
            (str(item.index), item.op, item.output[-40:], item.status, "; ".join(item.reasons))
            for item in doubtful[:_SHOWN]
        ]
        more = len(doubtful) - _SHOWN
        parts.append(
            text_table(cells, left=(1, 2, 3, 4))
            + (f"\n… and {more} more; --json shows all" if more > 0 else "")
        )
    if report.segments:
        shown = [f"{part.place} {part.first}-{part.last}" for part in report.segments[:_SHOWN]]
        more = len(report.segments) - _SHOWN
        parts.append(
            f"Pieces of the graph: {', '.join(shown)}"
            + (f" and {more} more" if more > 0 else "")
            + f"; {report.accelerated} operators run on the accelerator."
        )
    if report.cache_bytes is not None:
        verdict = "fit on chip" if report.fits_cache else "do not fit on chip: the rest is sent"
        parts.append(
            f"Parameters: {report.parameter_bytes:,} bytes; about {report.cache_bytes:,} can be "
            f"cached, so they {verdict}" + ("." if report.fits_cache else " for every image.")
        )
    changes = [*report.problems, *report.advice]
    if changes:
        parts.append("What to change:\n" + "\n".join(f"- {text}" for text in changes))
    parts.append(
        "Remarks:\n" + "\n".join(f"- {text} [{source}]" for text, source in report.remarks)
    )
    parts.append(f"Verdict: {'the target takes it' if report.fits else 'not as it is'}.")
    return "\n\n".join(parts)


# The variants


def variant_rows(names: list[str]) -> list[dict[str, Any]]:
    """Int8 parameters of variants at their own resolution with 1000 classes, and what is left.

    Args:
        names: Of the variants.

    Returns:
        Of each: `name`, `resolution`, `int8_bytes`, `cache_bytes`, `fits_cache`, `share` of the
        parameters that stays on chip.
    """
    from keras_effnet.export.targets import CORAL, TARGETS

    cache = TARGETS[CORAL].cache_bytes
    rows = []
    for name in names:
        spec = SPECS[name]
        size = resolve(spec).int8_bytes
        rows.append(
            {
                "name": spec.constructor,
                "resolution": spec.resolution,
                "int8_bytes": size,
                "cache_bytes": cache,
                "fits_cache": size <= cache,
                "share": min(1.0, cache / size),
            }
        )
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table in Markdown, as the guide to Coral has it."""
    lines = [
        "| variant | input | int8 parameters | on chip |",
        "| --- | --: | --: | --- |",
    ]
    for row in rows:
        lines.append(
            f"| `{row['name']}` | {row['resolution']} | {row['int8_bytes'] / 1e6:.1f} MB | "
            f"{_on_chip(row)} |"
        )
    return "\n".join(lines)


def _on_chip(row: dict[str, Any]) -> str:
    return "all" if row["fits_cache"] else f"{row['share']:.0%}"


def _variant_table(rows: list[dict[str, Any]]) -> str:
    cells = [("variant", "input", "int8 bytes", "on chip")]
    for row in rows:
        cells.append((row["name"], str(row["resolution"]), f"{row['int8_bytes']:,}", _on_chip(row)))
    return text_table(cells)
