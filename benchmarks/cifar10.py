"""CIFAR-10: float, PTQ and QAT, native and tfmot's; and what the mobile switches cost.

    python benchmarks/cifar10.py --data ../shared/data/cifar10.tar.gz [--seeds 3] [--overwrite]

EfficientNetTiny (B0's stages, narrow and shallow, stem without stride) is trained on the 50,000
training images, once per seed, and quantized and trained on as quantized by each engine. Every
file runs in LiteRT on the 4,000 test images, which nothing else sees. Then the first seed's model
teaches the variants of the mobile switches. Each finished row stays in `--work`: the same command
goes on after an interruption. Results go to `benchmarks/results/cifar10.*`.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import queue
import statistics
import subprocess
import sys
import tarfile
import time
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from common import RESULTS, describe_machine, machine_line, write_whole

SIZE, CLASSES, BATCH = 32, 10, 64
CALIBRATION = 512
# Of the training images, for choosing the best state of a distillation.
HELD_BACK = 0.02
# Adam's largest rate. tfmot trains folded kernels as they are, in which one channel may be many
# times as large as the next: it takes smaller steps.
RATES = {"float": 2e-3, "qat": 5e-4, "tfmot": 5e-5, "student": 1e-3, "distilled": 1e-4}
ENGINES = {
    "float": "float, Keras",
    "ptq": "PTQ",
    "qat": "QAT, labels",
    "tfmot": "QAT, labels, tfmot",
}
SWITCHES = {
    "swish": {},
    "hard_swish": {"activation": "hard_swish"},
    "relu6": {"activation": "relu6"},
    "no SE": {"se_ratio": 0},
    "relu6, no SE": {"activation": "relu6", "se_ratio": 0},
}


def read_images(path: str, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Reads one part of the archive: uint8 images (n, 32, 32, 3), and labels."""
    from PIL import Image

    images, names = [], []
    with tarfile.open(path) as archive:
        for member in archive:
            where = Path(member.name)
            if member.isfile() and part in where.parts and where.suffix in (".jpg", ".jpeg"):
                image = Image.open(io.BytesIO(archive.extractfile(member).read()))
                images.append((member.name, np.asarray(image.convert("RGB"))))
                names.append(where.parent.name)
    classes = sorted(set(names))
    if len(classes) != CLASSES:
        sys.exit(f"{path} must hold {CLASSES} classes of {part!r} images. Received: {classes}")
    order = sorted(range(len(images)), key=lambda index: images[index][0])
    labels = np.array([classes.index(names[index]) for index in order])
    return np.stack([images[index][1] for index in order]), labels


def load(work: Path, data: str) -> dict[str, np.ndarray]:
    """Returns the images and labels, decoded once."""
    cache = work / "images.npz"
    if not cache.exists():
        print("reading images", flush=True)
        arrays = {}
        for part in ("train", "test"):
            arrays[part], arrays[f"{part}_labels"] = read_images(data, part)
        temporary = cache.with_suffix(".part.npz")
        np.savez(temporary, **arrays)
        temporary.replace(cache)
    return dict(np.load(cache))


def batches(images: np.ndarray, labels: np.ndarray, seed: int):
    """Yields shuffled batches without end, mirrored or not and moved by up to 4 pixels.

    All of a batch are moved alike, which is cheap and, over some thousand batches, enough.
    """
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(images))
        for start in range(0, len(images) - BATCH + 1, BATCH):
            rows = order[start : start + BATCH]
            padded = np.pad(images[rows], ((0, 0), (4, 4), (4, 4), (0, 0)), "reflect")
            top, left = rng.integers(0, 9, 2)
            batch = padded[:, top : top + SIZE, left : left + SIZE].astype(np.float32)
            mirrored = rng.random(BATCH) < 0.5
            batch[mirrored] = batch[mirrored, :, ::-1]
            yield batch, labels[rows]


def fit(model, images, labels, seed: int, steps: int, rate: float, library, loss) -> None:
    """Trains with a cosine schedule after a short warm-up."""
    warm_up = steps // 20
    schedule = library.optimizers.schedules.CosineDecay(
        0.0, steps - warm_up, warmup_target=rate, warmup_steps=warm_up
    )
    extra = {} if library.__name__ == "tf_keras" else {"jit_compile": False}
    model.compile(library.optimizers.Adam(schedule), loss, metrics=["accuracy"], **extra)
    model.fit(batches(images, labels, seed), epochs=1, steps_per_epoch=steps, verbose=2)


def accuracy(outputs: np.ndarray, labels: np.ndarray) -> float:
    """Top-1 in percent."""
    return 100 * float(np.mean(outputs.argmax(axis=1) == labels))


