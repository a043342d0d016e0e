"""A Keras model as an ONNX file: float, or integer as quantize and dequantize pairs (QDQ)."""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._console import loggers_muted, native_logs_muted
from ._optional import import_onnx, import_tensorflow, import_tf2onnx
from .files import check_target, write_whole
from .onnx_file import LAYOUT_KEY, LAYOUTS, ONNXFile, OptimizedGraph, optimized, read_onnx
from .source import check_convertible, check_ends, listing
from .to_tflite import reads_pixels

if TYPE_CHECKING:
    import keras

QUANTIZATIONS = ("float32", "int8")
IO_DTYPES = ("float32", "uint8", "int8")
ACTIVATION_DTYPES = ("uint8", "int8")
# Per-channel scales came with opset 13; 21 is the highest that was run.
MIN_OPSET, MAX_OPSET = 13, 21
DEFAULT_OPSET = 17
# With opset 18, the last one that tf2onnx knows, its pooling becomes ReduceMean between stray
# Transposes; what lies above is left to onnx's own version converter.
_TF2ONNX_OPSET = 17
# Those of its optimizer's passes that convolutional networks need.
_TF2ONNX_PASSES = (
    "TransposeOptimizer",
    "ConstFoldOptimizer",
    "MergeDuplicatedNodesOptimizer",
    "ReshapeOptimizer",
    "GlobalPoolOptimizer",
    "IdentityOptimizer",
    "BackToBackOptimizer",
)
INPUT_NAME, OUTPUT_NAME = "images", "outputs"
BATCH = "batch"
PRODUCER = "keras_effnet"
# Protobuf messages end at 2 GiB.
_MAX_BYTES = 2**31 - 1
# Below this the place of a tensor's data takes more than the data.
_MIN_EXTERNAL_BYTES = 1024
# Offsets of memory-mapped data.
_EXTERNAL_ALIGNMENT = 4096


@dataclass(frozen=True)
class ONNXExport:
    """What `to_onnx` wrote.

    Args:
        path: The file.
        quantization: As asked for.
        io_dtype: Type of input and output.
        layout: Order of the axes of the input.
        file: Size, inputs, outputs, operators and metadata, read back from the file.
        optimized: What onnxruntime runs on this processor.
        external_data: The file beside it that holds the weights, or None.
    """

    path: Path
    quantization: str
    io_dtype: str
    layout: str
    file: ONNXFile
    optimized: OptimizedGraph
    external_data: Path | None = None


