import json
import os

import keras
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper, parser
from small_model import CLASSES, SIZE, build_model

from keras_effnet.export import (
    ONNXRunner,
    TFLiteRunner,
    compare,
    read_onnx,
    read_tflite,
    to_onnx,
    to_tflite,
)
from keras_effnet.export.report import agreement_warning
from keras_effnet.export.to_onnx import MAX_OPSET, MIN_OPSET, check_proto, remove_round_trips
from keras_effnet.quantization import QuantizationConfig, quantize_model
from keras_effnet.quantization.lowering import integer_kernel, read_quantized

# Kernels of onnxruntime and of TensorFlow sum in another order.
FLOAT_TOLERANCE = 1e-5
# One step of a probability in 8 bits: scales are chosen so that runtimes round alike, but a table
# of sigmoids is computed by each in its own way.
ONE_STEP = 1 / 256
INPUT_FORMS = [
    (MIN_OPSET, "nhwc", False),
    (17, "nchw", True),
    (MAX_OPSET, "nhwc", True),
    (MAX_OPSET, "nchw", False),
]
FAST = QuantizationConfig(method="min_max", corrections=())


@pytest.fixture(scope="module")
def quantized(model, images):
    return quantize_model(model, [images[:20], images[20:]], FAST, verbose=False)


@pytest.fixture(scope="module")
def tflite_bytes(quantized, tmp_path_factory):
    path = tmp_path_factory.mktemp("tflite") / "q.tflite"
    return to_tflite(quantized, path, quantization="int8", io_dtype="uint8").path.read_bytes()


