"""Quantization-aware training of real models: with labels, by distillation, from few photographs.

    python benchmarks/qat.py [--work DIR] [--rows NAME ...] [--overwrite]

V1-B0 is trained as quantized on the flowers of `train`, with labels and by distillation without
any, each with the default equalization and with rescaling in its place; and V1-B0 and V2-B0 are
distilled on their 200 `calibration` photographs alone. Every row is one run of
`scripts/train_qat.py` with the options of the table; its files run in LiteRT on the `evaluation`
photographs, which nothing else sees.
Latencies are taken in one process, all files of a model in turns, with batch 1 and two threads.

A row takes 5 to 40 minutes on 2 cores. `--work DIR` keeps the runs, so that the same command goes
on after an interruption; delete it when the code that made them has changed. Writes
`benchmarks/results/qat.json` and `.md`. `--rows` chooses some, with wildcards: they are printed,
and with `--overwrite` they take the place of the same rows of the earlier results. Needs the
photographs and weights of ../shared beside the repository.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, ROOT, SHARED, describe_machine, machine_line, write_whole

PACKAGES = ("keras-effnet", "keras", "tensorflow", "ai-edge-litert", "numpy")
# V1-B0 is sure of nearly all photographs.
SOFT = "--temperature 4".split()
UNEQUALIZED = (
    "--corrections swish_rescaling,swish_splitting,learned_rounding,bias_correction,"
    "kernel_reconstruction --epochs 12"
).split()


@dataclass(frozen=True)
class Row:
    """One training.

    Args:
        case: Model and photographs, as of `onnx_export.MODELS`.
        part: Folder of the photographs that train.
        options: Of `train_qat.py`, beside the model and the photographs.
    """

    case: str
    part: str
    options: list[str]


ROWS = {
    "V1-B0, labels": Row("V1-B0", "train", SOFT),
    "V1-B0, labels, not equalized": Row("V1-B0", "train", SOFT + UNEQUALIZED),
    "V1-B0, distilled": Row("V1-B0", "train", ["--distill", *SOFT]),
    "V1-B0, distilled, not equalized": Row("V1-B0", "train", ["--distill", *SOFT, *UNEQUALIZED]),
    "V1-B0, distilled, 200 photographs": Row(
        "V1-B0", "calibration", ["--distill", *SOFT, "--equalize", "all"]
    ),
    "V2-B0, distilled, 200 photographs": Row("V2-B0", "calibration", ["--distill"]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", metavar="DIR", type=Path, help="keeps the runs")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="with wildcards (default: all)")
    parser.add_argument("--rounds", type=int, default=50, help="of latencies (default: 50)")
    parser.add_argument("--overwrite", action="store_true", help="replace earlier results")
    args = parser.parse_args()
    target = RESULTS / "qat.json"
    if args.rows is None and target.exists() and not args.overwrite:
        sys.exit(f"{target} exists; pass --overwrite to replace it")
    chosen = [
        name
        for name in ROWS
        if any(fnmatch.fnmatch(name, pattern) for pattern in args.rows or ["*"])
    ]
    with tempfile.TemporaryDirectory() as temporary:
        results = _measure(args.work or Path(temporary), chosen, args.rounds)
    if args.rows is None or args.overwrite:
        earlier = json.loads(target.read_text()) if args.rows and target.exists() else {}
        known = earlier | results
        results = {name: known[name] for name in ROWS if name in known}
        write_whole(target, json.dumps(results, indent=2) + "\n")
        write_whole(target.with_suffix(".md"), _markdown(results))
    print(_markdown(results))


def _measure(work: Path, chosen: list[str], rounds: int) -> dict[str, Any]:
    folders = {name: work / name.replace(", ", "-").replace(" ", "_") for name in chosen}
    results, machine = {}, describe_machine(PACKAGES)
    for name, folder in folders.items():
        report = _train(name, folder)
        rows = {row["name"]: row for row in report["rows"]}
        results[name] = {
            "machine": machine,
            "options": ROWS[name].options,
            "images": report["evaluation"]["images"],
            "minutes": sum(report["seconds"].values()) / 60,
            "training_minutes": report["seconds"]["training"] / 60,
            "float_top1": rows["Keras, float"]["top1"],
            "ptq": _scores(rows["PTQ"]),
            "qat": _scores(rows["QAT"]),
        }
    for case in dict.fromkeys(ROWS[name].case for name in chosen):
        own = {name: folders[name] for name in chosen if ROWS[name].case == case}
        for name, ratio in _latencies(own, rounds).items():
            results[name]["latency"] = ratio
    return results


def _train(name: str, folder: Path) -> dict[str, Any]:
    """Runs a row, or what is left of it."""
    from onnx_export import MODELS

    row, report = ROWS[name], folder / "report.json"
    if not report.exists():
        variant, classes, weights, photographs, crop = MODELS[row.case]
        data = SHARED / "data" / photographs
        command = [sys.executable, str(ROOT / "scripts" / "train_qat.py"), "--model", variant]
        command += ["--classes", str(classes), "--weights", str(SHARED / "weights" / weights)]
        for option, part in (("train", row.part), ("calibration",) * 2, ("evaluation",) * 2):
            command += [f"--{option}-data", str(data / part)]
        if (data / "classes.csv").exists():
            command += ["--labels", str(data / "classes.csv")]
        command += ["--crop", crop, *row.options, "--output-dir", str(folder)]
        begun = (folder / "checkpoint.npz").exists()
        print(f"{name} …", file=sys.stderr, flush=True)
        subprocess.run([*command, "--resume" if begun else "--overwrite"], check=True)
    return json.loads(report.read_text())


def _scores(row: dict[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in ("top1", "agreement", "sqnr_db", "bytes")}


def _latencies(folders: dict[str, Path], rounds: int) -> dict[str, float]:
    """The rows' latencies relative to float."""
    import onnx_export

    print("latency …", file=sys.stderr, flush=True)
    files = {name: folder / "qat.tflite" for name, folder in folders.items()}
    files["float"] = next(iter(folders.values())) / "float.tflite"
    runs: dict[str, Callable] = {name: onnx_export._runner(path)[1] for name, path in files.items()}
    found = onnx_export._latencies(runs, rounds)
    return {name: float(np.median(np.divide(found[name], found["float"]))) for name in folders}


