"""ONNX files side by side: accuracy, agreement, size and latency.

    python benchmarks/onnx_export.py [--rounds N] [--calibration N] [--images N] [--overwrite]

Of V1-B0 and V2-B0 with real weights: our float file beside what tf2onnx writes of the same graph,
our int8 file beside those of `onnxruntime.quantization.quantize_static` (per channel, min-max,
entropy and percentile calibration on the same photographs, from our float file), and the int8
TFLite file of the same quantized model in LiteRT. Latencies are taken in one process, all files in
turns, with batch 1 and two threads; the ratio to our float file is the median of the ratios of the
rounds. Threads stop waiting for work when a run ends, so that no file takes processor time from
the next. Writes `benchmarks/results/onnx.json` and `.md`. Needs the photographs and weights of
../shared beside the repository.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, SHARED, describe_machine, machine_line, write_whole

PACKAGES = ("keras-effnet", "keras", "tensorflow", "tf2onnx", "onnx", "onnxruntime")
PACKAGES += ("ai-edge-litert", "numpy")
THREADS = 2
WARM_UPS = 5
# Of one round, the fastest of so many runs counts.
RUNS = 3
MODELS = {
    "V1-B0": ("EfficientNetB0", 5, "efficientnetb0-flowers5.h5", "flowers", "center"),
    "V2-B0": ("EfficientNetV2B0", 1000, "efficientnetv2-b0.h5", "imagenet-sample", "published"),
}
OURS, FLOAT, TFLITE = "int8, ours", "float, ours", "int8 TFLite, LiteRT"
STATIC = {"min-max": "MinMax", "entropy": "Entropy", "percentile": "Percentile"}
# The bars: at most so many times the latency of another file.
BARS = ((OURS, FLOAT, 0.6), (OURS, TFLITE, 2.0), (FLOAT, "float, tf2onnx", 1.0))
# Histograms of these keep all activations of all images in memory.
HISTOGRAM_IMAGES = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=50, help="of latencies (default: 50)")
    parser.add_argument("--calibration", type=int, default=200, help="images (default: 200)")
    parser.add_argument("--images", type=int, help="for the evaluation (default: all)")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--overwrite", action="store_true", help="replace earlier results")
    args = parser.parse_args()
    target = RESULTS / "onnx.json"
    if target.exists() and not args.overwrite:
        sys.exit(f"{target} exists; pass --overwrite to replace it")
    from keras_effnet.cli import common

    common.mute_native_logs()
    common.start_tensorflow()
    results = {"machine": describe_machine(PACKAGES), "load_average_before": os.getloadavg()}
    results |= {"threads": THREADS, "calibration": args.calibration, "models": {}}
    for name in args.models:
        with tempfile.TemporaryDirectory() as folder:
            results["models"][name] = _model(name, Path(folder), args)
    text = _markdown(results)
    write_whole(target, json.dumps(results, indent=2) + "\n")
    write_whole(target.with_suffix(".md"), text)
    print(text)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _model(name: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Files by their description: scores, bytes and latency in milliseconds."""
    from keras_effnet import create_model, get_spec
    from keras_effnet.data import open_images
    from keras_effnet.export import compare, to_onnx, to_tflite
    from keras_effnet.quantization import quantize_model
    from keras_effnet.weights import load_weights

    variant, classes, weights, photographs, crop = MODELS[name]
    spec = get_spec(variant)
    model = create_model(spec, weights=None, classes=classes)
    load_weights(model, SHARED / "weights" / weights)
    options = {"preprocessing": spec.preprocessing, "in_graph_preprocessing": True, "crop": crop}
    data = SHARED / "data" / photographs
    labels = None
    if (data / "classes.csv").exists():
        from keras_effnet.data import read_labels

        labels = read_labels(data / "classes.csv")
    size = model.input_shape[1:3]
    calibration = open_images(data / "calibration", size, samples=args.calibration, **options)
    calibration = [images for images, _ in calibration.batches(8)]
    evaluation = open_images(
        data / "evaluation", size, samples=args.images, labels=labels, classes=classes, **options
    )

    _say(f"{name}: float files …")
    to_onnx(model, folder / "float.onnx")
    _tf2onnx(model, folder / "tf2onnx.onnx")
    files = {FLOAT: folder / "float.onnx", "float, tf2onnx": folder / "tf2onnx.onnx"}
    _say(f"{name}: quantizing …")
    start = time.perf_counter()
    quantized = quantize_model(model, calibration, verbose=False)
    seconds = {"quantize_model": time.perf_counter() - start}
    start = time.perf_counter()
    export = to_onnx(quantized, folder / "int8.onnx", quantization="int8", io_dtype="uint8")
    seconds["to_onnx"] = time.perf_counter() - start
    files[OURS] = export.path
    for method, kind in STATIC.items():
        _say(f"{name}: quantize_static, {method} …")
        path = folder / f"{kind}.onnx"
        start = time.perf_counter()
        _quantize_static(files[FLOAT], path, kind, calibration)
        seconds[f"quantize_static {method}"] = time.perf_counter() - start
        files[f"int8, quantize_static {method}"] = path
    files[TFLITE] = folder / "int8.tflite"
    to_tflite(quantized, files[TFLITE], quantization="int8", io_dtype="uint8")

    _say(f"{name}: accuracy …")
    runs = {label: _runner(path) for label, path in files.items()}
    predictors = {"Keras": model.predict_on_batch} | {key: run[0] for key, run in runs.items()}
    scores = compare(predictors, evaluation.batches(16))
    _say(f"{name}: latency …")
    latencies = _latencies({label: run[1] for label, run in runs.items()}, args.rounds)
    rows = {}
    for label, score in zip(files, scores[1:], strict=True):
        ratios = np.divide(latencies[label], latencies[FLOAT])
        rows[label] = {
            "top1": score.top1,
            "agreement": score.agreement,
            "bytes": files[label].stat().st_size,
            "milliseconds": statistics.median(latencies[label]),
            "ratio": float(np.median(ratios)),
        }
    bars = [
        {
            "of": first,
            "to": second,
            "bar": bar,
            "ratio": float(np.median(np.divide(latencies[first], latencies[second]))),
        }
        for first, second, bar in BARS
    ]
    return {
        "images": scores[0].images,
        "keras_top1": scores[0].top1,
        "files": rows,
        "bars": bars,
        "seconds": seconds,
        "operators": export.optimized.ops,
        "float_operators": export.optimized.float_ops,
    }