def to_onnx(
    model: keras.Model,
    path: str | os.PathLike,
    *,
    quantization: str = "float32",
    opset: int = DEFAULT_OPSET,
    layout: str = "nhwc",
    dynamic_batch: bool = False,
    io_dtype: str = "float32",
    activation_dtype: str = "uint8",
    external_data: bool = False,
    labels: Sequence[str] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> ONNXExport:
    """Writes a Keras model as an ONNX file.

    The file has the input `images` and the output `outputs`, standard operators alone, and
    metadata: `variant` (the model's name), `layout`, `quantization`, `preprocessing` and, where
    they are given, `labels`; and where input or output are integers, `input_scale`,
    `input_zero_point`, `output_scale` and `output_zero_point`. All are JSON, apart from plain
    words. It has passed onnx's full check and was loaded by onnxruntime before it is written,
    whole or not at all.

    Args:
        model: A Functional or Sequential model with one input and one output, all sizes but the
            batch known, computing in float32; of this package, of `keras.applications` or any
            other; or one from `keras_effnet.quantization.quantize_model`. It is not changed.
        path: File to write, usually `*.onnx`.
        quantization: `"float32"`, or `"int8"` for a model from `quantize_model`, which is written
            with its own integers: 8-bit kernels with a scale per channel and int32 biases.
        opset: Version of the operators, 13 to 21.
        layout: Order of the axes of the input that the file is to be given: `"nhwc"`, as Keras
            and cameras have it, or `"nchw"`. Inside, ONNX is NCHW.
        dynamic_batch: Whether the batch size is left open; else it is 1.
        io_dtype: Type of input and output: `"float32"`, or for `"int8"` also `"uint8"` (a
            camera's pixels as they are, if the model reads 0..255) or `"int8"`.
        activation_dtype: Of `"int8"` files: the type of the kernels and of the tensors between.
            onnxruntime gives the outputs of the TFLite file for `"uint8"` on every processor.
            `"int8"` is for ARM: on x86 most of its graph is computed in float, and wrongly where
            the processor has no VNNI (Intel before 2019, AMD before 2022), whose sums of int8
            kernels saturate at 16 bits.
        external_data: Whether the weights go into a file of their own, `path` with `.data` behind
            it; models of 2 GiB and more need it.
        labels: Names of the classes, for the metadata.
        preprocessing: What turns a photograph into the file's input, as JSON values, for the
            metadata: `scale`, `offset`, `mean` and `std`, for `(x * scale + offset - mean) / std`
            of RGB pixels in 0..255, and what else is to be told, such as `interpolation`. The
            `size` (height, width) is added. By default that of a model that reads pixels.
        overwrite: Whether existing files may be replaced.

    Returns:
        What was written.

    Raises:
        ImportError: If onnx, onnxruntime, or, for float files, TensorFlow or tf2onnx are not
            installed.
        OSError: If a file exists and `overwrite` is False, is read-only, cannot be written, or
            the disk is full.
        RuntimeError: If a float model is to be converted while Keras runs on another backend than
            TensorFlow, or the converter left inputs beside the images.
        TypeError: If `model` is no Keras model, or a layer has no integer operator here.
        ValueError: If the arguments do not fit each other, the model has unknown sizes, several
            inputs or outputs or computes in half precision, ONNX has no operator for a layer, or
            the number of `labels` is not that of the classes.
    """
    check_options(quantization, io_dtype, opset, layout, activation_dtype)
    _check_model(model, quantization)
    _check_labels(labels, model)
    path = check_target(path, overwrite=overwrite)
    data_path = path.with_name(f"{path.name}.data") if external_data else None
    if data_path is not None:
        check_target(data_path, overwrite=overwrite)
    for target in filter(None, (path, data_path)):
        _check_not_read_only(target)
    onnx = import_onnx()
    metadata = _metadata(model, quantization, layout, labels, preprocessing)
    if quantization == "int8":
        # Loads Keras, which importing this room does not.
        from .int8_onnx import convert_quantized

        graph, ends = convert_quantized(
            model,
            layout=layout,
            io_dtype=io_dtype,
            activation_dtype=activation_dtype,
            dynamic_batch=dynamic_batch,
        )
        proto = _model_proto(onnx, graph, opset)
        metadata |= ends
    else:
        proto = _convert(onnx, model, opset, layout, dynamic_batch)
    onnx.helper.set_model_props(proto, metadata)
    data = check_proto(proto, external_data)
    run = optimized(data)
    if data_path is not None:
        # Written first: a model without its data is of no use, and so is not left behind.
        weights = _externalize(proto, data_path.name)
        data = proto.SerializeToString()
        write_whole(data_path, weights, overwrite=overwrite)
    try:
        path = write_whole(path, data, overwrite=overwrite)
    except BaseException:
        if data_path is not None:
            data_path.unlink(missing_ok=True)
        raise
    return ONNXExport(
        path=path,
        quantization=quantization,
        io_dtype=io_dtype,
        layout=layout,
        file=read_onnx(path),
        optimized=run,
        external_data=data_path,
    )


def check_options(
    quantization: str,
    io_dtype: str,
    opset: int = DEFAULT_OPSET,
    layout: str = "nhwc",
    activation_dtype: str = "uint8",
) -> None:
    """Raises ValueError unless all are known and fit each other."""
    for name, value, allowed in (
        ("quantization", quantization, QUANTIZATIONS),
        ("io_dtype", io_dtype, IO_DTYPES),
        ("layout", layout, LAYOUTS),
        ("activation_dtype", activation_dtype, ACTIVATION_DTYPES),
    ):
        if value not in allowed:
            raise ValueError(f"`{name}` must be one of {allowed}. Received: {name}={value!r}")
    if not isinstance(opset, int) or not MIN_OPSET <= opset <= MAX_OPSET:
        raise ValueError(
            f"`opset` must be a whole number from {MIN_OPSET} to {MAX_OPSET}. "
            f"Received: opset={opset!r}"
        )
    if io_dtype != "float32" and quantization != "int8":
        raise ValueError(
            f"io_dtype={io_dtype!r} needs quantization='int8'; other files read and write "
            f"float32. Received: quantization={quantization!r}"
        )


def check_proto(proto: Any, external_data: bool = False) -> bytes:
    """Checks what the format promises of a model that is to be written.

    Args:
        proto: An `onnx.ModelProto` that holds its data.
        external_data: Whether its data will be written beside it.

    Returns:
        The model as bytes.

    Raises:
        RuntimeError: If it has other inputs than the images: constants that the converter took
            for inputs, which onnxruntime then asks for.
        ValueError: If it uses unknown operators, is not valid or too large.
    """
    onnx = import_onnx()
    _check_operators(onnx, proto)
    constants = {initializer.name for initializer in proto.graph.initializer}
    stray = [
        value.name
        for value in proto.graph.input
        if value.name != INPUT_NAME or value.name in constants
    ]
    if stray:
        raise RuntimeError(
            "The converter made constants of the model into inputs of the graph, so that nothing "
            "could run the file. Received: inputs " + listing(stray)
        )
    if proto.ByteSize() > _MAX_BYTES:
        advice = "" if external_data else " Pass external_data=True (--external-data)."
        raise ValueError(f"The model has {proto.ByteSize():,} bytes; 2 GiB are allowed.{advice}")
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"The graph is no valid ONNX model: {reason}") from error
    return proto.SerializeToString()