@pytest.fixture(scope="module")
def int8_onnx(quantized, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "q.onnx"
    return to_onnx(quantized, path, quantization="int8", io_dtype="uint8")


@pytest.fixture(scope="module")
def float_onnx(model, tmp_path_factory):
    return to_onnx(model, tmp_path_factory.mktemp("onnx") / "m.onnx")


# Float


@pytest.mark.parametrize(("opset", "layout", "dynamic"), INPUT_FORMS)
def test_a_float_file_gives_the_outputs_of_keras(model, images, tmp_path, opset, layout, dynamic):
    export = to_onnx(model, tmp_path / "m.onnx", opset=opset, layout=layout, dynamic_batch=dynamic)
    expected = model.predict_on_batch(images)
    assert len(np.unique(expected.argmax(axis=1))) > 2
    np.testing.assert_allclose(
        ONNXRunner(export.path).predict(images), expected, atol=FLOAT_TOLERANCE
    )
    assert export.file.opset == opset
    [tensor], batch = export.file.inputs, -1 if dynamic else 1
    shape = (SIZE, SIZE, 3) if layout == "nhwc" else (3, SIZE, SIZE)
    assert (tensor.name, tensor.dtype, tensor.shape) == ("images", "float32", (batch, *shape))
    [tensor] = export.file.outputs
    assert (tensor.name, tensor.shape) == ("outputs", (batch, CLASSES))
    # The one of an input whose channels come last; there are no round trips within.
    assert export.file.ops.get("Transpose", 0) == (layout == "nhwc")
    assert "Reshape" not in export.file.ops
    assert "BatchNormalization" not in export.file.ops
    assert export.file.metadata["layout"] == layout


def test_what_reads_nhwc_anyhow_is_given_it(tmp_path):
    inputs = keras.Input((4, 4, 3))
    outputs = keras.layers.Dense(5)(keras.layers.Flatten()(inputs))
    model = keras.Model(inputs, outputs)
    images = np.random.default_rng(0).normal(size=(3, 4, 4, 3)).astype(np.float32)
    for layout in ("nhwc", "nchw"):
        path = tmp_path / f"{layout}.onnx"
        export = to_onnx(model, path, layout=layout)
        assert export.file.ops.get("Transpose", 0) == (layout == "nchw")
        np.testing.assert_allclose(
            ONNXRunner(path).predict(images), model.predict_on_batch(images), atol=FLOAT_TOLERANCE
        )


@pytest.mark.parametrize(
    ("nodes", "kept"),
    [
        # What tf2onnx leaves around a squeeze-and-excite, in one order of its sets and in another.
        ("b = Reshape(a, nchw) y = Relu(b)", ["Relu"]),
        ("b = Transpose<perm=[0,2,3,1]>(a) c = Reshape(b, nchw) y = Relu(c)", ["Relu"]),
        ("b = Reshape(a, nhwc) c = Transpose<perm=[0,3,1,2]>(b) y = Relu(c)", ["Relu"]),
        # Its end in another layout is needed, what lies between is not.
        (
            "b = Reshape(a, nhwc) c = Reshape(b, nchw) d = Reshape(c, nhwc) y = Relu(d)",
            ["Reshape", "Relu"],
        ),
        # It is read on its way too.
        (
            "b = Reshape(a, nhwc) c = Reshape(b, nchw) d = Relu(b) e = Reshape(d, nchw)"
            " y = Add(c, e)",
            ["Reshape", "Relu", "Reshape", "Add"],
        ),
        # These change the order of the values.
        ("b = Transpose<perm=[0,1,3,2]>(x) y = Relu(b)", ["Transpose", "Relu"]),
        ("b = Transpose<perm=[1,0,2,3]>(a) y = Relu(b)", ["Transpose", "Relu"]),
        # This one takes images apart.
        ("b = Reshape(x, nchw) y = Relu(b)", ["Reshape", "Relu"]),
        # The name of an output stays.
        ("y = Reshape(a, nchw)", ["Reshape"]),
    ],
)
@pytest.mark.parametrize("shape", ["N,5,3,3", "1,5,3,3", "2,5,3,3", "N,5,H,W"])
def test_round_trips_of_layouts_are_removed(nodes, kept, shape):
    proto = parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 17]>
        g (float[{shape}] x) => (float y)
        <int64[4] nchw = {{-1, 5, 1, 1}}, int64[4] nhwc = {{-1, 1, 1, 5}}>
        {{ a = GlobalAveragePool(x) {nodes} }}"""
    )
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    batch = 1 if shape.startswith("1") else 2
    images = np.random.default_rng(0).normal(size=(batch, 5, 3, 3))
    expected, outputs = (
        run_proto(model, images.astype(np.float32))
        for model in (proto, remove_round_trips(onnx, proto))
    )
    names = [node.op_type for node in proto.graph.node]
    assert [name for name in names if name != "GlobalAveragePool"] == kept
    assert {tensor.name for tensor in proto.graph.initializer} == {
        name for node in proto.graph.node for name in node.input if name in ("nchw", "nhwc")
    }
    np.testing.assert_array_equal(outputs, expected)


def run_proto(proto, images):
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    return session.run(None, {"x": images})[0]


def test_the_model_is_not_changed(model, images, float_onnx, int8_onnx):
    expected = build_model().predict_on_batch(images)
    np.testing.assert_allclose(model.predict_on_batch(images), expected, atol=FLOAT_TOLERANCE)


# Int8


@pytest.mark.parametrize("opset", [MIN_OPSET, MAX_OPSET])
@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
@pytest.mark.parametrize("io_dtype", ["uint8", "int8", "float32"])
@pytest.mark.parametrize("activation_dtype", ["uint8", "int8"])
def test_an_int8_file_gives_the_outputs_of_the_tflite_file(
    quantized, images, tflite_bytes, tmp_path, opset, layout, io_dtype, activation_dtype
):
    export = to_onnx(
        quantized,
        tmp_path / "q.onnx",
        quantization="int8",
        opset=opset,
        layout=layout,
        io_dtype=io_dtype,
        activation_dtype=activation_dtype,
        dynamic_batch=opset == MAX_OPSET,
    )
    assert export.file.inputs[0].dtype == export.file.outputs[0].dtype == io_dtype
    outputs = ONNXRunner(export.path).predict(images)
    expected = TFLiteRunner(tflite_bytes).predict(images)
    assert len(np.unique(expected.argmax(axis=1))) > 2
    np.testing.assert_allclose(outputs, expected, atol=ONE_STEP)
    assert np.mean(outputs != expected) < 0.01
    if activation_dtype == "uint8":
        assert export.optimized.float_ops == {}
        # To and from uint8, if the ends have another type.
        assert export.optimized.conversions == {"uint8": 0, "float32": 2, "int8": 4}[io_dtype]


def test_onnxruntime_runs_integer_kernels(int8_onnx):
    ops = int8_onnx.optimized.ops
    assert int8_onnx.optimized.float_nodes == int8_onnx.optimized.conversions == 0
    kernels = {"QLinearConv", "QLinearAdd", "QLinearMul", "QLinearSigmoid", "QGemm"}
    assert kernels | {"QLinearGlobalAveragePool", "QLinearSoftmax"} <= set(ops)
    assert ops["QLinearConv"] == 3
    assert set(ops) - {"Transpose", "Reshape"} == {name for name in ops if name.startswith("Q")}


@pytest.mark.parametrize("activation_dtype", ["uint8", "int8"])
def test_scales_and_zero_points_are_those_of_the_tflite_file(
    quantized, tflite_bytes, tmp_path, activation_dtype
):
    export = to_onnx(
        quantized,
        tmp_path / "q.onnx",
        quantization="int8",
        io_dtype="uint8",
        activation_dtype=activation_dtype,
    )
    assert mismatches(export.path, read_tflite(tflite_bytes), activation_dtype) == []


@pytest.mark.parametrize("activation_dtype", ["uint8", "int8"])
def test_kernels_have_the_type_of_the_activations(quantized, tmp_path, activation_dtype):
    # Where a processor has VNNI, nothing else here would tell: uint8 times int8 saturates without.
    path = tmp_path / "q.onnx"
    to_onnx(quantized, path, quantization="int8", activation_dtype=activation_dtype)
    graph = onnx.load(path).graph
    constants = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    kernels = [node.input for node in graph.node if node.input[0].endswith("/kernel/integers")]
    assert len(kernels) == 4
    nodes = read_quantized(quantized)
    for integers, _, zero_points in kernels:
        kernel, zeros = constants[integers], constants[zero_points]
        assert kernel.dtype == zeros.dtype == activation_dtype
        zero = 128 if activation_dtype == "uint8" else 0
        assert (zeros == zero).all()
        expected, _ = integer_kernel(nodes[integers.removesuffix("/kernel/integers")])
        # In another order of the axes.
        np.testing.assert_array_equal(
            np.sort(kernel.reshape(-1).astype(int)) - zero, np.sort(expected.reshape(-1))
        )


def name_of(model, kind):
    """Name of the first layer of a type; Keras numbers them."""
    return next(layer.name for layer in model.layers if type(layer) is kind)


def test_the_comparison_of_parameters_sees_a_change(model, int8_onnx, tflite_bytes, tmp_path):
    file = read_tflite(tflite_bytes)
    multiply, conv = name_of(model, keras.layers.Multiply), name_of(model, keras.layers.Conv2D)
    for name, change in ((f"{multiply}/zero_point", 1), (f"{conv}/kernel/scale", 1e-9)):
        proto = onnx.load(int8_onnx.path)
        edit(proto, name, lambda values, change=change: values + values.dtype.type(change))
        onnx.save(proto, tmp_path / "changed.onnx")
        found = mismatches(tmp_path / "changed.onnx", file, "uint8")
        assert [entry for entry in found if entry.startswith(name.rpartition("/")[0])], found


def mismatches(path, tflite, dtype):
    """What differs between the parameters of the tensors of the two files, and of the kernels."""
    constants = {
        constant.name: numpy_helper.to_array(constant)
        for constant in onnx.load(path).graph.initializer
    }
    shift = 128 if dtype == "uint8" else 0
    found, seen = [], 0
    for tensor in tflite.inner:
        if f"{tensor.name}/scale" not in constants:
            # An activation of the same parameters as what it reads, or no quantized tensor.
            continue
        seen += 1
        scale = constants[f"{tensor.name}/scale"].reshape(-1)
        if not np.array_equal(scale, np.float32(tensor.scale)):
            found.append(f"{tensor.name} scale {scale} {tensor.scale}")
        if tensor.dtype == "int8" and not tensor.constant:
            zero_point = int(constants[f"{tensor.name}/zero_point"])
            if zero_point != tensor.zero_point[0] + shift:
                found.append(f"{tensor.name} zero point {zero_point} {tensor.zero_point}")
    # Three convolutions and a dense layer with kernel and bias, and nine activations at least.
    if seen < 17:
        found.append(f"only {seen} tensors were compared")
    return found


@pytest.fixture(scope="module")
def every_layer():
    """A model with every layer that the quantizer knows and the small model has not."""
    keras.utils.set_random_seed(1)
    layers = keras.layers
    inputs = keras.Input((SIZE, SIZE, 3))
    x = layers.Rescaling(1 / 255)(inputs)
    x = layers.ZeroPadding2D(((1, 0), (2, 1)))(x)
    x = layers.Conv2D(8, 3, strides=2, activation="relu")(x)
    first = layers.MaxPooling2D(3, strides=2, padding="same")(x)
    second = layers.AveragePooling2D(2, padding="same")(x)
    second = layers.Conv2D(8, (1, 3), padding="same", groups=2, activation="relu6")(second)
    x = layers.Concatenate()([first, second])
    x = layers.ReLU()(layers.Add()([x, layers.Conv2D(16, 3, padding="same")(x)]))
    x = layers.Activation("hard_swish")(x)
    gate = layers.GlobalMaxPooling2D(keepdims=True)(x)
    x = layers.Multiply()([x, layers.Conv2D(16, 1, activation="sigmoid")(gate)])
    flat = layers.Flatten()(x)
    pooled = layers.GlobalMaxPooling2D()(x)
    x = layers.Concatenate()([layers.Dense(6)(flat), layers.Dense(6, activation="relu")(pooled)])
    outputs = layers.Dense(CLASSES)(layers.Reshape((12,))(x))
    return keras.Model(inputs, outputs, name="every")


@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
def test_every_layer_is_written(every_layer, images, tmp_path, layout):
    quantized = quantize_model(every_layer, [images], FAST, verbose=False)
    tflite = to_tflite(quantized, tmp_path / "q.tflite", quantization="int8").path
    export = to_onnx(
        quantized, tmp_path / "q.onnx", quantization="int8", layout=layout, dynamic_batch=True
    )
    outputs = ONNXRunner(export.path).predict(images)
    expected = TFLiteRunner(tflite).predict(images)
    step = TFLiteRunner(tflite).predict(images[:1])
    spread = np.ptp(expected)
    assert spread > 0 and step.shape == (1, CLASSES)
    # hard_swish is computed in float here and by a table there, which may differ by a step.
    assert np.abs(outputs - expected).max() < 0.05 * spread
    assert set(export.optimized.float_ops) <= {"HardSigmoid", "Mul", "Relu", "Clip", "AveragePool"}


@pytest.mark.parametrize("activation_dtype", ["uint8", "int8"])
@pytest.mark.parametrize("activation", ["relu", "relu6"])
def test_fused_activations_clip_the_integers(images, tmp_path, activation, activation_dtype):
    """Joined with a tensor of a wider range, they have zero and six amid their integers."""
    keras.utils.set_random_seed(0)
    layers = keras.layers
    inputs = keras.Input((SIZE, SIZE, 3))
    x = layers.Rescaling(1 / 255)(inputs)
    parts = [layers.Conv2D(4, 3, activation=kind, name=kind)(x) for kind in (activation, "linear")]
    x = layers.GlobalAveragePooling2D()(layers.Concatenate()(parts))
    model = keras.Model(inputs, layers.Dense(CLASSES)(x))
    for name in (activation, "linear"):
        kernel, bias = model.get_layer(name).get_weights()
        model.get_layer(name).set_weights([20 * kernel, bias])
    quantized = quantize_model(model, [images], FAST, verbose=False)
    export = to_onnx(
        quantized, tmp_path / "q.onnx", quantization="int8", activation_dtype=activation_dtype
    )
    tflite = to_tflite(quantized, tmp_path / "q.tflite", quantization="int8").path
    expected = TFLiteRunner(tflite).predict(images)
    step = read_tflite(tflite).inner[-1].scale[0]
    spread = np.ptp(expected)
    assert spread > 30 * step
    np.testing.assert_allclose(ONNXRunner(export.path).predict(images), expected, atol=1.01 * step)
    if activation_dtype == "uint8":
        assert export.optimized.float_ops == {}


def test_bounds_of_fused_activations_by_hand():
    from keras_effnet.export.int8_onnx import _clipped
    from keras_effnet.quantization.params import QuantParams

    # 6 / 0.05 = 120 steps above the zero point.
    assert _clipped(QuantParams(0.05, -100), "relu6") == (-100, 20)
    assert _clipped(QuantParams(0.05, -100), "relu") == (-100, 127)
    # The range ends below 6.
    assert _clipped(QuantParams(0.02, -128), "relu6") == (-128, 127)


def test_layers_kept_in_float_stay_so(model, images, tmp_path):
    name = next(layer.name for layer in model.layers if "depthwise" in layer.name)
    config = QuantizationConfig(method="min_max", corrections=(), keep_float=(name,))
    quantized = quantize_model(model, [images], config, verbose=False)
    export = to_onnx(quantized, tmp_path / "q.onnx", quantization="int8", io_dtype="uint8")
    assert export.optimized.float_ops["Conv"] == 1
    # onnxruntime has the float convolution in a layout of its own.
    assert set(export.optimized.float_ops) == {"Conv", "Max", "ReorderInput", "ReorderOutput"}
    tflite = to_tflite(quantized, tmp_path / "q.tflite", quantization="int8").path
    np.testing.assert_allclose(
        ONNXRunner(export.path).predict(images),
        TFLiteRunner(tflite).predict(images),
        atol=ONE_STEP,
    )


# The file


def test_metadata_tell_how_to_run_the_file_without_this_package(quantized, images, tmp_path):
    labels = [f"class {number} é" for number in range(CLASSES)]
    export = to_onnx(
        quantized,
        tmp_path / "q.onnx",
        quantization="int8",
        io_dtype="uint8",
        labels=labels,
        preprocessing={"interpolation": "bicubic", "scale": 1.0, "mean": [0.0] * 3},
    )
    proto = onnx.load(export.path)
    assert (proto.producer_name, proto.graph.name) == ("keras_effnet", "keras_effnet")
    metadata = read_onnx(export.path).metadata
    assert metadata["variant"] == quantized.name
    assert metadata["quantization"] == "int8"
    assert json.loads(metadata["labels"]) == labels
    assert json.loads(metadata["preprocessing"]) == {
        "interpolation": "bicubic",
        "scale": 1.0,
        "mean": [0.0] * 3,
        "size": [SIZE, SIZE],
    }
    assert (metadata["input_scale"], metadata["input_zero_point"]) == ("1.0", "0")
    assert (metadata["output_scale"], metadata["output_zero_point"]) == ("0.00390625", "0")


def test_a_model_that_reads_pixels_says_so_by_itself(float_onnx):
    transform = json.loads(float_onnx.file.metadata["preprocessing"])
    assert transform == {
        "size": [SIZE, SIZE],
        "scale": 1.0,
        "offset": 0.0,
        "mean": [0.0] * 3,
        "std": [1.0] * 3,
    }
    assert "labels" not in float_onnx.file.metadata
    assert "input_scale" not in float_onnx.file.metadata


def test_weights_can_stand_in_a_file_of_their_own(model, images, tmp_path, monkeypatch):
    # Those of the small model are all too small.
    monkeypatch.setitem(to_onnx.__globals__, "_MIN_EXTERNAL_BYTES", 100)
    export = to_onnx(model, tmp_path / "m.onnx", external_data=True)
    assert export.external_data == tmp_path / "m.onnx.data"
    assert export.file.external == ("m.onnx.data",)
    parts = [path.stat().st_size for path in sorted(tmp_path.iterdir())]
    assert len(parts) == 2 and export.file.size == sum(parts)
    onnx.checker.check_model(str(export.path), full_check=True)
    np.testing.assert_allclose(
        ONNXRunner(export.path).predict(images),
        model.predict_on_batch(images),
        atol=FLOAT_TOLERANCE,
    )
    export.external_data.unlink()
    with pytest.raises(FileNotFoundError, match="weights in 'm.onnx.data', which is not beside"):
        ONNXRunner(export.path)


@pytest.mark.parametrize("name", ["m.onnx", "m.onnx.data"])
def test_existing_files_are_not_replaced_unasked(model, tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(FileExistsError, match=f"{name}' exists"):
        to_onnx(model, tmp_path / "m.onnx", external_data=True)
    assert (tmp_path / name).read_text() == "mine"
    to_onnx(model, tmp_path / "m.onnx", external_data=True, overwrite=True)
    assert ONNXRunner(tmp_path / "m.onnx").file.inputs[0].name == "images"


@pytest.mark.parametrize("name", ["m.onnx", "m.onnx.data"])
def test_a_read_only_file_is_not_replaced_even_if_asked(model, tmp_path, name):
    (tmp_path / name).write_text("mine")
    os.chmod(tmp_path / name, 0o444)
    with pytest.raises(PermissionError, match=f"{name}' is read-only. Make it writable"):
        to_onnx(model, tmp_path / "m.onnx", external_data=True, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"


def test_a_failed_write_leaves_no_half(model, tmp_path, monkeypatch):
    """The weights are written first; without the model they are of no use."""
    real = to_onnx.__globals__["write_whole"]

    def fail(path, *args, **kwargs):
        if path.suffix == ".onnx":
            raise OSError(28, "No space left on device", str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setitem(to_onnx.__globals__, "write_whole", fail)
    with pytest.raises(OSError, match="No space left"):
        to_onnx(model, tmp_path / "m.onnx", external_data=True)
    assert list(tmp_path.iterdir()) == []


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"quantization": "int4"}, "`quantization` must be one of.*int4"),
        ({"opset": 12}, "`opset` must be a whole number from 13 to 21. Received: opset=12"),
        ({"opset": 22}, "from 13 to 21. Received: opset=22"),
        ({"opset": "17"}, "from 13 to 21. Received: opset='17'"),
        ({"layout": "chwn"}, "`layout` must be one of.*'nchw'.*Received: layout='chwn'"),
        ({"io_dtype": "uint8"}, "io_dtype='uint8' needs quantization='int8'"),
        ({"activation_dtype": "int4"}, "`activation_dtype` must be one of.*int4"),
        ({"labels": ["one"]}, "`labels` must name the 7 classes of 'small'. Received: 1 names"),
        (
            {"quantization": "int8"},
            "needs a model that holds the ranges.*quantize_model.*the float model 'small'",
        ),
    ],
)
def test_refuses_arguments(model, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        to_onnx(model, tmp_path / "m.onnx", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_refuses_a_float_file_of_a_quantized_model(quantized, tmp_path):
    with pytest.raises(ValueError, match="exported with quantization='int8'"):
        to_onnx(quantized, tmp_path / "m.onnx")


def test_refuses_a_quantized_model_whose_ranges_are_missing(quantized, tmp_path):
    extended = keras.Model(
        quantized.inputs, keras.layers.Activation("relu", name="extra")(quantized.outputs[0])
    )
    with pytest.raises(ValueError, match="'extra' has no range"):
        to_onnx(extended, tmp_path / "m.onnx", quantization="int8")


def test_refuses_what_is_no_model(tmp_path):
    with pytest.raises(TypeError, match="must be a Keras model. Received: str"):
        to_onnx("model", tmp_path / "m.onnx")


def test_refuses_models_without_one_fixed_input(tmp_path):
    inputs = keras.Input((None, None, 3))
    free = keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(inputs))
    with pytest.raises(ValueError, match="fixed sizes.*None, None, None, 3"):
        to_onnx(free, tmp_path / "m.onnx")
    two = [keras.Input((4,)), keras.Input((4,))]
    with pytest.raises(ValueError, match="one input and one output.*2 inputs"):
        to_onnx(keras.Model(two, keras.layers.Add()(two)), tmp_path / "m.onnx")


def test_refuses_half_precision(tmp_path):
    inputs = keras.Input((4, 4, 3))
    model = keras.Model(
        inputs, keras.layers.Conv2D(2, 1, dtype="mixed_float16", name="half")(inputs)
    )
    with pytest.raises(ValueError, match="half precision.*half-precision layers half"):
        to_onnx(model, tmp_path / "m.onnx")


def test_refuses_a_missing_folder(model, tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder .*missing"):
        to_onnx(model, tmp_path / "missing" / "m.onnx")


def test_names_an_unsupported_layer(tmp_path):
    class Determinant(keras.layers.Layer):
        def call(self, x):
            return keras.ops.reshape(keras.ops.svd(x, compute_uv=False), (-1, 9))

    inputs = keras.Input((3, 3, 3))
    model = keras.Model(inputs, Determinant(name="spectrum")(inputs))
    with pytest.raises(ValueError, match=r"no operator.*Replace the layers.*spectrum.*\(Svd\)"):
        to_onnx(model, tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_names_a_layer_kept_in_float_without_an_operator(model, images, tmp_path):
    class Half(keras.layers.Layer):
        def call(self, x):
            return x * 0.5

    inputs = keras.Input((SIZE, SIZE, 3))
    x = Half(name="half")(keras.layers.Conv2D(4, 3)(inputs))
    outputs = keras.layers.Dense(2)(keras.layers.GlobalAveragePooling2D()(x))
    config = QuantizationConfig(method="min_max", corrections=(), keep_float=("half",))
    quantized = quantize_model(keras.Model(inputs, outputs), [images], config, verbose=False)
    with pytest.raises(TypeError, match="Layer 'half' of type Half is not in the quantization"):
        to_onnx(quantized, tmp_path / "m.onnx", quantization="int8")


# Verification


def test_constants_that_became_inputs_are_found(model, images, tmp_path):
    """As `tf2onnx.convert.from_function` leaves them, and Keras' own export with it."""
    import tensorflow as tf
    import tf2onnx

    signature = [tf.TensorSpec((1, SIZE, SIZE, 3), tf.float32, name="images")]
    function = tf.function(lambda images: model(images, training=False))
    proto, _ = tf2onnx.convert.from_function(function, input_signature=signature)
    with pytest.raises(RuntimeError, match="constants of the model into inputs.*inputs .*normal"):
        check_proto(proto)
    onnx.save(proto, tmp_path / "m.onnx")
    with pytest.raises(ValueError, match="one input and one output can be run.*normalization"):
        ONNXRunner(tmp_path / "m.onnx")


