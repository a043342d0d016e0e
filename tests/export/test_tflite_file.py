import keras
import numpy as np
import pytest

from keras_effnet.export import read_tflite, to_tflite
from keras_effnet.export._optional import import_litert


def test_reads_what_litert_reports(int8_bytes):
    """LiteRT's own reader is the reference, tensor by tensor."""
    interpreter = import_litert().Interpreter(model_content=int8_bytes)
    file = read_tflite(int8_bytes)
    details = {detail["name"]: detail for detail in interpreter.get_tensor_details()}
    tensors = (*file.inputs, *file.inner, *file.outputs)
    # With its default delegate the interpreter adds temporary tensors of its own.
    assert {tensor.name for tensor in tensors} <= set(details)
    for tensor in tensors:
        detail = details[tensor.name]
        assert np.dtype(tensor.dtype) == detail["dtype"]
        assert tensor.shape == tuple(detail["shape_signature"])
        parameters = detail["quantization_parameters"]
        np.testing.assert_array_equal(np.float32(tensor.scale), parameters["scales"])
        np.testing.assert_array_equal(tensor.zero_point, parameters["zero_points"])
        assert tensor.quantized_dimension == parameters["quantized_dimension"]


def test_counts_the_operators_of_the_model(float_bytes):
    file = read_tflite(float_bytes)
    assert file.ops["CONV_2D"] == 2
    assert file.ops["DEPTHWISE_CONV_2D"] == 1
    assert file.ops["MEAN"] == 2
    assert file.ops["SOFTMAX"] == 1
    assert file.size == len(float_bytes)
    assert set(file.op_versions) == set(file.ops)
    assert min(file.op_versions.values()) >= 1


def test_tells_constants_from_computed_tensors(float_bytes):
    file = read_tflite(float_bytes)
    kernels = [tensor for tensor in file.inner if tensor.shape == (8, 3, 3, 3)]
    assert [tensor.constant for tensor in kernels] == [True]
    computed = [tensor for tensor in file.inner if tensor.shape == (1, 8, 8, 8)]
    assert computed
    assert not any(tensor.constant for tensor in computed)


def test_finds_float_tensors_between_input_and_output(float_bytes, int8_bytes):
    assert read_tflite(int8_bytes).inner_floats == ()
    assert len(read_tflite(float_bytes).inner_floats) > 10


def test_reads_from_a_path(float_bytes, tmp_path):
    path = tmp_path / "m.tflite"
    path.write_bytes(float_bytes)
    assert read_tflite(path) == read_tflite(float_bytes)


def test_refuses_what_is_no_tflite_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file.*missing.tflite"):
        read_tflite(tmp_path / "missing.tflite")
    for content in (b"", b"TFL3", b"PK\3\4 a zip archive"):
        path = tmp_path / "m.tflite"
        path.write_bytes(content)
        with pytest.raises(ValueError, match="m.tflite.*is no TFLite file"):
            read_tflite(path)


def test_refuses_a_truncated_file(float_bytes):
    with pytest.raises(ValueError, match="damaged TFLite file"):
        read_tflite(float_bytes[:2000])


def test_names_operators_beyond_the_first_127(tmp_path):
    """Their codes stand in another field of the file; GELU has the code 150."""
    inputs = keras.Input((8,))
    model = keras.Model(inputs, keras.layers.Dense(4, activation="gelu")(inputs))
    assert to_tflite(model, tmp_path / "m.tflite").file.ops["GELU"] == 1
