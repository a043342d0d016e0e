"""Targets: files made for one fit it, and every kind of misfit is found in any file."""

import dataclasses
import warnings

import keras
import numpy as np
import pytest
from small_model import SIZE

from keras_effnet.export import TFLiteRunner, check_file, pack, read_tflite, to_tflite
from keras_effnet.export._optional import import_tensorflow, import_tflite_schema
from keras_effnet.export.check import AT_RISK, MAPPED, NOT_MAPPED, judge
from keras_effnet.export.int8_tflite import convert_quantized
from keras_effnet.export.targets import CORAL, LARGEST_MEAN, TARGETS, get_target
from keras_effnet.export.tflite_file import read_graph
from keras_effnet.quantization import QuantizationConfig, quantize_model

PER_TENSOR = QuantizationConfig(corrections=(), method="min_max", per_channel_head=False)
PER_CHANNEL = dataclasses.replace(PER_TENSOR, per_channel_head=True)


@pytest.fixture(scope="module")
def quantized(model, images):
    return quantize_model(model, images, PER_TENSOR, verbose=False)


@pytest.fixture(scope="module")
def coral_bytes(quantized, tmp_path_factory):
    path = tmp_path_factory.mktemp("coral") / "m.tflite"
    to_tflite(quantized, path, quantization="int8", io_dtype="uint8", target=CORAL)
    return path.read_bytes()


def verdict_of(report, op):
    return next(item for item in report.operators if item.op == op)


# Files that are made for the target


def test_every_operator_of_a_coral_file_is_mapped(coral_bytes):
    report = check_file(coral_bytes, CORAL)
    assert report.fits and report.problems == () and report.advice == ()
    assert report.count(MAPPED) == len(report.operators) == report.accelerated
    assert [(part.place, part.first) for part in report.segments] == [("Edge TPU", 0)]
    assert report.fits_cache and report.parameter_bytes < len(coral_bytes)
    file = read_tflite(coral_bytes)
    assert file.inputs[0].dtype == file.outputs[0].dtype == "uint8"
    assert file.inputs[0].shape[0] == 1


def test_operators_have_the_lowest_version_of_their_semantics(coral_bytes):
    """By op_version.cc: int8 kernels, and QUANTIZE between integers."""
    assert read_tflite(coral_bytes).op_versions == {
        "CONV_2D": 3,
        "DEPTHWISE_CONV_2D": 3,
        "FULLY_CONNECTED": 4,
        "LOGISTIC": 2,
        "MUL": 2,
        "MEAN": 2,
        "ADD": 2,
        "SOFTMAX": 2,
        "QUANTIZE": 2,
    }


def test_lower_versions_compute_the_same(coral_bytes, images):
    """Against the versions that were written before: CONV_2D 5 and DEPTHWISE_CONV_2D 6."""
    schema = import_tflite_schema()
    model = schema.ModelT.InitFromPackedBuf(coral_bytes, 0)
    newer = {schema.BuiltinOperator.CONV_2D: 5, schema.BuiltinOperator.DEPTHWISE_CONV_2D: 6}
    changed = 0
    for code in model.operatorCodes:
        changed += code.builtinCode in newer
        code.version = newer.get(code.builtinCode, code.version)
    assert changed == 2
    other = pack.pack_model(model, schema)
    assert read_tflite(other).op_versions["DEPTHWISE_CONV_2D"] == 6
    np.testing.assert_array_equal(
        TFLiteRunner(coral_bytes).predict(images), TFLiteRunner(other).predict(images)
    )


def test_a_coral_file_computes_what_the_generic_one_does(quantized, coral_bytes, images):
    generic = convert_quantized(quantized, "uint8")
    np.testing.assert_array_equal(
        TFLiteRunner(coral_bytes).predict(images), TFLiteRunner(generic).predict(images)
    )


def pooling_model(size):
    inputs = keras.Input((*size, 3))
    x = keras.layers.Conv2D(4, 3, padding="same", name="conv")(inputs)
    return keras.Model(inputs, keras.layers.GlobalAveragePooling2D(name="pool")(x))


