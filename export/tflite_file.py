"""What stands in a TFLite file: its operators, tensors and quantization parameters."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ._optional import import_tflite_schema

_IDENTIFIER = b"TFL3"


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
    schema = import_tflite_schema()
    data = load_bytes(source)
    # A flatbuffer's offsets are not checked when it is opened: a damaged file fails anywhere.
    try:
        return _read(schema, data)
    except Exception as error:
        raise ValueError(f"{describe(source)} is a damaged TFLite file ({error}).") from error


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
    if data[4:8] != _IDENTIFIER:
        raise ValueError(
            f"{describe(source)} is no TFLite file: bytes 4 to 8 are not {_IDENTIFIER!r}. "
            f"Received: {data[4:8]!r}"
        )
    return data


def describe(source: str | os.PathLike | bytes) -> str:
    """How messages name a file that was given itself or by its path."""
    return "The content" if isinstance(source, bytes) else repr(str(source))


def _read(schema: Any, data: bytes) -> TFLiteFile:
    model = schema.Model.GetRootAs(data, 0)
    graphs = [model.Subgraphs(index) for index in range(model.SubgraphsLength())]
    ops, versions = _operators(schema, model, graphs)
    dtypes = _names(schema.TensorType)
    tables = [
        [_tensor(model, graph.Tensors(index), dtypes) for index in range(graph.TensorsLength())]
        for graph in graphs
    ]
    main = tables[0]
    inputs = [graphs[0].Inputs(index) for index in range(graphs[0].InputsLength())]
    outputs = [graphs[0].Outputs(index) for index in range(graphs[0].OutputsLength())]
    ends = {*inputs, *outputs}
    inner = [tensor for index, tensor in enumerate(main) if index not in ends]
    inner += [tensor for table in tables[1:] for tensor in table]
    return TFLiteFile(
        size=len(data),
        inputs=tuple(main[index] for index in inputs),
        outputs=tuple(main[index] for index in outputs),
        ops=ops,
        op_versions=versions,
        inner=tuple(inner),
    )


def _operators(schema: Any, model: Any, graphs: list[Any]) -> tuple[dict[str, int], dict[str, int]]:
    names = _names(schema.BuiltinOperator)
    counts: Counter[str] = Counter()
    versions: dict[str, int] = {}
    for graph in graphs:
        for index in range(graph.OperatorsLength()):
            code = model.OperatorCodes(graph.Operators(index).OpcodeIndex())
            # Codes above 127 stand in a second field; the first one then holds 127.
            name = names[max(code.BuiltinCode(), code.DeprecatedBuiltinCode())]
            if name == "CUSTOM":
                name = code.CustomCode().decode()
            counts[name] += 1
            versions[name] = max(versions.get(name, 0), code.Version())
    ops = dict(counts.most_common())
    return ops, {name: versions[name] for name in ops}


def _tensor(model: Any, tensor: Any, dtypes: dict[int, str]) -> TensorInfo:
    shape = [tensor.Shape(axis) for axis in range(tensor.ShapeLength())]
    if tensor.ShapeSignatureLength():
        shape = [tensor.ShapeSignature(axis) for axis in range(tensor.ShapeSignatureLength())]
    quantization = tensor.Quantization()
    scales, zero_points, dimension = [], [], 0
    if quantization is not None:
        scales = [quantization.Scale(i) for i in range(quantization.ScaleLength())]
        zero_points = [quantization.ZeroPoint(i) for i in range(quantization.ZeroPointLength())]
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