def score(path: Path, data: dict, reference: np.ndarray | None = None) -> dict:
    """Runs a file in LiteRT on the test images."""
    from keras_effnet.export import TFLiteRunner

    outputs = np.asarray(TFLiteRunner(path).predict(data["test"].astype(np.float32)))
    row = {"top1": accuracy(outputs, data["test_labels"]), "bytes": path.stat().st_size}
    if reference is not None:
        row["agreement"] = 100 * float(np.mean(outputs.argmax(1) == reference.argmax(1)))
    return row


def float_model(work: Path, seed: int, **switches):
    """Loads the trained float model of a seed, or one of its switches that starts from it."""
    import keras

    from keras_effnet import EfficientNetTiny

    model = keras.models.load_model(work / f"float-{seed}.keras")
    if not switches:
        return model
    weights = work / f"float-{seed}.weights.h5"
    model.save_weights(weights)
    with warnings.catch_warnings():
        # Of the squeeze-and-excite layers that it leaves out, which is what was asked for.
        warnings.simplefilter("ignore")
        return EfficientNetTiny(weights=weights, classes=CLASSES, **switches)


def measure(work: Path, data: dict, row: str, seed: int, args) -> dict:
    """Makes and measures one row of one seed."""
    import keras

    from keras_effnet import EfficientNetTiny
    from keras_effnet.export import to_tflite
    from keras_effnet.quantization import (
        DistillationConfig,
        QuantizationConfig,
        distill,
        quantize_model,
        settle,
        tfmot,
    )

    keras.utils.set_random_seed(seed)
    test = data["test"].astype(np.float32)
    images, labels = data["train"], data["train_labels"]
    loss, start = "sparse_categorical_crossentropy", time.perf_counter()
    if row == "float":
        model = EfficientNetTiny(weights=None, classes=CLASSES)
        fit(model, images, labels, seed, args.steps, RATES["float"], keras, loss)
        model.save(work / f"float-{seed}.keras")
        outputs = model.predict(test, batch_size=500, verbose=0)
        seconds = time.perf_counter() - start
        return {"top1": accuracy(outputs, data["test_labels"]), "seconds": seconds}
    model = float_model(work, seed)
    reference = model.predict(test, batch_size=500, verbose=0)
    order = np.random.default_rng(seed).permutation(len(images))
    calibration = images[order[:CALIBRATION]].astype(np.float32)
    path = work / f"{row}-{seed}.tflite"
    extra = {}
    if row in SWITCHES:
        student = float_model(work, seed, **SWITCHES[row]) if SWITCHES[row] else model
        if SWITCHES[row]:
            soft = model.predict(images, 500, verbose=0)
            rate = RATES["student"]
            fit(student, images, soft, seed, args.student_steps, rate, keras, "kl_divergence")
        own = student.predict(test, batch_size=500, verbose=0)
        quantized = quantize_model(student, calibration, verbose=False)
        config = DistillationConfig(
            epochs=1,
            batch_size=BATCH,
            learning_rate=RATES["distilled"],
            shift=4,
            seed=seed,
            validation_share=HELD_BACK,
        )
        some = images[order[: BATCH * args.distillation_steps]].astype(np.float32)
        distill(model, quantized, some, config, verbose=2)
        extra = {
            "float_top1": accuracy(own, data["test_labels"]),
            "parameters": student.count_params(),
        }
    elif row == "tfmot":
        import tf_keras

        config = QuantizationConfig(per_channel_head=False)
        trained = tfmot.quantize_model(model, calibration, config, verbose=False)
        fit(trained, images, labels, seed, args.qat_steps, RATES["tfmot"], tf_keras, loss)
        path.write_bytes(tfmot.convert(trained))
    else:
        quantized = quantize_model(model, calibration, verbose=False)
        if row == "qat":
            fit(quantized, images, labels, seed, args.qat_steps, RATES["qat"], keras, loss)
            settle(quantized)
    if row != "tfmot":
        to_tflite(quantized, path, quantization="int8", overwrite=True)
    extra["seconds"] = time.perf_counter() - start
    return {**score(path, data, reference), **extra}


def latencies(paths: dict[str, Path], rounds: int = 300) -> dict[str, float]:
    """Median milliseconds of one image, the files in turns."""
    import onnx_export

    runs = {name: onnx_export._runner(path)[1] for name, path in paths.items()}
    times = onnx_export._latencies(runs, rounds)
    return {name: statistics.median(values) for name, values in times.items()}