def _check_operators(onnx: Any, proto: Any) -> None:
    versions = {opset.domain: opset.version for opset in proto.opset_import}
    unknown = []
    for node in proto.graph.node:
        version = versions.get(node.domain)
        if version is None or not onnx.defs.has(node.op_type, version, node.domain):
            unknown.append(f"{node.name} ({node.op_type})")
    if unknown:
        raise ValueError(
            "ONNX has no operator for some of the model's operations. Replace the layers that use "
            f"them by others of the same function. Received: {listing(unknown)}"
        )


def _check_model(model: Any, quantization: str) -> None:
    import keras

    from keras_effnet.quantization import is_quantized

    if not isinstance(model, keras.Model):
        raise TypeError(f"`model` must be a Keras model. Received: {type(model).__name__}")
    quantized = is_quantized(model)
    if quantized and quantization != "int8":
        raise ValueError(
            "A quantized model is exported with quantization='int8'; for a float file export the "
            f"float model it was made of. Received: quantization={quantization!r}"
        )
    if quantization == "int8" and not quantized:
        raise ValueError(
            "quantization='int8' needs a model that holds the ranges of its tensors. Quantize it "
            "first: keras_effnet.quantization.quantize_model(model, calibration_images). "
            f"Received: the float model {model.name!r}"
        )
    check_ends(model)
    if quantization == "float32":
        check_convertible(model, "ONNX")


def _check_labels(labels: Sequence[str] | None, model: keras.Model) -> None:
    if isinstance(labels, str):
        raise TypeError(f"`labels` must be a sequence of names. Received: {labels!r}")
    if labels is not None and len(labels) != model.outputs[0].shape[-1]:
        raise ValueError(
            f"`labels` must name the {model.outputs[0].shape[-1]} classes of {model.name!r}. "
            f"Received: {len(labels)} names"
        )


def _check_not_read_only(path: Path) -> None:
    # Renaming a file over a read-only one succeeds; whoever protected it did not want that.
    writable = stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH
    if path.exists() and not path.stat().st_mode & writable:
        raise PermissionError(
            f"{str(path)!r} is read-only. Make it writable, or choose another name."
        )


def _metadata(
    model: keras.Model,
    quantization: str,
    layout: str,
    labels: Sequence[str] | None,
    preprocessing: Mapping[str, Any] | None,
) -> dict[str, str]:
    transform = dict(preprocessing or {})
    if len(model.inputs[0].shape) == 4:
        transform["size"] = list(model.inputs[0].shape[1:3])
    if preprocessing is None and reads_pixels(model):
        transform |= {"scale": 1.0, "offset": 0.0, "mean": [0.0] * 3, "std": [1.0] * 3}
    metadata = {
        "variant": model.name,
        "quantization": quantization,
        LAYOUT_KEY: layout,
        "preprocessing": json.dumps(transform),
    }
    if labels is not None:
        metadata["labels"] = json.dumps(list(labels), ensure_ascii=False)
    return metadata


def _model_proto(onnx: Any, graph: Any, opset: int) -> Any:
    opsets = [onnx.helper.make_opsetid("", opset)]
    return onnx.helper.make_model(
        graph,
        opset_imports=opsets,
        ir_version=onnx.helper.find_min_ir_version_for(opsets),
        producer_name=PRODUCER,
        producer_version=_producer_version(),
    )


