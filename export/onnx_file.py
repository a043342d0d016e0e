"""What stands in an ONNX file, and what onnxruntime makes of it."""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ._console import native_logs_muted
from ._optional import import_onnx, import_onnxruntime
from .tflite_file import TensorInfo

# Keys of the metadata that every file of this package has.
SCALE_KEY, ZERO_POINT_KEY = "{end}_scale", "{end}_zero_point"
LAYOUT_KEY = "layout"
LAYOUTS = ("nhwc", "nchw")

_CONVERSIONS = ("QuantizeLinear", "DequantizeLinear")
# Operators of onnxruntime whose output is integer although their name does not begin like QLinear.
_INTEGER_OUTPUT = ("QGemm", "QuantizeLinear", "ConvInteger", "MatMulInteger", "Shape", "Size")


@dataclass(frozen=True)
class ONNXFile:
    """The content of an ONNX file, without the values of its tensors.

    Args:
        size: In bytes, external data included.
        opset: Version of the standard operators.
        ir_version: Version of the format.
        inputs: Of the graph, initializers left out; -1 is an open size. Integer inputs have the
            scale and zero point that the file's metadata tell.
        outputs: Of the graph, likewise.
        ops: How often each operator occurs, most frequent first.
        metadata: The texts that the file carries.
        external: Names of the files beside it that hold its data.
    """

    size: int
    opset: int
    ir_version: int
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    ops: dict[str, int]
    metadata: dict[str, str]
    external: tuple[str, ...] = ()


@dataclass(frozen=True)
class OptimizedGraph:
    """What onnxruntime runs: the graph after its own optimization for processors.

    Args:
        ops: How often each operator occurs, most frequent first.
        float_ops: Those of them that compute on floats, conversions left out.
        conversions: Number of QuantizeLinear and DequantizeLinear nodes.
    """

    ops: dict[str, int]
    float_ops: dict[str, int]
    conversions: int

    @property
    def float_nodes(self) -> int:
        """How many nodes compute on floats."""
        return sum(self.float_ops.values())


def read_onnx(source: str | os.PathLike | bytes) -> ONNXFile:
    """Reads an ONNX file.

    Args:
        source: Path, or the bytes of the file.

    Returns:
        Its content.

    Raises:
        FileNotFoundError: If there is no such file, or external data are missing beside it.
        ImportError: If onnx is not installed.
        ValueError: If it is no ONNX file, or a damaged one.
    """
    size, model = _load(source)
    external = sorted(_external_files(model))
    if not isinstance(source, bytes):
        for name in external:
            path = Path(source).parent / name
            if not path.is_file():
                raise FileNotFoundError(
                    f"{str(source)!r} keeps its weights in {name!r}, which is not beside it."
                )
            size += path.stat().st_size
    metadata = {item.key: item.value for item in model.metadata_props}
    constants = {initializer.name for initializer in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in constants]
    versions = {opset.domain: opset.version for opset in model.opset_import}
    return ONNXFile(
        size=size,
        opset=versions.get("", versions.get("ai.onnx", 0)),
        ir_version=model.ir_version,
        inputs=tuple(_tensor(value, metadata, "input") for value in inputs),
        outputs=tuple(_tensor(value, metadata, "output") for value in model.graph.output),
        ops=_counts(model.graph.node),
        metadata=metadata,
        external=tuple(external),
    )


def optimized(source: str | os.PathLike | bytes) -> OptimizedGraph:
    """Lets onnxruntime optimize a file, with its own default settings, and looks at the result.

    Args:
        source: Path, or the bytes of the file.

    Returns:
        What onnxruntime runs on this processor; on another one it may choose other kernels.

    Raises:
        ImportError: If onnx or onnxruntime is not installed.
        ValueError: If onnxruntime cannot load the file.
    """
    onnx = import_onnx()
    with tempfile.TemporaryDirectory(prefix="keras-effnet-") as folder:
        path = os.path.join(folder, "optimized.onnx")
        open_session(source, optimized_path=path)
        # The weights, which stand beside it if they are large, are of no interest here.
        model = onnx.load(path, load_external_data=False)
    graph = model.graph
    floats = {value.name for value in graph.input if _is_float(value.type.tensor_type.elem_type)}
    floats |= {value.name for value in graph.initializer if _is_float(value.data_type)}
    kept = Counter()
    for node in graph.node:
        if _gives_floats(node, floats):
            floats |= set(node.output)
            if node.op_type not in _CONVERSIONS:
                kept[node.op_type] += 1
    ops = _counts(graph.node)
    return OptimizedGraph(
        ops=ops,
        float_ops=dict(kept.most_common()),
        conversions=sum(ops.get(name, 0) for name in _CONVERSIONS),
    )