@pytest.mark.parametrize(
    ("size", "block"), [((128, 96), (1, 3)), ((128, 128), (4, 4)), ((97, 101), (97, 1))]
)
def test_a_mean_over_many_pixels_is_written_as_two(size, block):
    keras.utils.set_random_seed(0)
    model = pooling_model(size)
    images = np.random.default_rng(0).uniform(0, 255, (4, *size, 3)).astype(np.float32)
    # Shades that differ from row to row, so that a wrong mean is seen.
    images *= np.linspace(0.1, 1, size[0], dtype=np.float32)[:, None, None]
    quantized = quantize_model(model, images, PER_TENSOR, verbose=False)
    plain, coral = (convert_quantized(quantized, "int8", target) for target in ("generic", CORAL))
    risky = verdict_of(check_file(plain, CORAL), "MEAN")
    assert risky.status == AT_RISK and f"{size[0] * size[1]:,} pixels" in risky.reasons[0]
    assert "pools in two steps" in risky.advice[0]
    report = check_file(coral, CORAL)
    assert report.count(MAPPED) == len(report.operators)
    [pool] = [op for op in read_graph(coral).subgraphs[0].operators if op.name == "AVERAGE_POOL_2D"]
    found = pool.options["filterHeight"], pool.options["filterWidth"]
    assert found in (block, block[::-1]) and size[0] * size[1] <= LARGEST_MEAN * np.prod(found)
    expected, outputs = (TFLiteRunner(data).predict(images) for data in (plain, coral))
    # The rounding of the first mean averages out: it moves the result by one step at most.
    step = read_tflite(plain).outputs[0].scale[0]
    assert np.abs(expected - outputs).max() <= 1.01 * step
    assert np.abs(expected - outputs).mean() < 0.3 * step
    assert np.ptp(expected) > 20 * step


def test_hard_swish_is_written_as_operators_that_map():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((SIZE, SIZE, 3))
    x = keras.layers.Rescaling(1 / 32, offset=-4)(inputs)
    x = keras.layers.Conv2D(6, 3, name="conv")(x)
    x = keras.layers.Activation("hard_silu", name="act")(x)
    model = keras.Model(inputs, x)
    images = np.random.default_rng(0).uniform(0, 255, (8, SIZE, SIZE, 3)).astype(np.float32)
    quantized = quantize_model(model, images, PER_TENSOR, verbose=False)
    plain, coral = (convert_quantized(quantized, "int8", target) for target in ("generic", CORAL))
    assert read_tflite(plain).ops["HARD_SWISH"] == 1
    refused = verdict_of(check_file(plain, CORAL), "HARD_SWISH")
    assert refused.status == NOT_MAPPED and "--target coral" in refused.advice[0]
    assert "HARD_SWISH" not in read_tflite(coral).ops
    assert check_file(coral, CORAL).fits
    expected, outputs = (TFLiteRunner(data).predict(images) for data in (plain, coral))
    step = read_tflite(plain).outputs[0].scale[0]
    # The gate is rounded to 1/255 of a product of up to 127 steps.
    assert np.abs(expected - outputs).max() <= 2 * step
    assert np.abs(expected - outputs).mean() < 0.5 * step
    assert expected.min() < -3 * step and expected.max() > 50 * step


def test_a_per_channel_head_is_refused_with_the_way_out(model, images, tmp_path):
    quantized = quantize_model(model, images, PER_CHANNEL, verbose=False)
    path = tmp_path / "m.tflite"
    with pytest.raises(ValueError, match="'coral'.*FULLY_CONNECTED.*12.*per_channel_head=False"):
        to_tflite(quantized, path, quantization="int8", io_dtype="uint8", target=CORAL)
    assert list(tmp_path.iterdir()) == []


