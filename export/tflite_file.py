"""What stands in a TFLite file: its operators, tensors and quantization parameters."""

from __future__ import annotations

import os
import struct
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ._optional import import_tflite_schema
from .structure import IDENTIFIER, check_structure


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a TFLite file.

    Args:
        name: As in the file.
        dtype: E.g. `"float32"`, `"int8"`, `"uint8"`, `"int32"`.
        shape: Sizes; -1 where the file leaves one open.
        scale: Quantization scales: none (not quantized), one (per tensor) or one per channel.
        zero_point: As many as there are scales.
        quantized_dimension: Axis of the channels, for several scales.
        constant: Whether the file holds its values (kernels, biases, constants).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    scale: tuple[float, ...] = ()
    zero_point: tuple[int, ...] = ()
    quantized_dimension: int = 0
    constant: bool = False

    @property
    def is_float(self) -> bool:
        return self.dtype in ("float16", "float32", "float64", "bfloat16")


@dataclass(frozen=True)
class TFLiteFile:
    """The content of a TFLite file, without the values of its tensors.

    Args:
        size: Of the file, in bytes.
        inputs: Of the main sub-graph.
        outputs: Of the main sub-graph.
        ops: How often each operator occurs, most frequent first, over all sub-graphs. Names are
            those of the TFLite schema, e.g. `"CONV_2D"`; a custom operator's is its own, e.g.
            `"FlexErfinv"`.
        op_versions: The version of each operator; the highest, if there are several.
        inner: Every tensor that is neither input nor output of the main sub-graph.
    """

    size: int
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    ops: dict[str, int]
    op_versions: dict[str, int]
    inner: tuple[TensorInfo, ...] = field(repr=False)

    @property
    def inner_floats(self) -> tuple[TensorInfo, ...]:
        """The float tensors between input and output; none in an integer-only file."""
        return tuple(tensor for tensor in self.inner if tensor.is_float)


def read_tflite(source: str | os.PathLike | bytes) -> TFLiteFile:
    """Reads a TFLite file.

    Args:
        source: Path, or the bytes of the file.

    Returns:
        Its content.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If LiteRT is not installed.
        ValueError: If it is no TFLite file, or a damaged one.
    """
    graph = read_graph(source)
    main = graph.subgraphs[0]
    ends = {*main.inputs, *main.outputs}
    inner = [tensor for index, tensor in enumerate(main.tensors) if index not in ends]
    inner += [tensor for other in graph.subgraphs[1:] for tensor in other.tensors]
    counts: Counter[str] = Counter()
    versions: dict[str, int] = {}
    for subgraph in graph.subgraphs:
        for operator in subgraph.operators:
            counts[operator.name] += 1
            versions[operator.name] = max(versions.get(operator.name, 0), operator.version)
    ops = dict(counts.most_common())
    return TFLiteFile(
        size=graph.size,
        inputs=tuple(main.tensors[index] for index in main.inputs),
        outputs=tuple(main.tensors[index] for index in main.outputs),
        ops=ops,
        op_versions={name: versions[name] for name in ops},
        inner=tuple(inner),
    )


def load_checked(source: str | os.PathLike | bytes) -> bytes:
    """The bytes of a TFLite file whose structure is sound, given itself or its path.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If LiteRT is not installed.
        ValueError: If it is no TFLite file, or a damaged one.
    """
    schema = import_tflite_schema()
    data = load_bytes(source)
    try:
        check_structure(data, schema)
    except (ValueError, ArithmeticError, LookupError, TypeError, struct.error) as error:
        raise ValueError(f"{describe(source)} is a damaged TFLite file: {error}.") from error
    return data


def load_bytes(source: str | os.PathLike | bytes) -> bytes:
    """The bytes of a TFLite file, given itself or its path.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it does not begin as TFLite files do.
    """
    if isinstance(source, bytes):
        data = source
    else:
        path = Path(source)
        if not path.is_file():
            raise FileNotFoundError(f"There is no file {str(path)!r}.")
        data = path.read_bytes()
    if data[4:8] != IDENTIFIER:
        raise ValueError(
            f"{describe(source)} is no TFLite file: bytes 4 to 8 are not {IDENTIFIER!r}. "
            f"Received: {data[4:8]!r}"
        )
    return data


def describe(source: str | os.PathLike | bytes) -> str:
    """How messages name a file that was given itself or by its path."""
    return "The content" if isinstance(source, bytes) else repr(str(source))


@dataclass(frozen=True)
class OperatorInfo:
    """One operator of a sub-graph.

    Args:
        name: As in the TFLite schema; a custom operator's own.
        version: Its version.
        custom: Whether it is none of TFLite's own.
        inputs: Indices of its tensors; -1 for an optional one that is left out.
        outputs: Indices of its tensors.
        options: Its attributes, named as in the schema in camelCase, e.g. `"strideH"`.
    """

    name: str
    version: int
    custom: bool
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SubgraphInfo:
    """One sub-graph.

    Args:
        name: As in the file.
        tensors: All of them, in the order of their indices.
        values: Of the constant tensors by their index: the bytes.
        inputs: Indices of its tensors.
        outputs: Indices of its tensors.
        operators: In the order in which they run.
    """

    name: str
    tensors: tuple[TensorInfo, ...]
    values: dict[int, bytes] = field(repr=False)
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    operators: tuple[OperatorInfo, ...]


