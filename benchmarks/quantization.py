"""Full-integer quantization: every range method and every correction, beside three peers.

    python benchmarks/quantization.py --ai-edge-python PYTHON [--resume FILE] [--overwrite]

Of V1-B0 and V2-B0 with real weights, calibrated on the `calibration` photographs and measured on
the `evaluation` photographs alone: every range method without corrections; every correction alone,
with the default method; the default without each of its corrections, and with each that it leaves
out; the default; and, as peers, `tf.lite.TFLiteConverter`, ai-edge-quantizer on our float file,
and onnxruntime's `quantize_static` (percentile, per channel) on our float file.

Every file is made in a fresh process, whose largest resident set is the peak memory, and runs in
LiteRT (onnxruntime where it is its own). Latencies are taken in one process, all files in turns,
with batch 1 and two threads; the ratio to the converter's file is the median of the ratios of the
rounds. ai-edge-quantizer lives in an environment of its own, whose interpreter is PYTHON (`pip
install ai-edge-quantizer lazy_loader`); without it, its rows say so.

Rows take minutes: `--resume FILE` keeps the finished ones in a JSON, and what they wrote in a
folder beside it, so that an interrupted run goes on; delete both when the code that made them has
changed. `--cases` and `--rows` choose some, with wildcards; the table is then printed and nothing
is written. Otherwise writes `benchmarks/results/quantization.json`, `.md` and `.png`. Needs the
photographs and weights of ../shared beside the repository.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, SHARED, describe_machine, machine_line, write_whole

PACKAGES = ("keras-effnet", "keras", "tensorflow", "ai-edge-litert", "onnxruntime", "numpy")
THREADS = 2
CALIBRATION_IMAGES = 200
BATCH = 8
# Probabilities are clipped to half a level of the files' output before their KL is taken.
LEAST_PROBABILITY = 1 / 512
CASES = ("V1-B0", "V2-B0")
CONVERTER, AI_EDGE, ONNXRUNTIME = "converter", "ai-edge-quantizer", "onnxruntime percentile"
RANGES, ALONE, LEFT_OUT, ADDED, WHOLE, PEER = (
    "ranges",
    "alone",
    "left out",
    "added",
    "default",
    "peer",
)
TITLES = {
    RANGES: "range method, no correction",
    ALONE: "one correction",
    LEFT_OUT: "default but one",
    ADDED: "default and one more",
    WHOLE: "default",
    PEER: "peer",
}
# Agreement and top-1 loss in points: what the default must reach, and what it aims at.
BARS = {"V1-B0": ((0.95, 1.0), (0.98, 0.3)), "V2-B0": ((0.98, 0.7), (0.99, 0.3))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, help="(default: all)")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="with wildcards (default: all)")
    parser.add_argument("--rounds", type=int, default=50, help="of latencies (default: 50)")
    parser.add_argument("--ai-edge-python", metavar="PYTHON", help="has ai-edge-quantizer")
    parser.add_argument("--resume", metavar="FILE", type=Path, help="JSON of the finished rows")
    parser.add_argument("--overwrite", action="store_true", help="replace earlier results")
    parser.add_argument("--step", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        _run_step(*args.step)
        return
    target = RESULTS / "quantization.json"
    whole = not (args.cases or args.rows)
    if whole and target.exists() and not args.overwrite:
        sys.exit(f"{target} exists; pass --overwrite to replace it")
    if args.resume is None:
        with tempfile.TemporaryDirectory() as folder:
            results = _measure(args, Path(folder) / "rows.json")
    else:
        results = _measure(args, args.resume)
    text = _markdown(results)
    if whole:
        write_whole(target, json.dumps(results, indent=2) + "\n")
        write_whole(target.with_suffix(".md"), text)
        _draw(results, target.with_suffix(".png"))
    print(text)


# The parent process, which stays small: a child's largest resident set counts from its fork.


def _measure(args: argparse.Namespace, finished: Path) -> dict[str, Any]:
    """Makes and measures the files of the chosen rows that are not finished."""
    kept = json.loads(finished.read_text()) if finished.exists() else {}
    folder = finished.with_suffix("")
    plan, _ = _child(["plan", str(folder)])
    chosen = [
        row
        for row in plan
        # Latencies are relative to the converter.
        if row == CONVERTER or any(fnmatch.fnmatch(row, name) for name in args.rows or ["*"])
    ]
    results = {"machine": describe_machine(PACKAGES), "load_average_before": os.getloadavg()}
    results |= {"threads": THREADS, "cases": {}}
    for case in args.cases or CASES:
        place = folder / case
        rows = kept.setdefault(case, {})
        if "float" not in rows:
            _say(f"{case}: photographs and float files …")
            rows["float"], _ = _child(["prepare", str(place), case])
            write_whole(finished, json.dumps(kept, indent=2))
        for row in chosen:
            if row in rows:
                continue
            if row == AI_EDGE and args.ai_edge_python is None:
                continue
            _say(f"{case}: {row} …")
            python = args.ai_edge_python if row == AI_EDGE else sys.executable
            load = os.getloadavg()[0]
            made, peak = _child(["quantize", str(place), row, json.dumps(plan[row])], python)
            scores, _ = _child(["score", str(place), row])
            rows[row] = made | scores | {"peak_gb": peak, "load_average_before": load}
            write_whole(finished, json.dumps(kept, indent=2))
        measured = [row for row in chosen if row in rows]
        _say(f"{case}: latency …")
        latencies, _ = _child(["latency", str(place), str(args.rounds), *measured])
        results["cases"][case] = {"float": rows["float"], "rows": {}}
        for row in chosen:
            entry = {"group": plan[row]["group"]}
            if row in rows:
                entry |= rows[row] | latencies[row]
            results["cases"][case]["rows"][row] = entry
    return results


def _child(step: list[str], python: str = sys.executable) -> tuple[dict[str, Any], float]:
    """What a step gives in a fresh process, and the process' peak gigabytes."""
    with tempfile.NamedTemporaryFile("r", suffix=".json") as answer:
        command = [python, __file__, "--step", answer.name, *step]
        with tempfile.TemporaryFile("w+") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                log.seek(0)
                sys.exit(f"{log.read()[-4000:]}\nexit code {process.returncode}: {step}")
        # ru_maxrss is in kibibytes on Linux.
        return json.load(answer), usage.ru_maxrss * 1024 / 1e9


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# The steps, each in a child process.