def _producer_version() -> str:
    try:
        return importlib.metadata.version("keras-effnet")
    except importlib.metadata.PackageNotFoundError:  # A checkout that is not installed.
        return ""


# Float models


def _convert(onnx: Any, model: keras.Model, opset: int, layout: str, dynamic_batch: bool) -> Any:
    """Converts a float model by tf2onnx.

    Neither `tf2onnx.convert.from_function` nor `model.export(format="onnx")` will do: constants
    that TensorFlow captured, such as those of `Normalization`, become required inputs there.
    """
    tf = import_tensorflow()
    with loggers_muted("tensorflow", "tf2onnx"), native_logs_muted():
        frozen = _frozen_graph(tf, model, None if dynamic_batch else 1)
        # A front of NCHW is converted for both layouts: the arithmetic before the first
        # convolution is faster there, and tf2onnx would have it in NHWC.
        images = len(model.inputs[0].shape) == 4
        source, target = frozen.inputs[0].name, frozen.outputs[0].name
        definition = frozen.graph.as_graph_def()
        del frozen  # It holds the weights once more.
        proto = _by_tf2onnx(
            tf,
            definition,
            input_names=[source],
            output_names=[target],
            opset=min(opset, _TF2ONNX_OPSET),
            inputs_as_nchw=[source] if images else None,
        )
    gc.collect()  # The converter's graph refers to itself and holds the weights several times.
    graph = proto.graph
    _rename(graph, {source: INPUT_NAME, target: OUTPUT_NAME})
    _set_batch(graph, BATCH if dynamic_batch else 1)
    if images and layout == "nhwc":
        _read_nhwc(onnx, graph, model.inputs[0].shape)
    _check_operators(onnx, proto)
    proto = _model_proto(onnx, graph, min(opset, _TF2ONNX_OPSET))
    remove_round_trips(onnx, proto)
    if opset > _TF2ONNX_OPSET:
        graph = onnx.version_converter.convert_version(proto, opset).graph
        proto = _model_proto(onnx, graph, opset)
    return proto


def _by_tf2onnx(
    tf: Any, definition: Any, input_names: list[str], output_names: list[str], **options: Any
) -> Any:
    """What `tf2onnx.convert.from_graph_def` does, in less memory and time.

    That one copies the whole graph before each pass of its optimizer, in case it fails; and each
    pass keeps all weights once more until the last one is done.
    """
    import_tf2onnx()
    from tf2onnx import optimizer, tf_loader, tfonnx

    with tf.Graph().as_default():
        definition = tf_loader.tf_optimize(input_names, output_names, definition)
    with tf.Graph().as_default() as tf_graph:
        tf.import_graph_def(definition, name="")
        graph = tfonnx.process_tf_graph(
            tf_graph,
            # What it cannot convert is found, and named, afterwards.
            continue_on_error=True,
            input_names=input_names,
            output_names=output_names,
            **options,
        )
        passes = {name: getattr(optimizer, name) for name in _TF2ONNX_PASSES}
        graph = optimizer.optimize_graph(graph, catch_errors=False, optimizers=passes)
        return graph.make_model(PRODUCER)


def _frozen_graph(tf: Any, model: keras.Model, batch: int | None) -> Any:
    """The inference graph with everything constant but the images."""
    from tensorflow.python.framework.convert_to_constants import (
        convert_variables_to_constants_v2,
    )

    spec = tf.TensorSpec((batch, *model.inputs[0].shape[1:]), tf.float32, name=INPUT_NAME)
    serve = tf.function(lambda images: model(images, training=False), input_signature=[spec])
    return convert_variables_to_constants_v2(serve.get_concrete_function())


def _rename(graph: Any, names: dict[str, str]) -> None:
    """Renames tensors; a name that is taken inside the graph gets an underscore."""
    taken = {output for node in graph.node for output in node.output}
    names = names | {new: f"{new}_" for new in names.values() if new in taken - set(names)}
    for node in graph.node:
        for tensors in (node.input, node.output):
            tensors[:] = [names.get(tensor, tensor) for tensor in tensors]
    for value in (*graph.input, *graph.output, *graph.value_info):
        value.name = names.get(value.name, value.name)


def _set_batch(graph: Any, batch: int | str) -> None:
    for value in (*graph.input, *graph.output):
        first = value.type.tensor_type.shape.dim[0]
        if isinstance(batch, int):
            first.dim_value = batch
        else:
            first.dim_param = batch


