"""Building, importing and stepping, side by side with keras.applications.

    python benchmarks/building.py [--rounds N] [--backends tensorflow,jax,torch] [--overwrite]

Every comparison runs both sides in turns, in one process or in pairs of fresh ones, so that a busy
moment of the machine hits both; the figures are ratios of medians (ours to theirs, below 1 is
faster). Writes `benchmarks/results/building.json` and `.md`.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

from common import RESULTS, describe_machine, machine_line, write_whole

MODELS = ("EfficientNetB0", "EfficientNetB7")
BACKENDS = ("tensorflow", "jax", "torch")
BATCH = 4
PACKAGES = ("keras-effnet", "keras", "tensorflow", "jax", "torch", "numpy")

# The bars: a ratio to keras.applications, or seconds on top of `import keras`.
BUILD_BAR = 1.0
STEP_BAR = 1.03
IMPORT_BAR_SECONDS = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=10, help="pairs measured (default: 10)")
    parser.add_argument("--steps", type=int, default=40, help="pairs of steps (default: 40)")
    parser.add_argument("--backends", default=",".join(BACKENDS))
    parser.add_argument("--overwrite", action="store_true", help="replace earlier results")
    parser.add_argument("--child", choices=("build", "step"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        measure = _build if args.child == "build" else _steps
        print(json.dumps(measure(args.rounds if args.child == "build" else args.steps)))
        return
    target = RESULTS / "building.json"
    if target.exists() and not args.overwrite:
        sys.exit(f"{target} exists; pass --overwrite to replace it")

    load = os.getloadavg()
    results = {
        "machine": describe_machine(PACKAGES),
        "load_average_before": load,
        "import": _imports(args.rounds),
        "build": _child("build", "tensorflow", args),
        "steps": {},
    }
    for backend in args.backends.split(","):
        if importlib.util.find_spec(backend):
            results["steps"][backend] = _child("step", backend, args)
    results["load_average_after"] = os.getloadavg()
    text = _markdown(results)
    write_whole(target, json.dumps(results, indent=2) + "\n")
    write_whole(target.with_suffix(".md"), text)
    print(text)


def _child(name: str, backend: str, args: argparse.Namespace) -> dict:
    """Runs one measurement in a fresh process on a backend."""
    print(f"{name} on {backend} …", file=sys.stderr)
    command = [sys.executable, __file__, "--child", name]
    command += ["--rounds", str(args.rounds), "--steps", str(args.steps)]
    done = subprocess.run(
        command,
        env=os.environ | {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def _compare(ours: Callable[[], None], theirs: Callable[[], None], pairs: int) -> dict:
    """Medians of both in turns; who begins alternates, too."""
    times: tuple[list[float], list[float]] = ([], [])
    for pair in range(pairs):
        order = ((0, ours), (1, theirs)) if pair % 2 else ((1, theirs), (0, ours))
        for side, call in order:
            gc.collect()  # Not in the middle of whichever side happens to fill the heap.
            start = time.perf_counter()
            call()
            times[side].append(time.perf_counter() - start)
    return _summary(*times)


def _summary(ours: list[float], theirs: list[float]) -> dict:
    medians = statistics.median(ours), statistics.median(theirs)
    return {
        "ours_ms": round(1000 * medians[0], 2),
        "theirs_ms": round(1000 * medians[1], 2),
        "ratio": round(medians[0] / medians[1], 4),
        # Of the pairs: what a single pair would have shown.
        "ratio_quartiles": [
            round(value, 4)
            for value in statistics.quantiles(
                [a / b for a, b in zip(ours, theirs, strict=True)], n=4, method="inclusive"
            )
        ],
        "pairs": len(ours),
    }


def _imports(rounds: int) -> dict:
    """Seconds that `import keras_effnet` adds to `import keras`, in fresh processes."""
    print("import …", file=sys.stderr)
    code = (
        "import time; start = time.perf_counter(); import keras; middle = time.perf_counter();"
        "import keras_effnet; print(middle - start, time.perf_counter() - middle)"
    )
    keras_seconds, added = [], []
    for _ in range(rounds):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3"},
            capture_output=True,
            text=True,
            check=True,
        )
        first, second = map(float, done.stdout.split())
        keras_seconds.append(first)
        added.append(second)
    return {
        "keras_seconds": round(statistics.median(keras_seconds), 3),
        "added_seconds": round(statistics.median(added), 4),
        "largest_added_seconds": round(max(added), 4),
        "rounds": rounds,
    }


def _build(rounds: int) -> dict:
    import keras

    import keras_effnet

    results = {}
    for name in MODELS:
        ours = partial(getattr(keras_effnet, name), weights=None)
        theirs = partial(getattr(keras.applications, name), weights=None)
        ours(), theirs()  # The first call of each warms up.
        results[name] = _compare(ours, theirs, rounds)
        keras.utils.clear_session()
    return results


def _steps(pairs: int) -> dict:
    """One forward pass and one training step of B0, compiled as the backend does by default."""
    import keras
    import numpy as np

    import keras_effnet

    keras.utils.set_random_seed(0)
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (BATCH, 224, 224, 3)).astype(np.float32)
    labels = random.integers(0, 1000, BATCH)
    models = (
        keras_effnet.EfficientNetB0(weights=None),
        keras.applications.EfficientNetB0(weights=None),
    )
    for model in models:
        # JAX always compiles. TensorFlow's XLA would take minutes on a processor.
        jit = keras.backend.backend() == "jax"
        model.compile("sgd", "sparse_categorical_crossentropy", jit_compile=jit)
    results = {}
    for kind in ("forward", "train"):
        if kind == "forward":
            calls = [partial(model.predict_on_batch, images) for model in models]
        else:
            calls = [partial(model.train_on_batch, images, labels) for model in models]
        for call in calls:
            for _ in range(3):  # Traces and warms up.
                call()
        results[kind] = _compare(*calls, pairs)
    return results


def _markdown(results: dict) -> str:
    machine, imported = results["machine"], results["import"]
    lines = [
        "# Building, importing and stepping against keras.applications",
        "",
        f"{machine_line(machine)} Load average "
        f"{results['load_average_before'][0]:.1f} before, "
        f"{results['load_average_after'][0]:.1f} after.",
        "",
        "Medians in milliseconds; both sides in turns. Written by `benchmarks/building.py`.",
        "",
        "| what | ours | keras.applications | ratio | quartiles of the pairs | bar | |",
        "|---|--:|--:|--:|--:|--:|---|",
    ]
    for name, row in results["build"].items():
        lines.append(_line(f"build {name}", row, BUILD_BAR))
    for backend, kinds in results["steps"].items():
        for kind, row in kinds.items():
            what = {"forward": "forward pass", "train": "training step"}[kind]
            lines.append(_line(f"B0, {what}, batch {BATCH}, {backend}", row, STEP_BAR))
    verdict = "met" if imported["added_seconds"] <= IMPORT_BAR_SECONDS else "missed"
    lines += [
        "",
        f"`import keras_effnet` adds {imported['added_seconds']:.3f} s to the "
        f"{imported['keras_seconds']:.1f} s of `import keras` (bar: {IMPORT_BAR_SECONDS} s, "
        f"{verdict}; median of {imported['rounds']} fresh processes, the slowest "
        f"{imported['largest_added_seconds']:.3f} s).",
    ]
    return "\n".join(lines) + "\n"


def _line(what: str, row: dict, bar: float) -> str:
    low, middle, high = row["ratio_quartiles"]
    verdict = "met" if row["ratio"] <= bar else "missed"
    return (
        f"| {what} | {row['ours_ms']:.1f} | {row['theirs_ms']:.1f} | {row['ratio']:.3f} "
        f"| {low:.3f}, {middle:.3f}, {high:.3f} | {bar:.2f} | {verdict} |"
    )


if __name__ == "__main__":
    main()
