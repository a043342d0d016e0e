"""Runs files in a process of its own; a script that imports nothing of this package.

    python _worker.py probe               reads JSON lines {"path", "limit"} from standard input
    python _worker.py memory PATH RUNS    measures the peak memory of one file

`probe` loads and runs each TFLite file once, on zeros, and answers with a JSON line; a file on
which LiteRT crashes takes this process with it, and not the caller's. `memory` prints one JSON
line with the largest resident set in bytes, before the file was loaded and at the end.
"""

import contextlib
import json
import os
import resource
import sys


def _run_once(path):
    import numpy as np
    from ai_edge_litert.interpreter import Interpreter

    # One thread: a crash in a pool of threads can hang. Reference kernels check more.
    interpreter = Interpreter(model_path=path, num_threads=1)
    interpreter.allocate_tensors()
    for detail in interpreter.get_input_details():
        interpreter.set_tensor(detail["index"], np.zeros(detail["shape"], detail["dtype"]))
    interpreter.invoke()
    for detail in interpreter.get_output_details():
        interpreter.get_tensor(detail["index"])


def _limit_memory(limit):
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    # Some systems know no such limit.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def _probe():
    import numpy  # noqa: F401
    from ai_edge_litert.interpreter import Interpreter  # noqa: F401

    answers = os.fdopen(os.dup(1), "w", buffering=1)
    # Native code must not write among the answers.
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        _limit_memory(request["limit"])
        try:
            _run_once(request["path"])
            answer = None
        except Exception as error:
            answer = f"{type(error).__name__}: {error}"
        print(json.dumps({"error": answer}), file=answers)


def _memory(path, runs):
    import numpy as np

    if path.endswith(".onnx"):
        import onnxruntime

        before = _resident()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        feeds = {}
        for value in session.get_inputs():
            shape = [size if isinstance(size, int) else 1 for size in value.shape]
            dtype = {"tensor(uint8)": np.uint8, "tensor(int8)": np.int8}.get(value.type, np.float32)
            feeds[value.name] = np.zeros(shape, dtype)
        for _ in range(runs):
            session.run(None, feeds)
    else:
        from ai_edge_litert.interpreter import Interpreter

        before = _resident()
        interpreter = Interpreter(model_path=path, num_threads=1)
        interpreter.allocate_tensors()
        for detail in interpreter.get_input_details():
            interpreter.set_tensor(detail["index"], np.zeros(detail["shape"], detail["dtype"]))
        for _ in range(runs):
            interpreter.invoke()
    print(json.dumps({"before": before, "peak": _resident()}))


def _resident():
    try:
        # The process' own peak; that of getrusage begins with the caller's, from before the exec.
        with open("/proc/self/status") as status:
            [line] = [line for line in status if line.startswith("VmHWM:")]
        return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        # In bytes on macOS, which has no /proc.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    if sys.argv[1] == "probe":
        _probe()
    else:
        _memory(sys.argv[2], int(sys.argv[3]))
