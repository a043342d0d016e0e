import numpy as np
import pytest

from keras_effnet.export import TensorInfo, TFLiteRunner
from keras_effnet.export.runner import dequantize, quantize

# Float kernels of LiteRT and of TensorFlow sum in another order.
FLOAT_TOLERANCE = 1e-5

UINT8 = TensorInfo("t", "uint8", (1,), scale=(0.5,), zero_point=(10,))


def test_quantizes_by_hand_computed_integers():
    # 2.0 / 0.5 + 10 = 14; -5 / 0.5 + 10 = 0; below and above the range is clipped.
    values = np.float32([2.0, -5.0, 0.2, -100.0, 1000.0])
    quantized = quantize(values, UINT8)
    assert quantized.dtype == np.uint8
    np.testing.assert_array_equal(quantized, [14, 0, 10, 0, 255])


def test_dequantizes_by_hand_computed_values():
    np.testing.assert_array_equal(
        dequantize(np.uint8([0, 10, 255]), UINT8), np.float32([-5.0, 0.0, 122.5])
    )


def test_floats_stay_as_they_are():
    tensor = TensorInfo("t", "float32", (1,))
    values = np.float32([1.5, -2.0])
    np.testing.assert_array_equal(quantize(values, tensor), values)
    np.testing.assert_array_equal(dequantize(values, tensor), values)


def test_refuses_integers_without_one_scale():
    with pytest.raises(ValueError, match="'t' of type int8 must have one scale. Received: 0"):
        quantize(np.zeros(1), TensorInfo("t", "int8", (1,)))


def test_a_float_file_gives_the_outputs_of_keras(model, images, float_bytes):
    outputs = TFLiteRunner(float_bytes).predict(images)
    assert outputs.dtype == np.float32
    expected = model.predict_on_batch(images)
    # The images must tell the classes apart, or agreement would mean nothing.
    assert len(np.unique(expected.argmax(axis=1))) > 2
    np.testing.assert_allclose(outputs, expected, atol=FLOAT_TOLERANCE)


def test_an_integer_file_is_given_floats_and_gives_floats(images, int8_bytes):
    runner = TFLiteRunner(int8_bytes)
    outputs = runner.predict(images)
    assert runner.file.inputs[0].dtype == runner.file.outputs[0].dtype == "uint8"
    # TFLite fixes the scale of probabilities to 1/256: the outputs are its multiples.
    np.testing.assert_array_equal(outputs * 256, np.round(outputs * 256))
    # Seven probabilities, each rounded by at most half a step.
    np.testing.assert_allclose(outputs.sum(axis=1), 1, atol=3.5 / 256)


def test_threads_do_not_change_the_result(images, float_bytes):
    one = TFLiteRunner(float_bytes, threads=1).predict(images[:4])
    two = TFLiteRunner(float_bytes, threads=2).predict(images[:4])
    np.testing.assert_allclose(one, two, atol=FLOAT_TOLERANCE)
    with pytest.raises(ValueError, match="`threads` must be at least 1.*threads=0"):
        TFLiteRunner(float_bytes, threads=0)


def test_an_empty_batch_gives_no_outputs(images, float_bytes):
    assert TFLiteRunner(float_bytes).predict(images[:0]).shape == (0, 7)


def test_refuses_images_of_another_shape(float_bytes):
    with pytest.raises(ValueError, match=r"\(n, 16, 16, 3\). Received: shape \(2, 8, 8, 3\)"):
        TFLiteRunner(float_bytes).predict(np.zeros((2, 8, 8, 3)))
    with pytest.raises(ValueError, match=r"Received: shape \(16, 16, 3\)"):
        TFLiteRunner(float_bytes).predict(np.zeros((16, 16, 3)))


def test_refuses_what_is_no_tflite_file(tmp_path):
    (tmp_path / "m.tflite").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="is no TFLite file"):
        TFLiteRunner(tmp_path / "m.tflite")
