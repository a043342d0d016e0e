"""Whether the bytes of a TFLite file hold together: every offset, length and index is checked.

A FlatBuffer is read through offsets that nothing checks when it is opened, so a damaged or hostile
file can lead a reader out of the buffer, into loops of billions, or a native one to a crash.
`check_structure` walks all tables that readers follow and refuses such a file.

The tables are those of TFLite's schema
(https://github.com/tensorflow/tensorflow/blob/master/tensorflow/compiler/mlir/lite/schema/schema.fbs)
and the layout that of FlatBuffers (https://flatbuffers.dev/internals).
"""

from __future__ import annotations

import math
import struct
from typing import Any

IDENTIFIER = b"TFL3"

# Bytes of a value of each tensor type; types of other sizes (strings, resources, 2 and 4 bits) are
# left to whoever reads them.
_TYPE_BYTES = {
    "FLOAT16": 2,
    "BFLOAT16": 2,
    "FLOAT32": 4,
    "FLOAT64": 8,
    "INT8": 1,
    "UINT8": 1,
    "INT16": 2,
    "UINT16": 2,
    "INT32": 4,
    "UINT32": 4,
    "INT64": 8,
    "UINT64": 8,
    "BOOL": 1,
}
# Tensors that L2, the largest of the family, computes in float at its full size have 280 MB at
# most; what asks for more than this asks for the memory of whoever runs the file. Constants are as
# large as the file holds them.
MAX_TENSOR_BYTES = 2**29
# Tables and vectors that others share are read each time, so a small file can hold very many. A B7
# has some 20,000 tables, a V2-L 2 million scales, zero points and the like.
_MAX_TABLES = 300_000
_MAX_NUMBERS = 8_000_000

# Fields of each table by their number: bytes of a scalar, or "string", [bytes of the elements],
# "Table", ["Table"] or "any", a table of an unknown kind.
_TABLES: dict[str, dict[int, Any]] = {
    "Model": {
        0: 4,
        1: ["OperatorCode"],
        2: ["SubGraph"],
        3: "string",
        4: ["Buffer"],
        5: [4],
        6: ["Metadata"],
        7: ["SignatureDef"],
    },
    "OperatorCode": {0: 1, 1: "string", 2: 4, 3: 4},
    "SubGraph": {0: ["Tensor"], 1: [4], 2: [4], 3: ["Operator"], 4: "string", 5: 4},
    "Tensor": {
        0: [4],
        1: 1,
        2: 4,
        3: "string",
        4: "Quantization",
        5: 1,
        6: "any",
        7: [4],
        8: 1,
        9: ["any"],
    },
    "Quantization": {0: [4], 1: [4], 2: [4], 3: [8], 4: 1, 5: "any", 6: 4},
    "Operator": {
        0: 4,
        1: [4],
        2: [4],
        3: 1,
        4: "any",
        5: [1],
        6: 1,
        7: [1],
        8: [4],
        9: 8,
        10: 8,
        11: 1,
        12: "any",
        13: 4,
    },
    "Buffer": {0: [1], 1: 8, 2: 8},
    "Metadata": {0: "string", 1: 4},
    "SignatureDef": {0: ["TensorMap"], 1: ["TensorMap"], 2: "string", 4: 4},
    "TensorMap": {0: "string", 1: 4},
    "any": {},
}


def check_structure(data: bytes, schema: Any) -> None:
    """Checks every offset, length and index that readers of a TFLite file follow.

    Args:
        data: The file.
        schema: The module of the generated reader.

    Raises:
        ValueError: If the file is damaged; the message says where.
    """
    walker = _Walker(data)
    try:
        root = walker.offset(0, 0)
    except struct.error as error:
        raise ValueError("it ends within its first bytes") from error
    walker.table(root, "Model")
    _check_indices(data, schema)


