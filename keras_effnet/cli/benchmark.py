"""time .tflite and .onnx files side by side, and measure their memory

The files run in turns in one process, so that whatever else the machine does meets all of them
alike; compare the ratios to the first file rather than milliseconds of different days. Inputs are
random. Memory is that of a fresh process on one thread: the whole, runtime included, and by how
much the file raised it. onnxruntime also tells the time of each kind of operator (--profile);
LiteRT does not, in Python.

examples:
  keras-effnet benchmark float.tflite int8.tflite --threads 1 2
  keras-effnet benchmark int8.tflite int8.onnx --runs 200 --json
  keras-effnet benchmark int8.onnx --profile
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path

from keras_effnet.cli import common
from keras_effnet.cli.common import UsageError
from keras_effnet.cli.tables import text_table


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument("files", metavar="FILE", nargs="+", help="a .tflite or .onnx file")
    parser.add_argument(
        "--threads",
        metavar="N",
        nargs="+",
        type=common.positive_int,
        default=[1],
        help="numbers of threads to time, e.g. 1 2 4 (default: 1)",
    )
    parser.add_argument(
        "--runs",
        metavar="N",
        type=common.positive_int,
        default=50,
        help="measured runs of each (default: 50)",
    )
    parser.add_argument(
        "--warm-up",
        metavar="N",
        type=common.positive_int,
        default=5,
        help="runs before them that do not count (default: 5)",
    )
    parser.add_argument("--no-memory", action="store_true", help="leave the memory out")
    parser.add_argument(
        "--profile", action="store_true", help="show the time of each operator of .onnx files"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object")


def run(args: argparse.Namespace) -> None:
    """Runs the command.

    Raises:
        UsageError: If the arguments cannot work.
        Exception: Whatever goes wrong later.
    """
    for path in args.files:
        if Path(path).suffix.lower() not in (".tflite", ".onnx"):
            raise UsageError(
                f"Only .tflite and .onnx files can be timed. Received: {path!r}. Export the model "
                "first: keras-effnet export-tflite"
            )
        if not Path(path).is_file():
            raise UsageError(f"There is no file {path!r}.")
    if len(set(args.files)) < len(args.files):
        raise UsageError("Each file is named once.")
    if args.profile and not any(path.lower().endswith(".onnx") for path in args.files):
        raise UsageError("--profile needs an .onnx file: LiteRT does not tell, in Python.")
    from keras_effnet.export.benchmark import measure_latency, measure_memory, profile
    from keras_effnet.export.probe import check_runs

    for path in args.files:
        if path.lower().endswith(".tflite"):
            check_runs(path)

    def shown(rounds: Iterable[int]) -> Iterable[int]:
        return common.progress(rounds, args.runs, "rounds")

    threads = sorted(set(args.threads))
    latencies = measure_latency(
        args.files, threads, runs=args.runs, warm_up=args.warm_up, progress=shown
    )
    memory = {} if args.no_memory else {path: measure_memory(path) for path in args.files}
    profiles = {}
    if args.profile:
        profiles = {path: profile(path) for path in args.files if path.lower().endswith(".onnx")}
    if args.json:
        result = {
            "latency": [dataclasses.asdict(each) for each in latencies],
            "memory": [dataclasses.asdict(each) for each in memory.values()],
            "profile": profiles,
        }
        print(json.dumps(result, indent=2))
        return
    cells = [("file", "runtime", "threads", "median", "p90", "p99", "fastest", "ratio")]
    for each in latencies:
        cells.append(
            (
                each.path,
                each.runtime,
                str(each.threads),
                *(f"{value:.2f} ms" for value in each.milliseconds.values()),
                f"{each.minimum:.2f} ms",
                f"{each.ratio:.3f}",
            )
        )
    print(text_table(cells, left=(0, 1)))
    if memory:
        cells = [("file", "bytes", "peak memory", "of it the file")]
        for path, each in memory.items():
            size = Path(path).stat().st_size
            cells.append((path, f"{size:,}", _megabytes(each.peak), _megabytes(each.added)))
        print()
        print(text_table(cells))
    for path, times in profiles.items():
        total = sum(times.values())
        cells = [(f"operators of {path}", "ms", "share")]
        cells += [(op, f"{taken:.3f}", f"{taken / total:.1%}") for op, taken in times.items()]
        print()
        print(text_table(cells))


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
