"""Files are tried in a process of their own."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from keras_effnet.export import pack, probe
from keras_effnet.export._optional import import_tflite_schema
from keras_effnet.export.probe import Prober, check_runs


@pytest.fixture(scope="module")
def crashing(int8_bytes, tmp_path_factory):
    """Products whose factors are left out, which no kernel expects: its structure is sound."""
    schema = import_tflite_schema()
    model = schema.ModelT.InitFromPackedBuf(int8_bytes, 0)
    for operator in model.subgraphs[0].operators:
        if operator.builtinOptionsType == schema.BuiltinOptions.MulOptions:
            operator.inputs = np.full(2, -1, np.int32)
    path = tmp_path_factory.mktemp("crash") / "no factors.tflite"
    path.write_bytes(pack.pack_model(model, schema))
    return path


def test_a_good_file_runs(float_export, int8_export):
    check_runs(float_export.path)
    check_runs(int8_export.path)


def test_a_file_that_breaks_litert_does_not_break_us(crashing, float_export):
    with Prober() as prober:
        with pytest.raises(ValueError, match="LiteRT crashes on .*no factors.* .exit code -"):
            prober.check(crashing)
        prober.check(float_export.path)  # In a new process: the first one died.


def test_memory_is_limited(float_export):
    with Prober(memory_limit=2**20) as prober:
        with pytest.raises(ValueError, match="LiteRT (crashes on|cannot run)"):
            prober.check(float_export.path)


def test_a_limit_of_the_caller_stays(float_export):
    """As `ulimit -v` sets it: it cannot be raised, and the file runs all the same."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33));"
        "from _worker import _limit_memory, _run_once; _limit_memory(2**34); _run_once(sys.argv[1])"
    )
    command = [sys.executable, "-c", code, str(float_export.path)]
    folder = Path(probe.__file__).parent
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert result.returncode == 0, result.stderr[-1000:]


def test_time_is_limited(float_export):
    with Prober(timeout=0.0) as prober:
        with pytest.raises(ValueError, match="does not finish .* in 0 s"):
            prober.check(float_export.path)


def test_what_is_no_file_is_refused(tmp_path):
    path = tmp_path / "m.tflite"
    path.write_bytes(b"\0" * 16 + b"TFL3")
    with pytest.raises(ValueError, match="LiteRT"):
        check_runs(path)