def _run_step(answer: str, name: str, folder: str, *rest: str) -> None:
    steps = {
        "plan": _plan,
        "prepare": _prepare,
        "quantize": _quantize,
        "score": _score,
        "latency": _latency,
    }
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(answer).write_text(json.dumps(steps[name](Path(folder), *rest)))


def _start() -> None:
    from keras_effnet.cli import common

    common.mute_native_logs()
    common.start_tensorflow()


def _plan(folder: Path) -> dict[str, dict[str, Any]]:
    """The rows by their names: their group and, of our own, their configuration."""
    _start()
    from keras_effnet.quantization import CORRECTIONS, QuantizationConfig
    from keras_effnet.quantization.ranges import METHODS

    default = QuantizationConfig()
    rows = {}

    def add(name: str, group: str, method: str, corrections: tuple[str, ...]) -> None:
        rows[name] = {"group": group, "method": method, "corrections": corrections}

    for method in METHODS:
        add(method, RANGES, method, ())
    for correction in CORRECTIONS:
        add(f"{default.method} + {correction}", ALONE, default.method, (correction,))
    for correction in default.corrections:
        others = tuple(name for name in default.corrections if name != correction)
        add(f"default but {correction}", LEFT_OUT, default.method, others)
    for correction in sorted(set(CORRECTIONS) - set(default.corrections)):
        both = (*default.corrections, correction)
        add(f"default + {correction}", ADDED, default.method, both)
    add("default", WHOLE, default.method, default.corrections)
    return rows | {name: {"group": PEER} for name in (CONVERTER, AI_EDGE, ONNXRUNTIME)}


def _open_model(case: str) -> tuple[Any, Any, dict[str, Any], Path]:
    """The float model, its labels, how its photographs are opened, and their folder."""
    from onnx_export import MODELS

    from keras_effnet import create_model, get_spec
    from keras_effnet.data import read_labels
    from keras_effnet.weights import load_weights

    variant, classes, weights, photographs, crop = MODELS[case]
    spec = get_spec(variant)
    model = create_model(spec, weights=None, classes=classes)
    load_weights(model, SHARED / "weights" / weights)
    data = SHARED / "data" / photographs
    names = data / "classes.csv"
    labels = read_labels(names) if names.exists() else None
    options = {"preprocessing": spec.preprocessing, "crop": crop}
    return model, labels, options, data


