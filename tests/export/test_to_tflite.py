import os
import subprocess
import sys
import textwrap

import keras
import numpy as np
import pytest
from small_model import build_model

from keras_effnet.export import TFLiteRunner, read_tflite, to_tflite
from keras_effnet.export.int8_tflite import convert_quantized
from keras_effnet.export.to_tflite import _check_file, _Samples, reads_pixels
from keras_effnet.quantization import quantize_model

# Float kernels of LiteRT and of TensorFlow sum in another order.
FLOAT_TOLERANCE = 1e-5
# float16 has 11 significant bits: weights are off by up to 2**-12 of themselves, and the large
# kernel of the small model's head passes that on to the probabilities.
FLOAT16_TOLERANCE = 0.02
# int8 weights have 127 steps a side, and so do the activations.
INT8_MEAN_TOLERANCE = 0.03


class Apply(keras.layers.Layer):
    """A layer that is not of this package, for a function that TFLite handles in its own way."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def call(self, x):
        return self.function(x)


def model_with(function):
    inputs = keras.Input((8, 8, 3))
    x = Apply(function)(keras.layers.Conv2D(4, 3)(inputs))
    return keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(x), name="odd")


def calibration(count=4, size=8):
    return [np.random.default_rng(0).uniform(0, 255, (count, size, size, 3))]


# Files


def test_float32_equals_keras_and_holds_no_shape_arithmetic(model, images, float_export):
    assert float_export.path.read_bytes()[4:8] == b"TFL3"
    assert float_export.file == read_tflite(float_export.path)
    # One operator per layer: batch norms are folded, and nothing computes or changes shapes.
    assert {"SHAPE", "RESHAPE", "PACK", "STRIDED_SLICE"}.isdisjoint(float_export.file.ops)
    assert float_export.file.ops["CONV_2D"] == 2
    assert float_export.file.inputs[0].shape == (1, 16, 16, 3)
    outputs = TFLiteRunner(float_export.path).predict(images)
    np.testing.assert_allclose(outputs, model.predict_on_batch(images), atol=FLOAT_TOLERANCE)


def test_other_weights_give_other_outputs(model, images, float_bytes):
    """The twin of the parity check: it would see a file of other weights."""
    changed = keras.models.clone_model(model)
    changed.set_weights([weight * 1.05 for weight in model.get_weights()])
    difference = changed.predict_on_batch(images) - TFLiteRunner(float_bytes).predict(images)
    assert np.abs(difference).max() > 100 * FLOAT_TOLERANCE


def test_float16_stores_half_precision(model, images, tmp_path):
    export = to_tflite(model, tmp_path / "m.tflite", quantization="float16")
    halves = [tensor for tensor in export.file.inner if tensor.dtype == "float16"]
    assert (8, 3, 3, 3) in [tensor.shape for tensor in halves]
    outputs = TFLiteRunner(export.path).predict(images)
    np.testing.assert_allclose(outputs, model.predict_on_batch(images), atol=FLOAT16_TOLERANCE)


def test_dynamic_stores_int8_weights_and_keeps_float_ends(tmp_path):
    # The converter leaves kernels of fewer than 1024 values in float.
    inputs = keras.Input((8, 8, 3))
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(64, 5)(inputs))
    wide = keras.Model(inputs, keras.layers.Dense(7)(x))
    export = to_tflite(wide, tmp_path / "m.tflite", quantization="dynamic")
    assert [t.shape for t in export.file.inner if t.dtype == "int8"] == [(64, 5, 5, 3)]
    assert export.file.inputs[0].dtype == export.file.outputs[0].dtype == "float32"


def test_int8_is_integer_only(model, images, int8_export):
    assert int8_export.quantization == "int8"
    assert int8_export.io_dtype == "uint8"
    assert int8_export.file.inputs[0].dtype == int8_export.file.outputs[0].dtype == "uint8"
    assert {tensor.dtype for tensor in int8_export.file.inner} <= {"int8", "int32"}
    outputs = TFLiteRunner(int8_export.path).predict(images)
    difference = np.abs(outputs - model.predict_on_batch(images))
    assert difference.mean() < INT8_MEAN_TOLERANCE


def test_uint8_input_takes_pixels_as_they_are(int8_export):
    # The calibration images reach from 0 to 255, which are 255 steps of 1.
    assert int8_export.file.inputs[0].scale == (1.0,)
    assert int8_export.file.inputs[0].zero_point == (0,)


def test_int8_with_float_ends_quantizes_inside(model, images, tmp_path):
    """Also: images of half the brightness give half the input scale."""
    export = to_tflite(
        model, tmp_path / "m.tflite", quantization="int8", calibration_data=[images / 2]
    )
    assert export.file.inputs[0].dtype == export.file.outputs[0].dtype == "float32"
    assert {tensor.dtype for tensor in export.file.inner} <= {"int8", "int32"}
    assert export.file.ops["DEQUANTIZE"] == 1
    quantized = [t for t in export.file.inner if t.shape == (1, 16, 16, 3)]
    assert quantized[0].scale == pytest.approx((0.5,), rel=1e-6)


@pytest.fixture(scope="module")
def quantized(model, images):
    return quantize_model(model, [images], verbose=False)


def test_a_quantized_model_is_written_with_its_own_integers(
    quantized, images, tmp_path, monkeypatch
):
    # TensorFlow's converter would choose ranges of its own.
    monkeypatch.setattr(sys.modules["keras_effnet.export.to_tflite"], "_convert", None)
    path = tmp_path / "m.tflite"
    export = to_tflite(quantized, path, quantization="int8", io_dtype="uint8")
    assert path.read_bytes() == convert_quantized(quantized, "uint8")
    assert export.file.inner_floats == ()
    outputs = TFLiteRunner(path).predict(images)
    # Both round every tensor to the same steps; sums that fall between two steps may differ.
    np.testing.assert_allclose(outputs, quantized.predict_on_batch(images), atol=3 / 256)


def test_a_quantized_model_still_reads_pixels(quantized):
    assert reads_pixels(quantized)


def test_a_quantized_model_needs_no_calibration_and_gives_no_other_file(
    quantized, images, tmp_path
):
    path = tmp_path / "m.tflite"
    with pytest.raises(ValueError, match="exported with quantization='int8'.*'float32'"):
        to_tflite(quantized, path)
    with pytest.raises(ValueError, match="holds its ranges already"):
        to_tflite(quantized, path, quantization="int8", calibration_data=[images])
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["MobileNetV2", "EfficientNetB0", "EfficientNetV2B0"])
def test_models_of_keras_applications(name, tmp_path):
    model = getattr(keras.applications, name)(weights=None, input_shape=(96, 96, 3), classes=10)
    random = np.random.default_rng(0)
    for variable in model.variables:
        if variable.path.endswith(("gamma", "moving_variance")):
            variable.assign(random.uniform(0.8, 1.25, variable.shape))
    images = random.uniform(0, 255, (4, 96, 96, 3)).astype(np.float32)
    export = to_tflite(model, tmp_path / "float.tflite")
    expected = model.predict_on_batch(images)
    np.testing.assert_allclose(
        TFLiteRunner(export.path).predict(images), expected, atol=FLOAT_TOLERANCE
    )
    to_tflite(
        model,
        tmp_path / "int8.tflite",
        quantization="int8",
        calibration_data=[images],
        io_dtype="uint8",
    )
    assert read_tflite(tmp_path / "int8.tflite").inner_floats == ()


# Refusals


def test_refuses_options_that_do_not_fit(model, tmp_path):
    path = tmp_path / "m.tflite"
    with pytest.raises(ValueError, match="`quantization` must be one of.*'int4'"):
        to_tflite(model, path, quantization="int4")
    with pytest.raises(ValueError, match="`io_dtype` must be one of.*'int16'"):
        to_tflite(model, path, io_dtype="int16")
    with pytest.raises(ValueError, match="io_dtype='uint8' needs quantization='int8'.*'float16'"):
        to_tflite(model, path, quantization="float16", io_dtype="uint8")
    with pytest.raises(ValueError, match="quantization='int8' needs `calibration_data`"):
        to_tflite(model, path, quantization="int8")
    with pytest.raises(ValueError, match="used by quantization='int8' alone.*'float32'"):
        to_tflite(model, path, calibration_data=calibration())
    assert os.listdir(tmp_path) == []


def test_refuses_an_existing_file_before_any_work(model, tmp_path):
    path = tmp_path / "m.tflite"
    path.write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        to_tflite(model, path)
    assert path.read_bytes() == b"mine"


def two_inputs():
    inputs = [keras.Input((4,)), keras.Input((4,))]
    return keras.Model(inputs, keras.layers.Add()(inputs))


class Subclassed(keras.Model):
    def call(self, x):
        return x


def half_precision():
    inputs = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(4, 3, dtype="mixed_float16", name="half")(inputs)
    return keras.Model(inputs, keras.layers.GlobalAveragePooling2D(dtype="float32")(x))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: build_model(size=None), "full `input_shape`.*Received: input shape"),
        (two_inputs, "one input and one output.*2 inputs and 1 outputs"),
        (Subclassed, "Only Functional models.*Received: Subclassed"),
        (keras.Sequential, "Only Functional models.*Received: Sequential"),
        (half_precision, "half precision.*float32.*Received: half-precision layers half"),
    ],
)
def test_refuses_models_that_have_no_fixed_float32_graph(build, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        to_tflite(build(), tmp_path / "m.tflite")
    assert os.listdir(tmp_path) == []


def test_refuses_what_is_no_model(tmp_path):
    with pytest.raises(TypeError, match="must be a Keras model. Received: str"):
        to_tflite("m.keras", tmp_path / "m.tflite")


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ([], ValueError, "hold no batch"),
        (iter(calibration(size=16)), TypeError, "more than once.*used up by the first pass"),
        (calibration(size=8), ValueError, r"shape \(n, 16, 16, 3\).*Received: \(4, 8, 8, 3\)"),
        ([np.zeros((16, 16, 3))], ValueError, r"Received: \(16, 16, 3\)"),
        ([np.full((1, 16, 16, 3), np.nan)], ValueError, "not finite"),
        ([np.full((1, 16, 16, 3), "x")], TypeError, "hold numbers. Received: dtype <U1"),
    ],
)
def test_refuses_bad_calibration_data_before_the_conversion(
    model, data, error, message, tmp_path, monkeypatch
):
    # By the module's name in the package one reaches the function of the same name.
    monkeypatch.setattr(sys.modules["keras_effnet.export.to_tflite"], "_convert", None)
    with pytest.raises(error, match=message):
        to_tflite(model, tmp_path / "m.tflite", quantization="int8", calibration_data=data)


@pytest.mark.parametrize(
    ("later", "message"),
    [
        (np.full((1, 16, 16, 3), np.inf), "not finite"),
        (np.zeros((1, 8, 8, 3)), r"Received: \(1, 8, 8, 3\)"),
        (np.ones((1, 16, 16, 3)), "pixels in 0..255. Received: nothing above 1"),
    ],
)
def test_refuses_bad_calibration_data_that_come_later(model, later, message):
    samples = _Samples([np.ones((1, 16, 16, 3)), later], model)
    samples.check_first()
    with pytest.raises(ValueError, match=message):
        list(samples())


def test_an_error_in_the_calibration_data_passes_through_the_converter(model, tmp_path):
    data = [np.ones((1, 16, 16, 3)), np.zeros((1, 8, 8, 3))]
    with pytest.raises(ValueError, match="Calibration batches must have the shape"):
        to_tflite(model, tmp_path / "m.tflite", quantization="int8", calibration_data=data)
    assert os.listdir(tmp_path) == []


def test_calibration_samples_are_single_images_in_order(model, images):
    samples = [sample for [sample] in _Samples([images[:20], images[20:]], model)()]
    assert {sample.shape for sample in samples} == {(1, 16, 16, 3)}
    np.testing.assert_array_equal(np.concatenate(samples), images)


def test_knows_which_models_read_pixels(model):
    assert reads_pixels(model)
    inputs = keras.Input((8, 8, 3))
    assert not reads_pixels(keras.Model(inputs, keras.layers.Flatten()(inputs)))
    assert not reads_pixels(keras.Model(inputs, keras.layers.Rescaling(2.0)(inputs)))


def test_names_an_operator_that_tflite_lacks(tmp_path):
    odd = model_with(lambda x: keras.ops.erfinv(x / 1000))
    with pytest.raises(ValueError, match="TFLite has no operator for Erfinv in 'odd'"):
        to_tflite(odd, tmp_path / "m.tflite")
    assert os.listdir(tmp_path) == []


def test_refuses_an_int8_file_with_float_tensors(tmp_path):
    odd = model_with(keras.ops.sin)
    with pytest.raises(RuntimeError, match="left float tensors between input and output.*Sin"):
        to_tflite(odd, tmp_path / "m.tflite", quantization="int8", calibration_data=calibration())
    assert os.listdir(tmp_path) == []


def test_the_check_sees_a_file_with_an_open_batch(model):
    from keras_effnet.export._optional import import_tensorflow

    data = import_tensorflow().lite.TFLiteConverter.from_keras_model(model).convert()
    with pytest.raises(RuntimeError, match="shapes to be computed while the file runs"):
        _check_file(read_tflite(data), "float32")


def test_says_which_package_is_missing(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ai_edge_litert.schema_py_generated", None)
    with pytest.raises(ImportError, match=r"ai-edge-litert.*pip install .keras-effnet\[tflite\]"):
        read_tflite(b"")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_other_backends_are_told_the_way(backend, tmp_path):
    pytest.importorskip(backend)
    code = """
        import sys, keras
        from keras_effnet.export import to_tflite
        inputs = keras.Input((8, 8, 3))
        model = keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(inputs))
        to_tflite(model, sys.argv[1])
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "m.tflite")],
        env={**os.environ, "KERAS_BACKEND": backend},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 1
    assert "KERAS_BACKEND=tensorflow" in result.stderr
    assert f"Received: backend '{backend}'" in result.stderr