def test_a_layer_kept_in_float_is_refused(model, images, tmp_path):
    name = next(x.name for x in model.layers if isinstance(x, keras.layers.DepthwiseConv2D))
    config = dataclasses.replace(PER_TENSOR, keep_float=(name,))
    quantized = quantize_model(model, images, config, verbose=False)
    with pytest.raises(ValueError, match="not mapped: .*DEQUANTIZE.*no --keep-float|float32"):
        to_tflite(
            quantized, tmp_path / "m.tflite", quantization="int8", io_dtype="int8", target=CORAL
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "corral"}, "one of .'generic', 'android', 'coral'..*'corral'"),
        ({"target": CORAL}, "needs quantization='int8'.*quantization='float32'"),
        (
            {"target": CORAL, "quantization": "int8", "io_dtype": "float32"},
            "io_dtype out of .*'float32'",
        ),
    ],
)
def test_options_that_do_not_fit_the_target(model, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        to_tflite(model, tmp_path / "m.tflite", **options)


# Files of others


def test_the_plain_converters_file(int8_bytes):
    report = check_file(int8_bytes, CORAL)
    # Its kernel of the dense layer has a scale for each unit, under a version that knew none.
    dense = verdict_of(report, "FULLY_CONNECTED")
    assert dense.status == AT_RISK and "a scale for each unit" in dense.reasons[0]
    assert report.fits and report.count(NOT_MAPPED) == 0


def test_a_float_file(float_bytes):
    report = check_file(float_bytes, CORAL)
    assert not report.fits and report.count(MAPPED) == 0 and report.accelerated == 0
    assert len(report.problems) == 2 and "is float32: export with uint8" in report.problems[0]
    assert any("--quantization int8" in text for text in report.advice)
    assert [part.place for part in report.segments] == ["CPU"]
    android = check_file(float_bytes, "android")
    assert android.fits and android.count(NOT_MAPPED) == 0
    assert check_file(float_bytes, "generic").fits


def converted(function, shape, int8=True):
    """A function as an int8 file, by the plain converter."""
    tf = import_tensorflow()
    spec = tf.TensorSpec(shape, tf.float32, name="images")
    concrete = tf.function(function).get_concrete_function(spec)
    converter = tf.lite.TFLiteConverter.from_concrete_functions([concrete])
    if int8:
        samples = np.random.default_rng(0).uniform(0, 1, (4, *shape[1:])).astype(np.float32)
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.representative_dataset = lambda: ([sample[None]] for sample in samples)
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
        converter.inference_input_type = converter.inference_output_type = tf.int8
    with warnings.catch_warnings():
        # Said of every int8 conversion that calibrates: the ranges come afterwards.
        warnings.filterwarnings("ignore", message="Statistics for quantized inputs")
        return converter.convert()


@pytest.fixture(scope="module")
def shape_chain():
    """As tfmot's models convert: the batch is open, and a reshape asks for it."""
    tf = import_tensorflow()
    kernel = tf.constant(np.random.default_rng(0).normal(size=(3, 3, 3, 4)), tf.float32)

    def function(images):
        x = tf.nn.conv2d(images, kernel, 1, "SAME")
        gate = tf.reduce_mean(x, (1, 2))
        gate = tf.sigmoid(tf.reshape(gate, (tf.shape(gate)[0], 1, 1, 4)))
        return x * gate

    return converted(function, (None, 8, 8, 3))


def test_shape_chains_and_an_open_batch(shape_chain):
    report = check_file(shape_chain, CORAL)
    assert not report.fits
    assert any("[-1, 8, 8, 3]: export with a batch of 1" in text for text in report.problems)
    failed = {item.op for item in report.operators if item.status == NOT_MAPPED}
    assert {"SHAPE", "STRIDED_SLICE", "PACK"} <= failed
    assert any("keepdims=True" in text for text in report.advice)


def test_the_graph_splits_where_an_operator_is_missing():
    tf = import_tensorflow()
    kernel = tf.constant(np.random.default_rng(0).normal(size=(3, 3, 3, 3)), tf.float32)

    def function(images):
        x = tf.nn.conv2d(images, kernel, 1, "SAME")
        x = tf.nn.elu(x)
        return tf.nn.conv2d(x, kernel, 1, "SAME")

    report = check_file(converted(function, (1, 8, 8, 3)), CORAL)
    assert [part.place for part in report.segments] == ["Edge TPU", "CPU", "Edge TPU"]
    assert report.accelerated == 1  # What stands behind ELU is not compiled either.
    assert verdict_of(report, "ELU").reasons == ("Edge TPU has no ELU",)


def test_a_custom_operator_fits_no_target(float_bytes):
    schema = import_tflite_schema()
    model = schema.ModelT.InitFromPackedBuf(float_bytes, 0)
    for code in model.operatorCodes:
        if code.builtinCode == schema.BuiltinOperator.SOFTMAX:
            code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.CUSTOM
            code.customCode = b"FlexSoftmax"
    data = pack.pack_model(model, schema)
    for target in TARGETS:
        report = check_file(data, target)
        assert not report.fits
        custom = verdict_of(report, "FlexSoftmax")
        assert custom.status == NOT_MAPPED and "no operator of TFLite" in custom.reasons[0]


# Single rules, on hand-made changes of a file that fits


def changed(data, change):
    graph = read_graph(data)
    main = graph.subgraphs[0]
    return dataclasses.replace(graph, subgraphs=(change(main),))


def with_operator(main, op, **changes):
    operators = tuple(
        dataclasses.replace(item, **changes) if item.name == op else item for item in main.operators
    )
    return dataclasses.replace(main, operators=operators)


@pytest.mark.parametrize(
    ("op", "changes", "reason"),
    [
        ("CONV_2D", {"version": 6}, "version 6, but 5"),
        ("DEPTHWISE_CONV_2D", {"version": 7}, "version 7, but 6"),
        ("QUANTIZE", {"version": 3}, "version 3, but 2"),
        (
            "CONV_2D",
            {"options": {"dilationHFactor": 2, "dilationWFactor": 1}},
            "differs between the axes",
        ),
        (
            "DEPTHWISE_CONV_2D",
            {"options": {"dilationHFactor": 2, "dilationWFactor": 2}},
            "kernel is dilated",
        ),
    ],
)
def test_limits_of_single_operators(coral_bytes, op, changes, reason):
    graph = changed(coral_bytes, lambda main: with_operator(main, op, **changes))
    report = judge(graph, get_target(CORAL))
    assert not report.fits
    assert reason in verdict_of(report, op).reasons[0]


def test_more_than_the_three_inner_dimensions(coral_bytes):
    def change(main):
        tensors = tuple(
            tensor
            if tensor.constant or len(tensor.shape) != 4
            else dataclasses.replace(tensor, shape=(2, *tensor.shape[1:]))
            for tensor in main.tensors
        )
        return dataclasses.replace(main, tensors=tensors)

    report = judge(changed(coral_bytes, change), get_target(CORAL))
    assert not report.fits
    assert any("batch of 1" in text for text in report.problems)
    assert "more than 3 dimensions" in verdict_of(report, "CONV_2D").reasons[0]


def test_parameters_beyond_the_cache(coral_bytes):
    graph = dataclasses.replace(read_graph(coral_bytes), parameter_bytes=9_000_000)
    report = judge(graph, get_target(CORAL))
    assert report.fits and report.fits_cache is False


def test_the_report_as_json_counts_all_operators(float_bytes):
    report = check_file(float_bytes, CORAL)
    written = report.as_json()
    assert sum(row["count"] for row in written["histogram"]) == len(report.operators)
    assert written["not_mapped"] == len(written["operators"])
    assert written["remarks"] and all(remark["source"] for remark in written["remarks"])


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_every_row_has_a_source(target):
    assert all(rule.source for rule in target.ops.values())
    assert all(remark.source for remark in target.remarks)
    assert [rule.op for rule in target.ops.values()] == list(target.ops)


def test_the_limits_of_the_edge_tpu_are_those_of_tensorflow_2_5():
    """Of the operators that EfficientNet needs, by hand."""
    known = {
        "CONV_2D": 5, "DEPTHWISE_CONV_2D": 6, "FULLY_CONNECTED": 9, "ADD": 3, "MUL": 4, "SUB": 5,
        "MEAN": 3, "LOGISTIC": 3, "SOFTMAX": 3, "QUANTIZE": 2, "PAD": 3, "RELU": 3, "RELU6": 3,
        "AVERAGE_POOL_2D": 3, "RESHAPE": 1,
    }  # fmt: skip
    rows = TARGETS[CORAL].ops
    assert {op: rows[op].version for op in known} == known
    assert "HARD_SWISH" not in rows and "DEQUANTIZE" not in rows