@dataclass(frozen=True)
class TFLiteGraph:
    """The operators of a TFLite file and the tensors they read and write.

    Args:
        size: Of the file, in bytes.
        subgraphs: The first is the main one.
        signatures: Names of the signatures; each with the names of its inputs and outputs.
        parameter_bytes: Of all constants that operators read, each counted once.
    """

    size: int
    subgraphs: tuple[SubgraphInfo, ...]
    signatures: dict[str, tuple[tuple[str, ...], tuple[str, ...]]]
    parameter_bytes: int


def read_graph(source: str | os.PathLike | bytes) -> TFLiteGraph:
    """Reads the operators and tensors of a TFLite file.

    Args:
        source: Path, or the bytes of the file.

    Returns:
        Its graph.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If LiteRT is not installed.
        ValueError: If it is no TFLite file, or a damaged one.
    """
    schema = import_tflite_schema()
    data = load_checked(source)
    # What is left to fail are texts that are no UTF-8 and the like.
    try:
        return _read_graph(schema, data)
    except Exception as error:
        raise ValueError(f"{describe(source)} is a damaged TFLite file ({error}).") from error


def _read_graph(schema: Any, data: bytes) -> TFLiteGraph:
    model = schema.Model.GetRootAs(data, 0)
    names, dtypes = _names(schema.BuiltinOperator), _names(schema.TensorType)
    known = set(names.values()) - {"CUSTOM"}
    subgraphs, constants = [], {}
    contents: dict[int, bytes] = {}  # By buffer: many tensors may share one.
    for place in range(model.SubgraphsLength()):
        graph = model.Subgraphs(place)
        tensors, values = [], {}
        for index in range(graph.TensorsLength()):
            tensor = graph.Tensors(index)
            tensors.append(_tensor(model, tensor, dtypes))
            if tensors[-1].constant:
                number = tensor.Buffer()
                if number not in contents:
                    contents[number] = _buffer_bytes(model, number, data)
                values[index] = contents[number]
        operators = []
        for index in range(graph.OperatorsLength()):
            operator = graph.Operators(index)
            code = model.OperatorCodes(operator.OpcodeIndex())
            inputs = tuple(operator.Inputs(i) for i in range(operator.InputsLength()))
            name = _operator_name(code, names)
            operators.append(
                OperatorInfo(
                    name=name,
                    version=code.Version(),
                    custom=name not in known,
                    inputs=inputs,
                    outputs=tuple(operator.Outputs(i) for i in range(operator.OutputsLength())),
                    options=_options(schema, operator),
                )
            )
            for i in inputs:
                if i in values:
                    constants[graph.Tensors(i).Buffer()] = len(values[i])
        subgraphs.append(
            SubgraphInfo(
                name=(graph.Name() or b"").decode(),
                tensors=tuple(tensors),
                values=values,
                inputs=tuple(graph.Inputs(i) for i in range(graph.InputsLength())),
                outputs=tuple(graph.Outputs(i) for i in range(graph.OutputsLength())),
                operators=tuple(operators),
            )
        )
    signatures = {}
    for index in range(model.SignatureDefsLength()):
        signature = model.SignatureDefs(index)
        signatures[(signature.SignatureKey() or b"").decode()] = (
            tuple(signature.Inputs(i).Name().decode() for i in range(signature.InputsLength())),
            tuple(signature.Outputs(i).Name().decode() for i in range(signature.OutputsLength())),
        )
    return TFLiteGraph(len(data), tuple(subgraphs), signatures, sum(constants.values()))


def _buffer_bytes(model: Any, index: int, data: bytes) -> bytes:
    buffer = model.Buffers(index)
    if buffer.Offset() > 1:
        return data[buffer.Offset() : buffer.Offset() + buffer.Size()]
    return buffer.DataAsNumpy().tobytes()


def _options(schema: Any, operator: Any) -> dict[str, Any]:
    table = operator.BuiltinOptions()
    if table is None:
        return {}
    options = schema.BuiltinOptionsCreator(operator.BuiltinOptionsType(), table)
    return {} if options is None else dict(vars(options))


def _operator_name(code: Any, names: dict[int, str]) -> str:
    # Codes above 127 stand in a second field; the first one then holds 127.
    name = names[max(code.BuiltinCode(), code.DeprecatedBuiltinCode())]
    return (code.CustomCode() or b"CUSTOM").decode() if name == "CUSTOM" else name


def _tensor(model: Any, tensor: Any, dtypes: dict[int, str]) -> TensorInfo:
    shape = [tensor.Shape(axis) for axis in range(tensor.ShapeLength())]
    if tensor.ShapeSignatureLength():
        shape = [tensor.ShapeSignature(axis) for axis in range(tensor.ShapeSignatureLength())]
    quantization = tensor.Quantization()
    scales, zero_points, dimension = [], [], 0
    if quantization is not None:
        if quantization.ScaleLength():  # As arrays: kernels have thousands of them.
            scales = quantization.ScaleAsNumpy().tolist()
        if quantization.ZeroPointLength():
            zero_points = quantization.ZeroPointAsNumpy().tolist()
        dimension = quantization.QuantizedDimension()
    buffer = model.Buffers(tensor.Buffer())
    return TensorInfo(
        name=(tensor.Name() or b"").decode(),
        dtype=dtypes[tensor.Type()].lower(),
        shape=tuple(shape),
        scale=tuple(scales),
        zero_point=tuple(zero_points),
        quantized_dimension=dimension,
        # Values of large models stand behind the flatbuffer, at an offset.
        constant=buffer.DataLength() > 0 or buffer.Offset() > 1,
    )


def _names(enum: Any) -> dict[int, str]:
    return {value: name for name, value in vars(enum).items() if isinstance(value, int)}
