"""Time and memory of the export, side by side with keras.applications and the plain converter.

    python benchmarks/exporting.py [--rounds N] [--overwrite]

Every export runs in a fresh process, both sides in turns: ours is the whole command
(`export-tflite`, with its verification in LiteRT), the peer is a keras.applications model of the
same weights through `tf.lite.TFLiteConverter`, which verifies nothing. Peak memory is the largest
resident set of the process. Writes `benchmarks/results/exporting.json` and `.md`. Needs the
photographs and weights of ../shared beside the repository.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import RESULTS, ROOT, SHARED, describe_machine, machine_line, write_whole

WEIGHTS = SHARED / "weights" / "efficientnetv2-b0.h5"
PHOTOGRAPHS = SHARED / "data" / "imagenet-sample"
PACKAGES = ("keras-effnet", "keras", "tensorflow", "ai-edge-litert", "numpy")

# The bars: seconds and gigabytes of our command on 2 cores; None where there is none.
BARS = {"V2-B0 int8, 200 photographs": (90, 4), "B7 float32": (None, 8)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="runs of each (default: 3)")
    parser.add_argument("--overwrite", action="store_true", help="replace earlier results")
    parser.add_argument("--peer", nargs=2, metavar=("CASE", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        _peer(*args.peer)
        return
    target = RESULTS / "exporting.json"
    if target.exists() and not args.overwrite:
        sys.exit(f"{target} exists; pass --overwrite to replace it")

    results = {"machine": describe_machine(PACKAGES), "load_average_before": os.getloadavg()}
    results["cases"] = {}
    for case in BARS:
        rounds = {"ours": [], "theirs": []}
        for number in range(args.rounds):
            for side in rounds:
                print(f"{case}, {side}, {number + 1} of {args.rounds} …", file=sys.stderr)
                rounds[side].append(_measure(case, side))
        results["cases"][case] = {
            side: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
            for side, runs in rounds.items()
        }
    text = _markdown(results)
    write_whole(target, json.dumps(results, indent=2) + "\n")
    write_whole(target.with_suffix(".md"), text)
    print(text)


def _measure(case: str, side: str) -> dict:
    """Seconds, peak gigabytes and bytes of the file of one export in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.tflite"
        if side == "theirs":
            command = [sys.executable, __file__, "--peer", case, str(file)]
        else:
            command = [sys.executable, str(ROOT / "scripts" / "export_tflite.py")]
            command += ["--output", str(file)]
            if case.startswith("B7"):
                command += ["--model", "EfficientNetB7", "--weights", "none"]
            else:
                command += ["--model", "EfficientNetV2B0", "--weights", str(WEIGHTS)]
                command += ["--quantization", "int8"]
                command += ["--calibration-data", str(PHOTOGRAPHS / "calibration")]
        start = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            sys.exit(f"exit code {process.returncode}: {' '.join(command)}")
        # ru_maxrss is in kibibytes on Linux.
        peak = usage.ru_maxrss * 1024 / 1e9
        return {"seconds": seconds, "peak_gb": peak, "file_bytes": file.stat().st_size}


def _peer(case: str, file: str) -> None:
    """The same file by keras.applications and the converter as they come."""
    import keras
    import numpy as np
    import tensorflow as tf
    from PIL import Image

    if case.startswith("B7"):
        model = keras.applications.EfficientNetB7(weights=None)
    else:
        model = keras.applications.EfficientNetV2B0(weights=str(WEIGHTS))
    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    if not case.startswith("B7"):

        def photographs():
            for path in sorted((PHOTOGRAPHS / "calibration").glob("*/*"))[:200]:
                image = Image.open(path).convert("RGB").resize((224, 224), Image.Resampling.BICUBIC)
                yield [np.asarray(image, np.float32)[np.newaxis]]

        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.representative_dataset = photographs
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
        converter.inference_input_type = converter.inference_output_type = tf.uint8
    Path(file).write_bytes(converter.convert())


def _markdown(results: dict) -> str:
    lines = [
        "# Exporting against keras.applications and the plain converter",
        "",
        f"{machine_line(results['machine'])} Load average before: "
        f"{results['load_average_before'][0]:.1f}.",
        "",
        "Medians of fresh processes in turns. Ours includes the verification in LiteRT. Written by "
        "`benchmarks/exporting.py`.",
        "",
        "| export | seconds | peer | ratio | bar | peak GB | peer | ratio | bar | bytes | peer |",
        "|---|--:|--:|--:|---|--:|--:|--:|---|--:|--:|",
    ]
    for case, (seconds_bar, memory_bar) in BARS.items():
        ours, theirs = (results["cases"][case][side] for side in ("ours", "theirs"))
        cells = [case]
        for key, bar in (("seconds", seconds_bar), ("peak_gb", memory_bar)):
            verdict = "-"
            if bar is not None:
                verdict = f"{bar}: {'met' if ours[key] < bar else 'missed'}"
            ratio = ours[key] / theirs[key]
            cells += [f"{ours[key]:.1f}", f"{theirs[key]:.1f}", f"{ratio:.2f}", verdict]
        cells += [f"{ours['file_bytes']:,.0f}", f"{theirs['file_bytes']:,.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