def _markdown(results: dict[str, Any]) -> str:
    machines = list(dict.fromkeys(machine_line(row["machine"]) for row in results.values()))
    lines = [
        "# Quantization-aware training of real models",
        "",
        "Top-1 and agreement with the float Keras model are those of the `.tflite` files before "
        "(PTQ) and after training (QAT), in LiteRT, on photographs that took no part in "
        "calibration or training. V1-B0: 400 photographs of 5 flowers, trained on 1464 or on its "
        "200 calibration photographs; V2-B0: 200 of ImageNet, trained on its 200 calibration "
        "photographs. SQNR: power of the float model's outputs over that of the difference; it "
        "tells files apart that agree on as many photographs by chance. Minutes are those of the "
        "whole run, of which the training took the second figure. Latency: batch 1, 2 threads, "
        "LiteRT, relative to the float file, in turns with the other files of that run. Written by "
        "`benchmarks/qat.py`.",
        "",
        "| | float top-1 | PTQ top-1 | agreement | SQNR, dB | QAT top-1 | agreement | SQNR, dB | "
        "minutes | latency | machine |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, row in results.items():
        files = " | ".join(
            f"{each['top1']:.1%} | {each['agreement']:.1%} | {each['sqnr_db']:.1f}"
            for each in (row["ptq"], row["qat"])
        )
        lines.append(
            f"| {name} | {row['float_top1']:.1%} | {files} | "
            f"{row['minutes']:.0f} ({row['training_minutes']:.0f}) | {row['latency']:.2f} | "
            f"{machines.index(machine_line(row['machine'])) + 1} |"
        )
    lines += ["", "Machines, on the day of the measurement:", ""]
    lines += [f"{number}. {machine}" for number, machine in enumerate(machines, 1)]
    lines += ["", "Options of `train_qat.py`, beside the model and the photographs:", ""]
    lines += [
        f"- {name}: {'`' + ' '.join(row['options']) + '`' if row['options'] else 'none'}"
        for name, row in results.items()
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