def open_session(
    source: str | os.PathLike | bytes,
    *,
    threads: int | None = None,
    optimized_path: str | None = None,
    profile_prefix: str | None = None,
) -> Any:
    """Loads a file into an `onnxruntime.InferenceSession` on the processor.

    Args:
        source: Path, or the bytes of the file.
        threads: Number of threads, or None for onnxruntime's own choice.
        optimized_path: Where onnxruntime shall write the graph that it runs, or None.
        profile_prefix: Beginning of the name of the file into which onnxruntime shall write the
            time that each operator takes, or None.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If onnxruntime is not installed.
        ValueError: If onnxruntime cannot load it.
    """
    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    # Errors arrive as exceptions; of warnings there is one for each run that writes the graph.
    options.log_severity_level = 3
    # Else its threads go on spinning between two runs, and take the cores from whoever is next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if profile_prefix is not None:
        options.enable_profiling = True
        options.profile_file_prefix = profile_prefix
    if threads is not None:
        options.intra_op_num_threads = threads
    if optimized_path is not None:
        options.optimized_model_filepath = optimized_path
    if not isinstance(source, bytes) and not Path(source).is_file():
        raise FileNotFoundError(f"There is no file {str(source)!r}.")
    model = source if isinstance(source, bytes) else os.fspath(source)
    try:
        with native_logs_muted():
            return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # Its classes are not part of its interface.
        raise ValueError(f"onnxruntime cannot load {_describe(source)}: {error}") from error


def quantization_metadata(end: str, scale: float, zero_point: int) -> dict[str, str]:
    """The metadata that tell what the integers of an input or output stand for.

    Args:
        end: "input" or "output".
        scale: Real size of one step.
        zero_point: The integer that stands for 0, in the type of the input or output.
    """
    return {
        SCALE_KEY.format(end=end): json.dumps(scale),
        ZERO_POINT_KEY.format(end=end): json.dumps(zero_point),
    }


def _load(source: str | os.PathLike | bytes) -> tuple[int, Any]:
    onnx = import_onnx()
    if isinstance(source, bytes):
        data = source
    else:
        path = Path(source)
        if not path.is_file():
            raise FileNotFoundError(f"There is no file {str(path)!r}.")
        data = path.read_bytes()
    try:
        model = onnx.ModelProto.FromString(data)
    except Exception as error:  # protobuf has no public class for it.
        raise ValueError(f"{_describe(source)} is no ONNX file ({error}).") from error
    if not model.graph.node or not model.opset_import:
        raise ValueError(f"{_describe(source)} is no ONNX file: it holds no graph of operators.")
    return len(data), model


def _describe(source: str | os.PathLike | bytes) -> str:
    return "The content" if isinstance(source, bytes) else repr(str(source))


def _external_files(model: Any) -> set[str]:
    return {
        entry.value
        for initializer in model.graph.initializer
        for entry in initializer.external_data
        if entry.key == "location"
    }


def _tensor(value: Any, metadata: dict[str, str], end: str) -> TensorInfo:
    kind = value.type.tensor_type
    dtype = import_onnx().helper.tensor_dtype_to_np_dtype(kind.elem_type).name
    sizes = [size.dim_value if size.HasField("dim_value") else -1 for size in kind.shape.dim]
    scale, zero_point = (), ()
    if SCALE_KEY.format(end=end) in metadata:
        scale = (float(json.loads(metadata[SCALE_KEY.format(end=end)])),)
        zero_point = (int(json.loads(metadata[ZERO_POINT_KEY.format(end=end)])),)
    return TensorInfo(value.name, dtype, tuple(sizes), scale, zero_point)


def _counts(nodes: Any) -> dict[str, int]:
    return dict(Counter(node.op_type for node in nodes).most_common())


def _is_float(element: int) -> bool:
    types = import_onnx().TensorProto
    return element in (types.FLOAT, types.FLOAT16, types.DOUBLE, types.BFLOAT16)


def _gives_floats(node: Any, floats: set[str]) -> bool:
    """Whether the output of a node of an optimized graph is float.

    That of most operators has the type of their first input.
    """
    if node.op_type.startswith("QLinear") or node.op_type in _INTEGER_OUTPUT:
        return False
    if node.op_type == "Cast":
        [to] = [attribute.i for attribute in node.attribute if attribute.name == "to"]
        return _is_float(to)
    if node.op_type == "DequantizeLinear":
        return True
    return bool(node.input) and node.input[0] in floats