def _prepare(folder: Path, case: str) -> dict[str, Any]:
    """Decodes the photographs, runs the float model on them and writes the float files."""
    _start()
    from keras_effnet.data import open_images
    from keras_effnet.export import to_onnx, to_tflite

    model, labels, options, data = _open_model(case)
    size, classes = model.input_shape[1:3], model.output_shape[-1]
    calibration = open_images(
        data / "calibration", size, samples=CALIBRATION_IMAGES, **options
    ).batches(BATCH)
    calibration = np.concatenate([images for images, _ in calibration])
    evaluation = open_images(data / "evaluation", size, labels=labels, classes=classes, **options)
    images = np.concatenate([images for images, _ in evaluation.batches(BATCH)])
    model.predict(calibration[:BATCH], batch_size=BATCH, verbose=0)
    clock = _Clock()
    model.predict(calibration, batch_size=BATCH, verbose=0)
    predicted = clock.read()
    outputs = model.predict(images, batch_size=BATCH, verbose=0)
    np.save(folder / "calibration.npy", calibration)
    np.save(folder / "images.npy", images)
    np.save(folder / "labels.npy", evaluation.labels)
    np.save(folder / "outputs.npy", outputs)
    to_tflite(model, folder / "float.tflite", overwrite=True)
    to_onnx(model, folder / "float.onnx", overwrite=True)
    return {
        "images": len(images),
        "calibration": len(calibration),
        "top1": float(np.mean(outputs.argmax(axis=1) == evaluation.labels)),
        "predict": predicted,
        "parameters": model.count_params(),
    }


class _Clock:
    """Seconds since it was made: of the wall, and of this process on all cores."""

    def __init__(self) -> None:
        self.start = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        wall, processor = self.start
        return {
            "seconds": time.perf_counter() - wall,
            "cpu_seconds": time.process_time() - processor,
        }


def _file(folder: Path, row: str) -> Path:
    suffix = ".onnx" if row == ONNXRUNTIME else ".tflite"
    return folder / (row.replace(" ", "_") + suffix)


def _quantize(folder: Path, row: str, plan: str) -> dict[str, Any]:
    """Writes the file of a row. The seconds leave out what only opens model and photographs."""
    images = np.load(folder / "calibration.npy", mmap_mode="r")
    if row == AI_EDGE:
        return _ai_edge(folder, images)
    if row == ONNXRUNTIME:
        return _onnxruntime(folder, images)
    _start()
    from keras_effnet.export import to_tflite
    from keras_effnet.quantization import QuantizationConfig, quantize_model

    model, _, _, _ = _open_model(folder.name)
    options = {"quantization": "int8", "io_dtype": "uint8", "overwrite": True}
    clock = _Clock()
    if row == CONVERTER:
        batches = [images[first : first + BATCH] for first in range(0, len(images), BATCH)]
        to_tflite(model, _file(folder, row), calibration_data=batches, **options)
    else:
        chosen = json.loads(plan)
        config = QuantizationConfig(
            method=chosen["method"], corrections=chosen["corrections"], batch_size=BATCH
        )
        quantized = quantize_model(model, images, config, verbose=False)
        to_tflite(quantized, _file(folder, row), **options)
    return clock.read() | {"calibration": len(images)}


def _ai_edge(folder: Path, images: np.ndarray) -> dict[str, Any]:
    from importlib.metadata import version

    from ai_edge_quantizer import quantizer, recipe

    # A list: a generator would be used up by its counting of the samples.
    samples = [{"images": np.array(image)[None]} for image in images]
    clock = _Clock()
    tool = quantizer.Quantizer(str(folder / "float.tflite"), recipe.static_wi8_ai8())
    ranges = tool.calibrate({"serving_default": samples})
    tool.quantize(ranges).export_model(str(_file(folder, AI_EDGE)), overwrite=True)
    taken = clock.read()
    return taken | {"calibration": len(images), "version": version("ai-edge-quantizer")}


def _onnxruntime(folder: Path, images: np.ndarray) -> dict[str, Any]:
    import onnx_export

    clock = _Clock()
    onnx_export._quantize_static(
        folder / "float.onnx", _file(folder, ONNXRUNTIME), "Percentile", [images]
    )
    return clock.read() | {"calibration": onnx_export.HISTOGRAM_IMAGES}


