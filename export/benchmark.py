"""Latency and memory of exported files, side by side."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ._console import native_logs_muted
from ._optional import import_litert
from .onnx_file import open_session, read_onnx
from .tflite_file import read_tflite

PERCENTILES = (50, 90, 99)
_WORKER = Path(__file__).with_name("_worker.py")


@dataclass(frozen=True)
class Latency:
    """How long one file takes with one number of threads.

    Args:
        path: Of the file.
        runtime: "LiteRT" or "onnxruntime".
        threads: Number of threads.
        runs: Number of measured runs.
        milliseconds: By percentile: 50 is the median.
        minimum: The fastest run.
        ratio: Median, over the rounds, of the time relative to the first file with the same
            number of threads; 1 for that itself.
    """

    path: str
    runtime: str
    threads: int
    runs: int
    milliseconds: dict[int, float]
    minimum: float
    ratio: float


@dataclass(frozen=True)
class Memory:
    """What one file takes in a fresh process on one thread.

    Args:
        path: Of the file.
        peak: Largest resident set in bytes, runtime included.
        added: By how much loading and running the file raised it.
    """

    path: str
    peak: int
    added: int


def measure_latency(
    paths: Sequence[str | os.PathLike],
    threads: Sequence[int] = (1,),
    *,
    runs: int = 50,
    warm_up: int = 5,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> list[Latency]:
    """Times files in turns, so that what else the machine does meets all of them alike.

    Args:
        paths: Of `.tflite` and `.onnx` files; inputs are random.
        threads: Numbers of threads.
        runs: Measured runs of each file with each number of threads.
        warm_up: Runs before them that do not count.
        progress: Wraps the rounds, to show how far they are.

    Returns:
        One entry for each number of threads and file, in this order.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If a runtime is not installed.
        ValueError: If a number is not positive, or a file is none or cannot be loaded.
    """
    for name, value in (("runs", runs), *(("threads", number) for number in threads)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1. Received: {value}")
    if warm_up < 0:
        raise ValueError(f"`warm_up` must not be negative. Received: {warm_up}")
    keys = [(number, os.fspath(path)) for number in threads for path in paths]
    calls = {key: _open(key[1], key[0]) for key in keys}
    for call in calls.values():
        for _ in range(warm_up):
            call()
    seconds = {key: np.empty(runs) for key in keys}
    for index in progress(range(runs)):
        for key, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[key][index] = time.perf_counter() - start
    results = []
    for number, path in keys:
        taken = seconds[number, path]
        results.append(
            Latency(
                path=path,
                runtime="onnxruntime" if _is_onnx(path) else "LiteRT",
                threads=number,
                runs=runs,
                milliseconds={
                    percent: float(np.percentile(taken, percent)) * 1e3 for percent in PERCENTILES
                },
                minimum=float(taken.min()) * 1e3,
                ratio=float(np.median(taken / seconds[number, os.fspath(paths[0])])),
            )
        )
    return results


def measure_memory(path: str | os.PathLike, *, runs: int = 3) -> Memory:
    """Measures the memory of a file in a process of its own.

    Args:
        path: Of a `.tflite` or `.onnx` file.
        runs: How often it is run.

    Returns:
        Its memory.

    Raises:
        RuntimeError: If the process fails; the message has its last line.
    """
    command = [sys.executable, str(_WORKER), "memory", os.fspath(path), str(runs)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]
        raise RuntimeError(f"{str(path)!r} cannot be run: {reason}")
    found = json.loads(result.stdout.splitlines()[-1])
    return Memory(os.fspath(path), found["peak"], found["peak"] - found["before"])


def profile(path: str | os.PathLike, *, threads: int = 1, runs: int = 20) -> dict[str, float]:
    """Times the operators of an ONNX file; LiteRT tells no such thing in Python.

    Args:
        path: Of a `.onnx` file.
        threads: Number of threads.
        runs: Measured runs, after three that do not count.

    Returns:
        Milliseconds of one run by kind of operator, largest first.

    Raises:
        ValueError: If it is no ONNX file.
    """
    if not _is_onnx(path):
        raise ValueError(
            f"Only onnxruntime tells the time of each operator. Received: {str(path)!r}"
        )
    with tempfile.TemporaryDirectory(prefix="keras-effnet-") as folder:
        prefix = os.path.join(folder, "profile")
        session = open_session(path, threads=threads, profile_prefix=prefix)
        feeds = _feeds(session)
        skipped = 3
        for _ in range(skipped + runs):
            session.run(None, feeds)
        events = json.loads(Path(session.end_profiling()).read_text())
    by_name: dict[str, list[float]] = defaultdict(list)
    kinds = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            by_name[event["name"]].append(event["dur"])
            kinds[event["name"]] = event["args"]["op_name"]
    totals: dict[str, float] = defaultdict(float)
    for name, durations in by_name.items():
        totals[kinds[name]] += float(np.mean(durations[skipped:])) / 1e3
    return dict(sorted(totals.items(), key=lambda item: -item[1]))


def _is_onnx(path: str | os.PathLike) -> bool:
    return os.fspath(path).lower().endswith(".onnx")


def _open(path: str, threads: int) -> Callable[[], Any]:
    if _is_onnx(path):
        read_onnx(path)  # Says what is wrong with it.
        session = open_session(path, threads=threads)
        feeds = _feeds(session)
        return lambda: session.run(None, feeds)
    read_tflite(path)
    litert = import_litert()
    try:
        with native_logs_muted():
            interpreter = litert.Interpreter(model_path=path, num_threads=threads)
            interpreter.allocate_tensors()
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"LiteRT cannot load {path!r}: {error}") from error
    for detail in interpreter.get_input_details():
        interpreter.set_tensor(detail["index"], _random(detail["shape"], detail["dtype"]))
    return interpreter.invoke


def _feeds(session: Any) -> dict[str, np.ndarray]:
    types = {"tensor(uint8)": np.uint8, "tensor(int8)": np.int8, "tensor(float16)": np.float16}
    return {
        value.name: _random(
            [size if isinstance(size, int) else 1 for size in value.shape],
            types.get(value.type, np.float32),
        )
        for value in session.get_inputs()
    }


def _random(shape: Sequence[int], dtype: Any) -> np.ndarray:
    values = np.random.default_rng(0).integers(0, 127, tuple(shape))
    return values.astype(dtype)