class _Walker:
    """Follows the offsets of a FlatBuffer, and counts what it visits."""

    def __init__(self, data: bytes):
        self.data = data
        self.tables = self.numbers = 0

    def offset(self, position: int, base: int) -> int:
        return base + struct.unpack_from("<I", self.data, position)[0]

    def inside(self, start: int, size: int, what: str) -> None:
        if start < 0 or size < 0 or start + size > len(self.data):
            raise ValueError(f"{what} lies outside the file, at byte {start}")

    def table(self, start: int, kind: str) -> None:
        self.tables += 1
        if self.tables > _MAX_TABLES:
            raise ValueError(f"it has more than {_MAX_TABLES:,} tables")
        self.inside(start, 4, f"a table ({kind})")
        vtable = start - struct.unpack_from("<i", self.data, start)[0]
        self.inside(vtable, 4, f"the layout of a table ({kind})")
        vtable_size, table_size = struct.unpack_from("<HH", self.data, vtable)
        if vtable_size < 4 or vtable_size % 2:
            raise ValueError(f"the layout of a table ({kind}) has the size {vtable_size}")
        self.inside(vtable, vtable_size, f"the layout of a table ({kind})")
        self.inside(start, table_size, f"a table ({kind})")
        fields = _TABLES[kind]
        for number in range((vtable_size - 4) // 2):
            [place] = struct.unpack_from("<H", self.data, vtable + 4 + 2 * number)
            if not place:
                continue
            form = fields.get(number, 1)
            size = form if isinstance(form, int) else 4
            if place + size > table_size:
                raise ValueError(f"a field of a table ({kind}) lies outside it")
            if not isinstance(form, int):
                self.field(start + place, form)

    def field(self, position: int, form: Any) -> None:
        target = self.offset(position, position)
        if isinstance(form, str) and form != "string":
            self.table(target, form)
            return
        self.inside(target, 4, "a vector")
        [length] = struct.unpack_from("<I", self.data, target)
        element = 1 if form == "string" else form[0]
        size = element if isinstance(element, int) else 4
        self.inside(target + 4, length * size, f"a vector of {length:,} elements")
        if size > 1:
            self.numbers += length
            if self.numbers > _MAX_NUMBERS:
                raise ValueError(f"it has more than {_MAX_NUMBERS:,} numbers beside its constants")
        if isinstance(element, str):
            for place in range(target + 4, target + 4 + 4 * length, 4):
                self.table(self.offset(place, place), element)


def _check_indices(data: bytes, schema: Any) -> None:
    """Checks the indices of tensors, buffers and operators, and the sizes of constants."""
    model = schema.Model.GetRootAs(data, 0)
    codes, buffers = model.OperatorCodesLength(), model.BuffersLength()
    graphs = model.SubgraphsLength()
    if not graphs:
        raise ValueError("it has no sub-graph")
    known = {value for value in vars(schema.BuiltinOperator).values() if isinstance(value, int)}
    for index in range(codes):
        code = model.OperatorCodes(index)
        number = max(code.BuiltinCode(), code.DeprecatedBuiltinCode())
        if number not in known:
            raise ValueError(f"operator code {number} is unknown")
    types = {
        value: _TYPE_BYTES.get(name)
        for name, value in vars(schema.TensorType).items()
        if isinstance(value, int)
    }
    lengths = []
    for index in range(buffers):
        buffer = model.Buffers(index)
        size = buffer.DataLength()
        if buffer.Offset() > 1:  # Behind the FlatBuffer, in large models.
            size = buffer.Size()
            if buffer.Offset() + size > len(data):
                raise ValueError(f"buffer {index} lies outside the file")
        lengths.append(size)
    for number in range(graphs):
        graph = model.Subgraphs(number)
        for index in range(graph.TensorsLength()):
            _check_tensor(graph.Tensors(index), index, types, lengths)
        tensors = graph.TensorsLength()
        for what, vector in (("input", _inputs(graph)), ("output", _outputs(graph))):
            _check_range(vector, 0, tensors, f"an {what} of sub-graph {number}")
        for index in range(graph.OperatorsLength()):
            operator = graph.Operators(index)
            if not operator.OpcodeIndex() < codes:
                raise ValueError(f"operator {index} has no operator code")
            # An optional input that is left out has the index -1.
            _check_range(_inputs(operator), -1, tensors, f"an input of operator {index}")
            _check_range(_outputs(operator), 0, tensors, f"an output of operator {index}")
    for index in range(model.MetadataLength()):
        if not model.Metadata(index).Buffer() < buffers:
            raise ValueError(f"metadata entry {index} has no buffer")
    for index in range(model.SignatureDefsLength()):
        _check_signature(model, model.SignatureDefs(index))


def _check_tensor(tensor: Any, index: int, types: dict[int, int | None], lengths: list[int]):
    if tensor.Type() not in types:
        raise ValueError(f"tensor {index} has the unknown type {tensor.Type()}")
    if not tensor.Buffer() < len(lengths):
        raise ValueError(f"tensor {index} has no buffer")
    if max(tensor.ShapeLength(), tensor.ShapeSignatureLength()) > 16:
        raise ValueError(f"tensor {index} has {tensor.ShapeLength()} dimensions")
    shape = [tensor.Shape(axis) for axis in range(tensor.ShapeLength())]
    open_shape = [tensor.ShapeSignature(axis) for axis in range(tensor.ShapeSignatureLength())]
    if min(shape, default=0) < 0 or min(open_shape, default=0) < -1:
        raise ValueError(f"tensor {index} has the shape {shape}")
    if open_shape and len(open_shape) != len(shape):
        raise ValueError(f"tensor {index} has two shapes of different lengths")
    quantization = tensor.Quantization()
    if quantization is not None:
        scales = quantization.ScaleLength()
        if scales > 1 and quantization.ZeroPointLength() != scales:
            raise ValueError(f"tensor {index} has {scales} scales and other zero points")
        axis = quantization.QuantizedDimension()
        if scales > 1 and not (0 <= axis < len(shape) and shape[axis] == scales):
            raise ValueError(f"tensor {index} has {scales} scales, not one for each channel")
    width = types[tensor.Type()]
    if width is None or tensor.Sparsity() is not None:
        return
    size = width * math.prod(shape)
    length = lengths[tensor.Buffer()]
    if not length and size > MAX_TENSOR_BYTES:
        raise ValueError(f"tensor {index} has {size:,} bytes")
    if length and length != size:
        raise ValueError(f"tensor {index} has {size:,} bytes, its buffer {length:,}")


def _check_signature(model: Any, signature: Any) -> None:
    graph = signature.SubgraphIndex()
    if not graph < model.SubgraphsLength():
        raise ValueError("a signature has no sub-graph")
    tensors = model.Subgraphs(graph).TensorsLength()
    for index in range(signature.InputsLength()):
        _check_range([signature.Inputs(index).TensorIndex()], 0, tensors, "a signature's input")
    for index in range(signature.OutputsLength()):
        _check_range([signature.Outputs(index).TensorIndex()], 0, tensors, "a signature's output")


def _check_range(indices: list[int], low: int, end: int, what: str) -> None:
    if any(not low <= index < end for index in indices):
        raise ValueError(f"{what} is no tensor")


def _inputs(table: Any) -> list[int]:
    return [table.Inputs(index) for index in range(table.InputsLength())]


def _outputs(table: Any) -> list[int]:
    return [table.Outputs(index) for index in range(table.OutputsLength())]