def _score(folder: Path, row: str) -> dict[str, Any]:
    """Runs a file on the evaluation photographs."""
    _start()
    from keras_effnet.export import ONNXRunner, TFLiteRunner
    from keras_effnet.export.verify import score

    path = _file(folder, row)
    kind = ONNXRunner if row == ONNXRUNTIME else TFLiteRunner
    runner = kind(path, threads=THREADS)
    images, labels, reference = (
        np.load(folder / f"{name}.npy") for name in ("images", "labels", "outputs")
    )
    outputs = runner.predict(images)
    scores = score(row, outputs, reference, labels)
    exact, near = (
        np.maximum(part.astype(np.float64), LEAST_PROBABILITY) for part in (reference, outputs)
    )
    return {
        "agreement": scores.agreement,
        "top1": scores.top1,
        # Clipped probabilities do not sum to one; without the difference it might be negative.
        "kl": float(np.mean(np.sum(exact * np.log(exact / near) - exact + near, axis=1))),
        "bytes": path.stat().st_size,
    }


def _latency(folder: Path, rounds: str, *rows: str) -> dict[str, dict[str, float]]:
    _start()
    import onnx_export

    runs: dict[str, Callable] = {}
    for row in rows:
        _, runs[row] = onnx_export._runner(_file(folder, row))
    found = onnx_export._latencies(runs, int(rounds))
    return {
        row: {
            "milliseconds": float(np.median(times)),
            "ratio": float(np.median(np.divide(times, found[CONVERTER]))),
        }
        for row, times in found.items()
    }


# Results


def _markdown(results: dict[str, Any]) -> str:
    images = {
        entry["calibration"]
        for case in results["cases"].values()
        for row, entry in case["rows"].items()
        if row == ONNXRUNTIME and "calibration" in entry
    }
    lines = [
        "# Full-integer quantization: range methods, corrections and peers",
        "",
        f"{machine_line(results['machine'])} Load average before: "
        f"{results['load_average_before'][0]:.1f}.",
        "",
        "Agreement, top-1 and KL are those of the written file against the float Keras model, on "
        "photographs that took no part in the calibration. Seconds are those of quantizing and "
        "writing: of the wall, which other work on the machine lengthens, and of the processor, "
        "on all cores together. Peak memory is that of the whole process, with Python and "
        f"TensorFlow. Latency: batch 1, {results['threads']} threads, LiteRT, relative to the "
        "converter's file, all files in turns."
        + "".join(
            f" onnxruntime runs its own file, and calibrates on {count} photographs, since its "
            "percentiles keep all activations in memory."
            for count in images
        )
        + " Written by `benchmarks/quantization.py`.",
    ]
    for name, case in results["cases"].items():
        reference = case["float"]
        predict = reference["predict"]
        lines += [
            "",
            f"## {name}: float top-1 {reference['top1']:.1%}, {reference['images']} photographs, "
            f"{reference['parameters']:,} parameters",
            "",
            f"Keras' `predict` over the {reference['calibration']} calibration photographs takes "
            f"{predict['seconds']:.1f} s, {predict['cpu_seconds']:.1f} of the processor.",
            "",
            "| quantizer | agreement | top-1 | loss, points | KL | seconds | processor | peak GB "
            "| bytes | latency |",
            "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
        ]
        for row, entry in case["rows"].items():
            if "agreement" not in entry:
                lines.append(f"| {row} | not installed |" + " - |" * 8)
                continue
            label = f"{row} {entry['version']}" if "version" in entry else row
            lines.append(
                f"| {label} | {entry['agreement']:.1%} | {entry['top1']:.1%} | "
                f"{_loss(case, row):.2f} | {entry['kl']:.3f} | {entry['seconds']:.1f} | "
                f"{entry['cpu_seconds']:.1f} | "
                f"{entry['peak_gb']:.1f} | {entry['bytes']:,} | {entry['ratio']:.2f} |"
            )
        if WHOLE in case["rows"]:
            lines.append("")
            lines += _verdicts(name, case)
    return "\n".join(lines) + "\n"


def _loss(case: dict[str, Any], row: str) -> float:
    return 100 * (case["float"]["top1"] - case["rows"][row]["top1"])


def _verdicts(name: str, case: dict[str, Any]) -> list[str]:
    agreement, loss = case["rows"][WHOLE]["agreement"], _loss(case, WHOLE)
    lines = []
    for kind, (least, most) in zip(("must reach", "aim"), BARS[name], strict=True):
        met = ["met" if good else "missed" for good in (agreement >= least, loss <= most + 1e-9)]
        lines.append(f"- {kind}: agreement {least:.0%}: {met[0]}; loss of {most} points: {met[1]}")
    return lines