def _tf2onnx(model: Any, path: Path) -> None:
    """What tf2onnx writes of the frozen graph, its stray inputs repaired."""
    import tensorflow as tf
    import tf2onnx
    from tensorflow.python.framework.convert_to_constants import (
        convert_variables_to_constants_v2,
    )

    signature = [tf.TensorSpec((1, *model.input_shape[1:]), tf.float32, name="images")]
    function = tf.function(lambda images: model(images, training=False), input_signature=signature)
    frozen = convert_variables_to_constants_v2(function.get_concrete_function())
    tf2onnx.convert.from_graph_def(
        frozen.graph.as_graph_def(),
        input_names=[frozen.inputs[0].name],
        output_names=[frozen.outputs[0].name],
        opset=17,
        output_path=str(path),
    )


def _quantize_static(source: Path, target: Path, method: str, batches: list[np.ndarray]) -> None:
    from onnxruntime import quantization

    images = np.concatenate(batches)
    if method != "MinMax" and len(images) > HISTOGRAM_IMAGES:
        # From all classes: the photographs stand in their order.
        images = images[np.linspace(0, len(images) - 1, HISTOGRAM_IMAGES).astype(int)]

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.images = ({"images": image[None]} for image in images)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.images, None)

    quantization.quantize_static(
        source,
        target,
        Reader(),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
        calibrate_method=getattr(quantization.CalibrationMethod, method),
    )


def _runner(path: Path) -> tuple[Callable, Callable]:
    """A function from images to outputs, and one that runs the file once and returns nothing."""
    from keras_effnet.export import ONNXRunner, TFLiteRunner

    random = np.random.default_rng(0)
    if path.suffix == ".tflite":
        runner = TFLiteRunner(path, threads=THREADS)
        interpreter = runner._interpreter
        details = interpreter.get_input_details()[0]
        pixels = random.integers(0, 256, details["shape"]).astype(details["dtype"])

        def run() -> None:
            interpreter.set_tensor(details["index"], pixels)
            interpreter.invoke()

        return runner.predict, run
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    source = session.get_inputs()[0]
    dtype = np.uint8 if source.type == "tensor(uint8)" else np.float32
    pixels = random.integers(0, 256, source.shape).astype(dtype)
    predict = ONNXRunner(path, threads=THREADS).predict
    return predict, lambda: session.run(None, {source.name: pixels})


def _latencies(runs: dict[str, Callable], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each, round by round."""
    found: dict[str, list[float]] = {label: [] for label in runs}
    for run in runs.values():
        for _ in range(WARM_UPS):
            run()
    for _ in range(rounds):
        for label, run in runs.items():
            best = float("inf")
            for _ in range(RUNS):
                start = time.perf_counter()
                run()
                best = min(best, time.perf_counter() - start)
            found[label].append(best * 1000)
    return found


def _markdown(results: dict[str, Any]) -> str:
    lines = [
        "# ONNX files beside those of tf2onnx and onnxruntime's quantize_static",
        "",
        f"{machine_line(results['machine'])} Load average before: "
        f"{results['load_average_before'][0]:.1f}.",
        "",
        f"Batch 1, {results['threads']} threads, all files in turns in one process; calibrated on "
        f"{results['calibration']} photographs (entropy and percentile of quantize_static on "
        f"{HISTOGRAM_IMAGES}, whose activations they keep in memory). Written by "
        "`benchmarks/onnx_export.py`.",
    ]
    for name, model in results["models"].items():
        lines += [
            "",
            f"## {name}, {model['images']} photographs, Keras {model['keras_top1']:.1%}",
            "",
            "| file | top-1 | agreement | bytes | ms | ratio to our float file |",
            "|---|--:|--:|--:|--:|--:|",
        ]
        for label, row in model["files"].items():
            lines.append(
                f"| {label} | {row['top1']:.1%} | {row['agreement']:.1%} | {row['bytes']:,} | "
                f"{row['milliseconds']:.2f} | {row['ratio']:.2f} |"
            )
        lines.append("")
        for bar in model["bars"]:
            verdict = "met" if bar["ratio"] <= bar["bar"] else "missed"
            lines.append(
                f"- {bar['of']} : {bar['to']} = {bar['ratio']:.2f}, at most {bar['bar']}: {verdict}"
            )
        ops = ", ".join(f"{count} {op}" for op, count in model["operators"].items())
        floats = sum(model["float_operators"].values())
        lines.append(f"- onnxruntime runs our int8 file as: {ops}; {floats} of them in float")
        seconds = ", ".join(f"{key} {value:.1f}" for key, value in model["seconds"].items())
        lines.append(f"- seconds: {seconds}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
