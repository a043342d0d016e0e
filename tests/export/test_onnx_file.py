import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from keras_effnet.export import ONNXRunner, optimized, read_onnx, to_onnx

# Kernels of onnxruntime and of TensorFlow sum in another order.
FLOAT_TOLERANCE = 1e-5


def model_of(nodes, inputs, outputs, constants=(), **metadata):
    """A hand-made model as bytes; inputs and outputs are `name=(type, shape)`."""
    values = [
        [helper.make_tensor_value_info(name, *kind) for name, kind in ends.items()]
        for ends in (inputs, outputs)
    ]
    initializers = [numpy_helper.from_array(np.asarray(v), name) for name, v in constants]
    graph = helper.make_graph(nodes, "g", *values, initializers)
    opset = [helper.make_opsetid("", 13)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=8)
    helper.set_model_props(model, metadata)
    return model.SerializeToString()


@pytest.fixture
def half():
    """uint8 in and out, computing x * 0.5 in float between."""
    nodes = [
        helper.make_node("DequantizeLinear", ["x", "scale", "zero"], ["real"]),
        helper.make_node("Sinh", ["real"], ["sinh"]),
        helper.make_node("QuantizeLinear", ["sinh", "scale", "zero"], ["y"]),
    ]
    ends = {"input_scale": "0.5", "input_zero_point": "10"}
    ends |= {"output_scale": "0.5", "output_zero_point": "10"}
    constants = [("scale", np.float32(0.5)), ("zero", np.uint8(10))]
    kind = (TensorProto.UINT8, ["n", 4])
    return model_of(nodes, {"x": kind}, {"y": kind}, constants, **ends)


def test_reads_what_stands_in_a_file(half, tmp_path):
    (tmp_path / "m.onnx").write_bytes(half)
    file = read_onnx(tmp_path / "m.onnx")
    assert file == read_onnx(half)
    assert file.size == len(half)
    assert (file.opset, file.ir_version) == (13, 8)
    assert file.ops == {"DequantizeLinear": 1, "Sinh": 1, "QuantizeLinear": 1}
    [tensor] = file.inputs
    assert (tensor.name, tensor.dtype, tensor.shape) == ("x", "uint8", (-1, 4))
    assert (tensor.scale, tensor.zero_point) == ((0.5,), (10,))
    assert file.external == ()


def test_counts_what_stays_in_float(half):
    graph = optimized(half)
    assert graph.float_ops == {"Sinh": 1}
    assert (graph.float_nodes, graph.conversions) == (1, 2)


def test_counts_a_cast_and_what_follows_it():
    nodes = [
        helper.make_node("Cast", ["x"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Sinh", ["f"], ["g"]),
        helper.make_node("Cast", ["g"], ["i"], to=TensorProto.INT32),
        helper.make_node("Neg", ["i"], ["y"]),
    ]
    ends = {"x": (TensorProto.INT32, [3])}, {"y": (TensorProto.INT32, [3])}
    assert optimized(model_of(nodes, *ends)).float_ops == {"Cast": 1, "Sinh": 1}


def test_counts_integer_kernels_as_none(half):
    data = onnx.ModelProto.FromString(half)
    data.graph.node[1].op_type = "Sigmoid"
    graph = optimized(data.SerializeToString())
    assert graph.ops == {"QLinearSigmoid": 1}
    assert (graph.float_nodes, graph.conversions) == (0, 0)


def test_an_integer_kernel_may_read_its_scale_first():
    """QLinearConcat does, so the type of its first input says nothing."""
    read = helper.make_node
    nodes = [
        read("DequantizeLinear", ["x", "scale", "zero"], ["a"]),
        read("DequantizeLinear", ["x", "scale", "zero"], ["b"]),
        read("Concat", ["a", "b"], ["c"], axis=1),
        read("QuantizeLinear", ["c", "scale", "zero"], ["y"]),
    ]
    ends = {"x": (TensorProto.UINT8, [1, 2])}, {"y": (TensorProto.UINT8, [1, 4])}
    constants = [("scale", np.float32(0.5)), ("zero", np.uint8(10))]
    graph = optimized(model_of(nodes, *ends, constants))
    assert (graph.ops, graph.float_ops) == ({"QLinearConcat": 1}, {})


@pytest.mark.parametrize("content", [b"not a model", b"", b"\x08\x08"])
def test_refuses_what_is_no_onnx_file(content, tmp_path):
    (tmp_path / "m.onnx").write_bytes(content)
    for read in (read_onnx, ONNXRunner):
        with pytest.raises(ValueError, match="m.onnx' is no ONNX file"):
            read(tmp_path / "m.onnx")


def test_refuses_a_missing_file(tmp_path):
    for read in (read_onnx, ONNXRunner, optimized):
        with pytest.raises(FileNotFoundError, match="no file .*m.onnx"):
            read(tmp_path / "m.onnx")


# The runner


def test_floats_go_in_and_come_out(half):
    # Integers 10, 11, 8 and 255 (clipped) stand for 0, 0.5, -1 and 122.5; sinh(0.5) = 0.52 is
    # nearest to 0.5, sinh(-1) = -1.18 to -1, and sinh(122.5) is beyond the range.
    outputs = ONNXRunner(half).predict(np.float32([[0, 0.45, -1, 1000]]))
    np.testing.assert_array_equal(outputs, np.float32([[0, 0.5, -1, 122.5]]))


def test_threads_do_not_change_the_result(model, images, tmp_path):
    path = to_onnx(model, tmp_path / "m.onnx").path
    one = ONNXRunner(path, threads=1).predict(images[:4])
    two = ONNXRunner(path.read_bytes(), threads=2).predict(images[:4])
    np.testing.assert_allclose(one, two, atol=FLOAT_TOLERANCE)
    assert ONNXRunner(path).predict(images[:0]).shape == (0, 7)
    with pytest.raises(ValueError, match="`threads` must be at least 1.*threads=0"):
        ONNXRunner(path, threads=0)


@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
def test_refuses_images_of_another_shape(model, tmp_path, layout):
    runner = ONNXRunner(to_onnx(model, tmp_path / "m.onnx", layout=layout).path)
    with pytest.raises(ValueError, match=r"\(n, 16, 16, 3\). Received: shape \(2, 8, 8, 3\)"):
        runner.predict(np.zeros((2, 8, 8, 3)))
    with pytest.raises(ValueError, match=r"Received: shape \(16, 16, 3\)"):
        runner.predict(np.zeros((16, 16, 3)))


def test_a_file_of_another_maker_is_given_its_layout():
    """It says nothing of its layout: three channels stand where they stand."""
    kinds = {"x": (TensorProto.FLOAT, [1, 3, 2, 2])}, {"y": (TensorProto.FLOAT, [1, 12])}
    nodes = [helper.make_node("Flatten", ["x"], ["y"])]
    images = np.arange(12, dtype=np.float32).reshape(1, 2, 2, 3)
    outputs = ONNXRunner(model_of(nodes, *kinds)).predict(images)
    np.testing.assert_array_equal(outputs, images.transpose(0, 3, 1, 2).reshape(1, 12))


def test_refuses_several_outputs():
    kind = (TensorProto.FLOAT, [1, 4])
    nodes = [helper.make_node("Split", ["x"], ["y", "z"], axis=1)]
    half = (TensorProto.FLOAT, [1, 2])
    with pytest.raises(ValueError, match=r"one output can be run.*outputs \['y', 'z'\]"):
        ONNXRunner(model_of(nodes, {"x": kind}, {"y": half, "z": half}))
