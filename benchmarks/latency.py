"""Accuracy against latency of int8 TFLite files: what equalization costs, and what training saves.

    python benchmarks/latency.py [--file CASE NAME FILE.tflite] … [--rounds N] [--overwrite | --add]

Of V1-B0 and V2-B0 with real weights: the float file, the plain converter's, and ours with no
swish equalized, with those that gain most for a share of all elements, with the default's, and with
all. Files that were made
elsewhere, such as by `keras-effnet train-qat` or `mobile_switch.py`, are added by `--file`; CASE is
V1-B0 or V2-B0. `--add` keeps the earlier results and measures such files alone, beside the float
file and the converter's. All files of a model run in LiteRT in turns in one process, batch 1, two
threads; the ratios are medians of the ratios of the rounds. Accuracy is that on the `evaluation`
photographs. Writes `benchmarks/results/latency.json`, `.md` and `.png`. Needs the photographs and
weights of ../shared beside the repository.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx_export
import quantization as peers
from common import RESULTS, describe_machine, machine_line, write_whole

FLOAT, CONVERTER, DEFAULT = "float32", "converter", "ours"
# `QuantizationConfig.equalize`, and the names of the files.
EQUALIZED = {"none": (), "10 %": 0.1, "25 %": 0.25, "50 %": 0.5, DEFAULT: "auto", "all": "all"}
# Times the converter's latency: what is slower is drawn at the edge, with its figure.
OFF_SCALE = 2.0
# File, what it is compared with, and the largest ratio of their latencies.
BARS = {
    "V1-B0": ((DEFAULT, CONVERTER, 1.25), ("QAT", CONVERTER, 0.95), ("QAT", FLOAT, 0.60)),
    "V2-B0": ((DEFAULT, CONVERTER, 0.88), ("QAT", CONVERTER, 0.88), (DEFAULT, FLOAT, 0.42)),
}


def write_files(folder: Path, case: str, equalized: dict[str, Any]) -> dict[str, Path]:
    """Writes our files and the converter's; returns them by name."""
    from keras_effnet.export import to_tflite
    from keras_effnet.quantization import QuantizationConfig, quantize_model

    model, _, _, _ = peers._open_model(case)
    images = np.load(folder / "calibration.npy")
    options = {"quantization": "int8", "io_dtype": "uint8", "overwrite": True}
    files = {FLOAT: folder / "float.tflite", CONVERTER: folder / "converter.tflite"}
    _say(f"{case}: the converter's …")
    batches = [images[first : first + peers.BATCH] for first in range(0, len(images), peers.BATCH)]
    to_tflite(model, files[CONVERTER], calibration_data=batches, **options)
    for name, chosen in equalized.items():
        _say(f"{case}: ours, equalized: {name} …")
        config = QuantizationConfig(equalize=chosen, batch_size=peers.BATCH)
        quantized = quantize_model(model, images, config, verbose=False)
        name = name if name == DEFAULT else f"{DEFAULT}, {name} equalized"
        files[name] = folder / f"{len(files)}.tflite"
        to_tflite(quantized, files[name], **options)
    return files


def measure(
    case: str, files: dict[str, Path], folder: Path, rounds: int, added: str = ""
) -> dict[str, Any]:
    """Scores and latencies of the files of a model; `added` tells of a later run."""
    from keras_effnet.export import TFLiteRunner
    from keras_effnet.export.verify import score

    images, labels, reference = (
        np.load(folder / f"{name}.npy") for name in ("images", "labels", "outputs")
    )
    _say(f"{case}: latency …")
    runs = {name: onnx_export._runner(path)[1] for name, path in files.items()}
    times = onnx_export._latencies(runs, rounds)
    _say(f"{case}: accuracy …")
    rows = {}
    for name, path in files.items():
        outputs = TFLiteRunner(path, threads=onnx_export.THREADS).predict(images)
        scores = score(name, outputs, reference, labels)
        rows[name] = {
            "top1": scores.top1,
            "agreement": scores.agreement,
            "bytes": path.stat().st_size,
            "milliseconds": float(np.median(times[name])),
            "of_converter": float(np.median(np.divide(times[name], times[CONVERTER]))),
            "of_float": float(np.median(np.divide(times[name], times[FLOAT]))),
        }
        if added:
            rows[name]["added"] = added
    return rows


def markdown(results: dict[str, Any]) -> str:
    """The results as a page."""
    lines = [
        "# Accuracy against latency of int8 TFLite files",
        "",
        f"{machine_line(results['machine'])} Load average before: {results['load']:.1f}.",
        "",
        "LiteRT, batch 1, two threads, all files of a model in turns. Written by "
        "`benchmarks/latency.py`.",
    ]
    for case, entry in results["cases"].items():
        rows = entry["files"]
        lines += [
            "",
            f"## {case}: float top-1 {entry['top1']:.1%}, {entry['images']} photographs, "
            f"{entry['parameters']:,} parameters",
            "",
            "| file | agreement | top-1 | bytes | of the parameters | ms | of the converter's | "
            "of float |",
            "|---|--:|--:|--:|--:|--:|--:|--:|",
        ]
        for name, row in rows.items():
            mark = "*" if "added" in row else ""
            lines.append(
                f"| {name}{mark} | {row['agreement']:.1%} | {row['top1']:.1%} | {row['bytes']:,} | "
                f"{row['bytes'] / entry['parameters']:.2f} | {row['milliseconds']:.2f} | "
                f"{row['of_converter']:.2f} | {row['of_float']:.2f} |"
            )
        lines.append("")
        for name, other, bar in BARS[case]:
            # Of several files of one kind, each is judged.
            for found in (row for row in rows if row == name or row.startswith(f"{name},")):
                if name == DEFAULT and found != DEFAULT:
                    continue
                ratio = rows[found]["of_float" if other == FLOAT else "of_converter"]
                verdict = "met" if ratio <= bar else "missed"
                lines.append(f"- {found} : {other} = {ratio:.2f}, at most {bar}: {verdict}")
        later = sorted({row["added"] for row in rows.values() if "added" in row})
        if later:
            lines += ["", f"\\* Measured beside the first two files in a later run: {later[-1]}"]
    return "\n".join(lines) + "\n\n![Accuracy against latency](latency.png)\n"


