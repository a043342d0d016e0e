"""One training step: native QAT and tfmot's, each beside the float step that it is made of.

    python benchmarks/training_step.py [--model EfficientNetB0] [--steps 12] [--overwrite]

Every kind runs in a process of its own, in turns of `--rounds`; the step is compiled and fed from
memory. Peak memory is that of the process. glibc keeps freed memory, as in the commands that train,
but for two kinds, which show what the step takes without. Results go to
`benchmarks/results/training_step.*`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

from common import RESULTS, describe_machine, machine_line, write_whole

# name -> (what it is, the kind that it is compared with)
KINDS = {
    "float": ("float, batch norms trained", None),
    "folded": ("float, batch norms folded", "float"),
    "qat": ("native QAT, fixed ranges", "folded"),
    "qat_learned": ("native QAT, learned ranges", "folded"),
    "qat_moving": ("native QAT, ranges follow the batches", "folded"),
    "qat_norms": ("native QAT, batch norms trained", "float"),
    "tf_keras": ("tf_keras float twin of tfmot", None),
    "tfmot": ("tfmot QAT", "tf_keras"),
    "folded_returned": ("float, batch norms folded, freed memory returned", "folded"),
    "qat_returned": ("native QAT, fixed ranges, freed memory returned", "folded_returned"),
}
# How these kinds end, whose malloc is as glibc has it.
RETURNED = "_returned"


def make(kind: str, name: str) -> tuple[Any, Any]:
    """Returns (model, keras module) to train; ranges come from a few random images."""
    import keras
    import numpy as np

    from keras_effnet import create_model
    from keras_effnet.quantization import QuantizationConfig, quantize_model, tfmot
    from keras_effnet.quantization.build import build_model
    from keras_effnet.quantization.folding import fold
    from keras_effnet.quantization.graph import read_model

    keras.utils.set_random_seed(0)
    model = create_model(name, weights=None, classes=10)
    if kind == "float":
        return model, keras
    if kind == "folded":
        return build_model(fold(read_model(model)), quantized=False), keras
    side = model.input_shape[1]
    images = np.random.default_rng(0).integers(0, 256, (8, side, side, 3)).astype("float32")
    if kind in ("tf_keras", "tfmot"):
        import tf_keras

        if kind == "tf_keras":
            return tfmot.to_tf_keras(model), tf_keras
        config = QuantizationConfig(corrections=(), per_channel_head=False)
        return tfmot.quantize_model(model, images, config, verbose=False), tf_keras
    ranges = {"qat_learned": "learned", "qat_moving": "moving_average"}.get(kind, "fixed")
    norms = "trained" if kind == "qat_norms" else "folded"
    config = QuantizationConfig(corrections=(), training_ranges=ranges, batch_norm=norms)
    return quantize_model(model, images, config, verbose=False), keras


def measure(kind: str, name: str, batch: int, steps: int) -> dict:
    """Times steps in this process."""
    import numpy as np

    from keras_effnet.cli.common import keep_freed_memory

    if not kind.endswith(RETURNED):
        keep_freed_memory()
    model, library = make(kind.removesuffix(RETURNED), name)
    optimizer = library.optimizers.Adam(1e-5)
    arguments = {} if library.__name__ == "tf_keras" else {"jit_compile": False}
    model.compile(optimizer, "sparse_categorical_crossentropy", **arguments)
    side = model.input_shape[1]
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (batch, side, side, 3)).astype("float32")
    labels = rng.integers(0, 10, batch)
    start = time.perf_counter()
    model.train_on_batch(images, labels)
    first = time.perf_counter() - start
    model.train_on_batch(images, labels)
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        model.train_on_batch(images, labels)
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"first": first, "step": statistics.median(seconds), "peak_mib": peak}


def table(rows: dict[str, dict]) -> str:
    """The results as Markdown."""
    lines = [
        "| | step, s | of its float step | first step, s | peak, MiB | of its float peak |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for kind, row in rows.items():
        base = rows.get(KINDS[kind][1])
        ratios = ("-", "-")
        if base:
            ratios = (
                f"{row['step'] / base['step']:.2f}",
                f"{row['peak_mib'] / base['peak_mib']:.2f}",
            )
        lines.append(
            f"| {KINDS[kind][0]} | {row['step']:.3f} | {ratios[0]} | {row['first']:.1f} | "
            f"{row['peak_mib']:.0f} | {ratios[1]} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="EfficientNetB0")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--overwrite", action="store_true", help="replace earlier results")
    parser.add_argument("--measure", choices=list(KINDS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.model, args.batch, args.steps)))
        return
    target = RESULTS / "training_step.json"
    if target.exists() and not args.overwrite:
        sys.exit(f"{target} exists; pass --overwrite to replace it")
    found: dict[str, list[dict]] = {kind: [] for kind in args.kinds}
    for number in range(args.rounds):
        for kind in args.kinds:
            command = [sys.executable, __file__, "--measure", kind, "--model", args.model]
            command += ["--batch", str(args.batch), "--steps", str(args.steps)]
            environment = {
                name: value
                for name, value in os.environ.items()
                if not name.startswith("MALLOC_") and name != "GLIBC_TUNABLES"
            } | {"TF_CPP_MIN_LOG_LEVEL": "3"}
            result = subprocess.run(
                command, env=environment, stdout=subprocess.PIPE, text=True, check=True
            )
            found[kind].append(json.loads(result.stdout.splitlines()[-1]))
            print(f"round {number + 1}, {kind}: {found[kind][-1]}", flush=True)
    rows = {
        kind: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for kind, runs in found.items()
    }
    machine = describe_machine(("keras", "tensorflow", "tf_keras", "tensorflow-model-optimization"))
    text = (
        f"# A training step of {args.model}, batch {args.batch}, TensorFlow\n\n"
        f"Median of {args.rounds} processes, each the median of {args.steps} steps. glibc keeps "
        "freed memory, unless the row says that it is returned, as it is by default.\n\n"
        f"{table(rows)}\n\n{machine_line(machine)}\n"
    )
    write_whole(RESULTS / "training_step.md", text)
    content = {"machine": machine, "arguments": vars(args), "rows": rows, "runs": found}
    write_whole(target, json.dumps(content, indent=2) + "\n")
    print(text)


if __name__ == "__main__":
    main()
