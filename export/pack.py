"""TFLite models as bytes, from the objects of the generated code.

The generated `Pack` forgets what the schema demands, that constants are aligned, and writes each
vector of zero points anew. `pack_model` does both.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .structure import IDENTIFIER

# Bytes to which constants are aligned (`force_align` in the schema).
ALIGNMENT = 16


def pack_model(model: Any, schema: Any) -> bytes:
    """Writes a model.

    Args:
        model: A `ModelT` of the generated code; its buffers and quantization parameters are
            replaced by ones that write themselves well.
        schema: The module of the generated code.

    Returns:
        The content of the file.
    """
    import flatbuffers

    shared: dict[tuple[int, ...], int] = {}
    size = 0
    for index, buffer in enumerate(model.buffers or ()):
        data = b"" if buffer.data is None else np.asarray(buffer.data, np.uint8).tobytes()
        model.buffers[index] = _aligned_buffer(schema, data)
        size += len(data)
    for graph in model.subgraphs or ():
        for tensor in graph.tensors or ():
            found = tensor.quantization
            # Only what the fields below hold may be written by them.
            if found is not None and _is_plain(found):
                tensor.quantization = _shared_quantization(schema, shared, found)
    builder = flatbuffers.Builder(size + 2**20)
    builder.Finish(model.Pack(builder), file_identifier=IDENTIFIER)
    return bytes(builder.Output())


def _is_plain(quantization: Any) -> bool:
    return (
        _length(quantization.scale) > 0
        and _length(quantization.zeroPoint) > 0
        and not quantization.detailsType
        and not _length(quantization.min)
        and not _length(quantization.max)
    )


def _length(vector: Any) -> int:
    return 0 if vector is None else len(vector)


def _aligned_buffer(schema: Any, data: bytes) -> Any:
    class Buffer(schema.BufferT):
        """A buffer whose data are aligned, which the generated code forgets."""

        def Pack(self, builder):
            offset = None
            if data:
                builder.StartVector(1, len(data), ALIGNMENT)
                builder.head -= len(data)
                builder.Bytes[builder.head : builder.head + len(data)] = data
                offset = builder.EndVector()
            schema.BufferStart(builder)
            if offset is not None:
                schema.BufferAddData(builder, offset)
            return schema.BufferEnd(builder)

    return Buffer()


def _shared_quantization(schema: Any, shared: dict[tuple[int, ...], int], found: Any) -> Any:
    scales = np.asarray(found.scale, np.float32)
    zero_points = np.asarray(found.zeroPoint, np.int64)

    class Quantization(schema.QuantizationParametersT):
        """Parameters of a tensor.

        A kernel has as many zero points (8 bytes each) as channels, all 0: the vectors of one
        length stand in the file once, which saves 5 % of it.
        """

        def Pack(self, builder):
            key = tuple(zero_points.tolist())
            if key not in shared:
                shared[key] = builder.CreateNumpyVector(zero_points)
            scale_vector = builder.CreateNumpyVector(scales)
            schema.QuantizationParametersStart(builder)
            schema.QuantizationParametersAddScale(builder, scale_vector)
            schema.QuantizationParametersAddZeroPoint(builder, shared[key])
            schema.QuantizationParametersAddQuantizedDimension(builder, found.quantizedDimension)
            return schema.QuantizationParametersEnd(builder)

    return Quantization()