def draw(results: dict[str, Any], path: Path) -> None:
    """Agreement over latency, one panel for each model."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    for panel, (case, entry) in zip(
        figure.subplots(1, len(results["cases"]), squeeze=False)[0],
        results["cases"].items(),
        strict=True,
    ):
        rows = {name: row for name, row in entry["files"].items() if name != FLOAT}
        ours = sorted(
            (row["of_converter"], 100 * row["agreement"])
            for name, row in rows.items()
            if name.startswith(DEFAULT)
        )
        panel.plot(*zip(*ours, strict=True), color="0.8", zorder=1)
        edge = 1.05 * max(row["of_converter"] for row in rows.values() if not _is_off(row))
        for number, (name, row) in enumerate(rows.items()):
            off = _is_off(row)
            at = edge if off else row["of_converter"], 100 * row["agreement"]
            colour = "C0" if name.startswith(DEFAULT) else "C3" if name == CONVERTER else "C2"
            panel.scatter(*at, color=colour, zorder=2, marker=">" if off else "o")
            label = name.removeprefix("ours, ").removesuffix(" equalized")
            label += f": {row['of_converter']:.1f}" if off else ""
            trained = colour == "C2"
            above = number % 2 == 0
            panel.annotate(
                "default" if name == DEFAULT else label,
                at,
                xytext=(-8 if off else 8, -3) if trained else (0, 7 if above else -14),
                textcoords="offset points",
                ha=("right" if off else "left") if trained else "center",
                fontsize=8,
            )
        panel.set_title(f"{case} (ours: how much is equalized)", fontsize=10)
        panel.set_xlabel("latency, relative to the converter's int8 file")
        panel.set_ylabel("agreement with float, %")
        panel.margins(0.12, 0.15)
        panel.grid(color="0.92")
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=130, format="png")
    os.replace(temporary, path)


def _is_off(row: dict[str, Any]) -> bool:
    """Whether a file is so slow that it would squeeze the others together."""
    return row["of_converter"] > OFF_SCALE


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--file", nargs=3, action="append", default=[], metavar=("CASE", "NAME", "FILE")
    )
    parser.add_argument("--cases", nargs="+", choices=peers.CASES, default=list(peers.CASES))
    parser.add_argument("--rounds", type=int, default=50, help="of latencies (default: 50)")
    kept = parser.add_mutually_exclusive_group()
    kept.add_argument("--overwrite", action="store_true", help="replace earlier results")
    kept.add_argument(
        "--add", action="store_true", help="to earlier results, the given files alone"
    )
    args = parser.parse_args()
    target = RESULTS / "latency.json"
    if target.exists() and not (args.overwrite or args.add):
        sys.exit(f"{target} exists; pass --overwrite to replace it, or --add to keep it")
    if args.add and not target.exists():
        sys.exit(f"{target} does not exist, so nothing can be added to it")
    for case, _, path in args.file:
        if case not in args.cases or not Path(path).is_file():
            sys.exit(f"--file takes a case out of {args.cases} and a file. Received: {case} {path}")
    machine = {"machine": describe_machine(peers.PACKAGES), "load": os.getloadavg()[0]}
    results: dict[str, Any] = machine | {"cases": {}}
    equalized, added = EQUALIZED, ""
    if args.add:
        results = json.loads(target.read_text())
        equalized, added = {}, f"{machine_line(machine['machine'])} Load: {machine['load']:.1f}."
        args.cases = sorted({case for case, _, _ in args.file})
        for case, name, _ in args.file:
            if name in results["cases"][case]["files"]:
                sys.exit(f"{target} has {name!r} of {case} already: give the file another NAME")
    for case in args.cases:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / case
            folder.mkdir()
            entry = peers._prepare(folder, case)
            files = write_files(folder, case, equalized)
            files |= {name: Path(path) for own, name, path in args.file if own == case}
            entry["files"] = measure(case, files, folder, args.rounds, added)
            if args.add:
                earlier = results["cases"][case]["files"]
                new = {name: row for name, row in entry["files"].items() if name not in earlier}
                results["cases"][case]["files"] = earlier | new
            else:
                results["cases"][case] = entry
    text = markdown(results)
    write_whole(target, json.dumps(results, indent=2) + "\n")
    write_whole(target.with_suffix(".md"), text)
    draw(results, target.with_suffix(".png"))
    print(text)


if __name__ == "__main__":
    main()