def _read_nhwc(onnx: Any, graph: Any, shape: tuple[int, ...]) -> None:
    """Puts a Transpose between an input of NHWC and a graph that reads NCHW."""
    changed = f"{INPUT_NAME}_nchw"
    readers = [node for node in graph.node if INPUT_NAME in node.input]
    direct = [node for node in readers if _is_return(node)]
    for node in readers:
        node.input[:] = [changed if name == INPUT_NAME else name for name in node.input]
    for node in direct:  # What reads NHWC anyhow needs no detour.
        node.input[:] = [INPUT_NAME]
        _bypass(graph, node)
    if len(direct) < len(readers):
        transpose = onnx.helper.make_node(
            "Transpose", [INPUT_NAME], [changed], name=changed, perm=(0, 3, 1, 2)
        )
        graph.node.insert(0, transpose)
    for axis, size in enumerate(shape[1:], start=1):
        graph.input[0].type.tensor_type.shape.dim[axis].dim_value = size


def _is_return(node: Any) -> bool:
    perm = [list(attribute.ints) for attribute in node.attribute if attribute.name == "perm"]
    return node.op_type == "Transpose" and perm == [[0, 2, 3, 1]]


def _bypass(graph: Any, node: Any) -> None:
    [source], [target] = node.input, node.output
    for other in graph.node:
        other.input[:] = [source if name == target else name for name in other.input]
    graph.node.remove(node)


def remove_round_trips(onnx: Any, proto: Any) -> Any:
    """Removes chains of Reshape and Transpose that end in the layout that they began with.

    The model itself is changed, and returned.

    Around a squeeze-and-excite tf2onnx goes from NCHW to NHWC and back by one or two of them, and
    which ones depends on the order of Python's sets, hence on the hash seed of the process.
    """
    graph = proto.graph
    values = onnx.shape_inference.infer_shapes(proto).graph
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim][1:]
        for value in (*values.input, *values.value_info, *values.output)
    }
    # Of a tensor: those before it that hold the same values in the same order, first one first.
    origins: dict[str, list[str]] = {}
    same: dict[str, str] = {}  # Of a tensor: the first of them with its shape too.
    for node in graph.node:
        node.input[:] = [same.get(name, name) for name in node.input]
        if node.op_type not in ("Reshape", "Transpose"):
            continue
        source, target = node.input[0], node.output[0]
        before, after = shapes.get(source), shapes.get(target)
        if not _keeps_order(before, after):
            continue
        origins[target] = [*origins.get(source, []), source]
        equal = [name for name in origins[target] if shapes[name] == after]
        if equal:
            same[target] = equal[0]
    _remove_unused(graph)
    return proto


def _keeps_order(before: list[int] | None, after: list[int] | None) -> bool:
    """Whether tensors of these shapes, without their first dimension, differ in 1s alone.

    At most one dimension may be longer: a Transpose could swap two that are equal.
    """
    if not before or not after or 0 in before or 0 in after:  # 0 is an unknown size.
        return False
    long = [size for size in before if size > 1]
    return long == [size for size in after if size > 1] and len(long) <= 1


def _remove_unused(graph: Any) -> None:
    """Removes nodes, constants and shapes that nothing reads."""
    used = {value.name for value in graph.output}
    for node in reversed(list(graph.node)):
        if used.isdisjoint(node.output):
            graph.node.remove(node)
        else:
            used.update(node.input)
    for values in (graph.initializer, graph.value_info):
        for value in reversed(list(values)):
            if value.name not in used:
                values.remove(value)


# External data


def _externalize(proto: Any, location: str) -> bytes:
    """Takes the large constants out of a model and returns them as the content of a file."""
    chunks: list[bytes] = []
    offset = 0
    for tensor in proto.graph.initializer:
        data = tensor.raw_data
        if len(data) < _MIN_EXTERNAL_BYTES:
            continue
        padding = -offset % _EXTERNAL_ALIGNMENT
        chunks += [bytes(padding), data]
        offset += padding
        del tensor.external_data[:]
        for key, value in (("location", location), ("offset", offset), ("length", len(data))):
            entry = tensor.external_data.add()
            entry.key, entry.value = key, str(value)
        tensor.data_location = tensor.EXTERNAL
        tensor.ClearField("raw_data")
        offset += len(data)
    return b"".join(chunks)