def _draw(results: dict[str, Any], path: Path) -> None:
    """Draws agreement against latency, a panel for each case."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6.4), layout="constrained")
    panels = figure.subplots(1, len(results["cases"]), squeeze=False)[0]
    for panel, (name, case) in zip(panels, results["cases"].items(), strict=True):
        _draw_case(panel, name, case)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle("Full-integer files: agreement with the float model against latency")
    figure.savefig(path, dpi=120)


# Okabe and Ito's palette, which colour-blind readers can tell apart.
_STYLES = {
    RANGES: ("o", "#0072B2"),
    ALONE: ("^", "#009E73"),
    LEFT_OUT: ("v", "#E69F00"),
    ADDED: ("P", "#CC79A7"),
    WHOLE: ("*", "#D55E00"),
    PEER: ("s", "#555555"),
}
# Points further apart than this factor of latency have labels of their own.
_APART = 1.15
# Height of a line of a label and width of a letter, as shares of the panel.
_LINE, _LETTER = 0.03, 0.009
_TICKS = (0.4, 0.6, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995)


def _draw_case(panel: Any, name: str, case: dict[str, Any]) -> None:
    from matplotlib.ticker import NullFormatter, NullLocator

    # Disagreement is drawn, on a logarithmic scale: the way from 98 to 99 % is as long as that
    # from 96 to 98.
    least = 0.5 / case["float"]["images"]
    points = [
        (entry["ratio"], max(1 - entry["agreement"], least), row, entry["group"])
        for row, entry in case["rows"].items()
        if "agreement" in entry
    ]
    panel.set_xscale("log")
    panel.set_yscale("log")
    for group, (marker, color) in _STYLES.items():
        own = [point for point in points if point[3] == group]
        size = 170 if group == WHOLE else 45
        x, y = [point[0] for point in own], [point[1] for point in own]
        panel.scatter(x, y, size, color, marker, label=TITLES[group], zorder=3)
    high, low = max(point[1] for point in points) * 1.3, min(point[1] for point in points) / 1.3
    panel.set_ylim(high, low)
    widest = max(point[0] for point in points)
    left, right = min(point[0] for point in points) / 1.1, widest * 2.2
    panel.set_xlim(left, right)
    taken: list[tuple[float, float, float]] = []
    for column in _columns(points):
        # Labels stand in a column to the right of their points, a line from others that they meet.
        place = max(point[0] for point in column) * 1.07
        start = _share(place, left, right)
        for ratio, missed, row, group in sorted(column, key=lambda point: point[1]):
            end = start + _LETTER * len(row)
            height = _share(missed, low, high)
            for other_start, other_end, other in sorted(taken, key=lambda label: label[2]):
                if start < other_end and other_start < end and abs(height - other) < _LINE:
                    height = other + _LINE
            taken.append((start, end, height))
            panel.annotate(
                row,
                (ratio, missed),
                (place, low * (high / low) ** height),
                fontsize=7.5,
                va="center",
                color=_STYLES[group][1],
                arrowprops={"arrowstyle": "-", "color": "#bbbbbb", "linewidth": 0.6},
            )
    ticks = [tick for tick in _TICKS if low <= 1 - tick <= high]
    panel.set_yticks([1 - tick for tick in ticks], [f"{100 * tick:g} %" for tick in ticks])
    panel.yaxis.set_minor_locator(NullLocator())
    marks = [mark for mark in (0.8, 1, 1.25, 1.5, 2, 3, 4, 6) if mark <= widest * 1.3]
    panel.set_xticks(marks, [f"{mark:g}" for mark in marks])
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.set_xlabel("latency, relative to the converter's file")
    panel.set_ylabel("agreement with the float model")
    panel.set_title(name)
    panel.grid(color="#e5e5e5", zorder=0)


def _share(value: float, first: float, last: float) -> float:
    """Where a value stands on a logarithmic axis: 0 at its first end, 1 at its last."""
    return float(np.log(value / first) / np.log(last / first))


def _columns(points: list[tuple]) -> list[list[tuple]]:
    """The points by groups of nearly equal latency."""
    columns: list[list[tuple]] = []
    for point in sorted(points):
        if columns and point[0] <= columns[-1][-1][0] * _APART:
            columns[-1].append(point)
        else:
            columns.append([point])
    return columns


if __name__ == "__main__":
    main()