def edit(proto, name, change):
    """Changes a constant of a file."""
    [constant] = [each for each in proto.graph.initializer if each.name == name]
    constant.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(constant)), name))


def test_a_removed_constant_fails_verification(model, int8_onnx, tmp_path):
    proto = onnx.load(int8_onnx.path)
    name = f"{name_of(model, keras.layers.Dense)}/kernel/integers"
    [kernel] = [each for each in proto.graph.initializer if each.name == name]
    proto.graph.initializer.remove(kernel)
    with pytest.raises(ValueError, match=f"no valid ONNX model.*{name}"):
        check_proto(proto)
    onnx.save(proto, tmp_path / "m.onnx")
    with pytest.raises(ValueError, match=f"onnxruntime cannot load.*{name}"):
        ONNXRunner(tmp_path / "m.onnx")


def shift_zero_point(proto, model):
    """Lets those who read a tensor take another integer for 0 than the one who wrote it."""
    shifted = numpy_helper.from_array(np.uint8(200), "shifted")
    proto.graph.initializer.append(shifted)
    name = f"{name_of(model, keras.layers.Multiply)}/real"
    [reader] = [node for node in proto.graph.node if node.output[0] == name]
    reader.input[2] = "shifted"


def swap_channels(proto, model):
    name = f"{name_of(model, keras.layers.Conv2D)}/kernel/integers"
    edit(proto, name, lambda kernel: kernel[:, ::-1].copy())


@pytest.mark.parametrize("change", [shift_zero_point, swap_channels, None])
def test_a_changed_file_fails_verification(model, images, int8_onnx, tmp_path, change):
    proto = onnx.load(int8_onnx.path)
    if change is not None:
        change(proto, model)
    onnx.save(proto, tmp_path / "m.onnx")
    predictors = {
        "keras": model.predict_on_batch,
        "file": ONNXRunner(tmp_path / "m.onnx").predict,
    }
    _, scores = compare(predictors, [(images, None)])
    failed = agreement_warning("int8", scores) is not None
    assert failed == (change is not None), scores