def table(rows: dict, seeds: int, milliseconds: dict) -> str:
    """The results as Markdown."""
    lines = [
        "| | " + " | ".join(f"seed {seed}" for seed in range(seeds)) + " | mean top-1, % | "
        "against float, points | agreement, % |",
        "|---|" + "--:|" * (seeds + 3),
    ]
    base = [rows[f"float {seed}"]["top1"] for seed in range(seeds)]
    for name, title in ENGINES.items():
        found = [rows[f"{name} {seed}"] for seed in range(seeds)]
        top1 = [row["top1"] for row in found]
        difference = statistics.mean(top1) - statistics.mean(base)
        agreement = [row["agreement"] for row in found if "agreement" in row]
        lines.append(
            f"| {title} | "
            + " | ".join(f"{value:.2f}" for value in top1)
            + f" | {statistics.mean(top1):.2f} | {difference:+.2f} | "
            + (f"{statistics.mean(agreement):.1f}" if agreement else "-")
            + " |"
        )
    lines += [
        "",
        "The mobile switches, seed 0. Each variant starts from the swish model's weights, learns "
        "its probabilities in float, and is distilled from it as int8.",
        "",
        "| | parameters | float top-1, % | int8 top-1, % | agreement with swish, % | bytes | "
        "latency against swish |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name in SWITCHES:
        row = rows[f"{name} 0"]
        lines.append(
            f"| {name} | {row['parameters']:,} | {row['float_top1']:.2f} | {row['top1']:.2f} | "
            f"{row['agreement']:.1f} | {row['bytes']:,} | "
            f"{milliseconds[name] / milliseconds['swish']:.2f} |"
        )
    return "\n".join(lines)


_CORES: queue.Queue[int] = queue.Queue()


def make(work: Path, name: str, seed: int, after: Future | None) -> None:
    """Makes a row in a process of its own, on a core of its own, unless it is there."""
    if after is not None:
        after.result()
    answer = work / f"{name}-{seed}.json"
    if answer.exists():
        return
    core = _CORES.get()
    try:
        command = [sys.executable, __file__, *sys.argv[1:], "--row", name, str(seed)]
        with (work / f"{name}-{seed}.log").open("w") as log:
            subprocess.run(
                command,
                check=True,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=lambda: os.sched_setaffinity(0, {core}),
            )
    finally:
        _CORES.put(core)
    print(f"{name}, seed {seed}: {answer.read_text()}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="cifar10.tar.gz: image folders of JPEGs")
    parser.add_argument("--work", default="cifar10-work", type=Path, help="finished rows")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3000, help="of the float models")
    parser.add_argument("--qat-steps", type=int, default=800, help="with labels")
    parser.add_argument("--student-steps", type=int, default=600, help="in float")
    parser.add_argument("--distillation-steps", type=int, default=300, help="of the students")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="rows at once, a core each"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace earlier results")
    parser.add_argument("--row", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.work.mkdir(exist_ok=True)
    if args.row:
        name, seed = args.row[0], int(args.row[1])
        row = measure(args.work, load(args.work, args.data), name, seed, args)
        write_whole(args.work / f"{name}-{seed}.json", json.dumps(row))
        return
    target = RESULTS / "cifar10.json"
    if target.exists() and not args.overwrite:
        sys.exit(f"{target} exists; pass --overwrite to replace it")
    load(args.work, args.data)
    for core in sorted(os.sched_getaffinity(0))[: args.jobs]:
        _CORES.put(core)
    plan = [("float", seed) for seed in range(args.seeds)]
    plan += [(name, seed) for seed in range(args.seeds) for name in ENGINES if name != "float"]
    plan += [(name, 0) for name in SWITCHES]
    with ThreadPoolExecutor(args.jobs) as pool:
        floats: dict[int, Future] = {}
        jobs = []
        for name, seed in plan:
            job = pool.submit(make, args.work, name, seed, floats.get(seed))
            floats.setdefault(seed, job)
            jobs.append(job)
        for job in jobs:
            job.result()
    rows = {
        f"{name} {seed}": json.loads((args.work / f"{name}-{seed}.json").read_text())
        for name, seed in plan
    }
    milliseconds = latencies({name: args.work / f"{name}-0.tflite" for name in SWITCHES})
    machine = describe_machine(("keras", "tensorflow", "tf_keras", "ai-edge-litert"))
    text = (
        f"# CIFAR-10: EfficientNetTiny, {args.steps} steps in float, {args.qat_steps} in int8\n\n"
        f"Batch {BATCH}; students of the switches {args.student_steps} steps in float, "
        f"{args.distillation_steps} in int8. "
        "4,000 test images, `.tflite` files in LiteRT.\n\n"
        f"{table(rows, args.seeds, milliseconds)}\n\n{machine_line(machine)} "
        "Written by `benchmarks/cifar10.py`.\n"
    )
    write_whole(RESULTS / "cifar10.md", text)
    content = {"machine": machine, "rows": rows, "milliseconds": milliseconds}
    write_whole(target, json.dumps(content, indent=2) + "\n")
    print(text)


if __name__ == "__main__":
    main()
