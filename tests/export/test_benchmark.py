import pytest

from keras_effnet.export import pack
from keras_effnet.export._optional import import_tflite_schema
from keras_effnet.export.benchmark import measure_latency, measure_memory, profile
from keras_effnet.export.to_onnx import to_onnx


@pytest.fixture(scope="module")
def onnx_path(model, tmp_path_factory):
    return to_onnx(model, tmp_path_factory.mktemp("onnx") / "m.onnx").path


def test_files_run_in_turns_and_are_compared_with_the_first(float_export, onnx_path):
    paths = [str(float_export.path), str(onnx_path)]
    results = measure_latency(paths, (1, 2), runs=7, warm_up=1)
    assert [(each.threads, each.path) for each in results] == [
        (1, paths[0]),
        (1, paths[1]),
        (2, paths[0]),
        (2, paths[1]),
    ]
    assert [each.runtime for each in results[:2]] == ["LiteRT", "onnxruntime"]
    for each in results:
        assert each.runs == 7
        median, p90, p99 = each.milliseconds.values()
        assert 0 < each.minimum <= median <= p90 <= p99
        assert each.ratio > 0
    assert results[0].ratio == results[2].ratio == 1


def test_more_work_takes_longer(float_export, tmp_path):
    """The same network behind itself a hundred times would be as fast if nothing ran."""
    schema = import_tflite_schema()
    model = schema.ModelT.InitFromPackedBuf(float_export.path.read_bytes(), 0)
    graph = model.subgraphs[0]
    graph.operators = graph.operators * 100
    path = tmp_path / "long.tflite"
    path.write_bytes(pack.pack_model(model, schema))
    results = measure_latency([float_export.path, path], runs=15)
    assert results[1].ratio > 5


def test_memory_is_that_of_the_file_and_the_runtime(float_export, onnx_path):
    ballast = b"x" * 300_000_000  # Of this process; it must not count.
    for path in (float_export.path, onnx_path):
        memory = measure_memory(path)
        assert 0 <= memory.added < memory.peak < 300_000_000
    assert len(ballast) == 300_000_000


def test_operators_of_onnx_are_timed(onnx_path, float_export):
    times = profile(onnx_path, runs=3)
    assert any("Conv" in op for op in times)
    assert list(times.values()) == sorted(times.values(), reverse=True)
    with pytest.raises(ValueError, match="Only onnxruntime tells"):
        profile(float_export.path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runs": 0}, "`runs` must be at least 1"),
        ({"threads": (0,)}, "`threads` must be at least 1"),
        ({"warm_up": -1}, "`warm_up` must not be negative"),
    ],
)
def test_numbers_that_cannot_be(float_export, options, message):
    with pytest.raises(ValueError, match=message):
        measure_latency([float_export.path], **options)


def test_a_file_that_cannot_be_run(tmp_path):
    path = tmp_path / "m.tflite"
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="no TFLite file"):
        measure_latency([path])
    with pytest.raises(RuntimeError, match="cannot be run"):
        measure_memory(path)
