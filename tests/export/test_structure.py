"""Damaged and hostile TFLite files are refused, whatever is wrong with them."""

import struct
import time

import numpy as np
import pytest

from keras_effnet.export import check_file, pack, read_tflite, structure
from keras_effnet.export._optional import import_tflite_schema
from keras_effnet.export.structure import check_structure
from keras_effnet.export.tflite_file import read_graph


@pytest.fixture(scope="module")
def schema():
    return import_tflite_schema()


def changed(data, schema, change):
    model = schema.ModelT.InitFromPackedBuf(data, 0)
    change(model, model.subgraphs[0])
    return pack.pack_model(model, schema)


def test_a_sound_file_passes(float_bytes, int8_bytes, schema):
    check_structure(float_bytes, schema)
    check_structure(int8_bytes, schema)
    assert changed(int8_bytes, schema, lambda model, graph: None)[4:8] == b"TFL3"


def test_every_truncation_is_refused(int8_bytes):
    """Behind the last byte of the FlatBuffer nothing is missing; padding may end it."""
    lengths = [*range(8, 200), *range(200, len(int8_bytes) - 8, 97)]
    for length in lengths:
        with pytest.raises(ValueError, match="damaged TFLite file"):
            read_tflite(int8_bytes[:length])


def test_bytes_are_tflite_only_by_their_identifier():
    with pytest.raises(ValueError, match="damaged TFLite file"):
        read_tflite(b"\xff\xff\xff\x7fTFL3" + b"\xff" * 64)


def _set(owner, name, value):
    return lambda model, graph: setattr(owner(model, graph), name, value)


CHANGES = {
    "an input of operator 0 is no tensor": _set(
        lambda model, graph: graph.operators[0], "inputs", np.int32([10**6])
    ),
    "an output of operator 0 is no tensor": _set(
        lambda model, graph: graph.operators[0], "outputs", np.int32([-1])
    ),
    "an input of sub-graph 0 is no tensor": lambda model, graph: setattr(
        graph, "inputs", np.int32([-5])
    ),
    "operator 0 has no operator code": _set(
        lambda model, graph: graph.operators[0], "opcodeIndex", 999
    ),
    "operator code 5000 is unknown": _set(
        lambda model, graph: model.operatorCodes[0], "builtinCode", 5000
    ),
    "tensor 0 has no buffer": _set(lambda model, graph: graph.tensors[0], "buffer", 10**6),
    "tensor 0 has the unknown type 99": _set(lambda model, graph: graph.tensors[0], "type", 99),
    "tensor 0 has the shape": _set(lambda model, graph: graph.tensors[0], "shape", np.int32([-3])),
    "tensor 0 has 4,611,686,014,132,420,609 bytes": _set(
        lambda model, graph: graph.tensors[0], "shape", np.int32([2**31 - 1, 2**31 - 1])
    ),
    "tensor 0 has 536,870,913 bytes": _set(
        lambda model, graph: graph.tensors[0], "shape", np.int32([2**29 + 1])
    ),
    "its buffer": lambda model, graph: [
        setattr(tensor, "shape", np.int32([*tensor.shape, 3]))
        for tensor in graph.tensors
        if model.buffers[tensor.buffer].data is not None
    ],
    "scales, not one for each channel": lambda model, graph: [
        setattr(tensor.quantization, "quantizedDimension", 9)
        for tensor in graph.tensors
        if tensor.quantization is not None and len(np.atleast_1d(tensor.quantization.scale)) > 1
    ],
    "it has no sub-graph": lambda model, graph: setattr(model, "subgraphs", []),
    "a signature has no sub-graph": _set(
        lambda model, graph: model.signatureDefs[0], "subgraphIndex", 7
    ),
    "a signature's input is no tensor": lambda model, graph: setattr(
        model.signatureDefs[0].inputs[0], "tensorIndex", 10**6
    ),
}


@pytest.mark.parametrize("message", CHANGES)
def test_indices_and_sizes_that_cannot_be(int8_bytes, schema, message):
    data = changed(int8_bytes, schema, CHANGES[message])
    with pytest.raises(ValueError, match=f"damaged TFLite file: .*{message}"):
        read_graph(data)


def test_lengths_of_billions_are_refused_at_once(int8_bytes):
    """Every 32-bit word of the tables is made a length of two billions, in turn."""
    start = time.perf_counter()
    refused = 0
    for place in range(len(int8_bytes) - 2000, len(int8_bytes) - 4, 8):
        data = bytearray(int8_bytes)
        struct.pack_into("<I", data, place, 2**31 - 1)
        try:
            check_file(bytes(data), "coral")
        except ValueError as error:
            assert "damaged" in str(error)
            refused += 1
    assert refused > 20
    assert time.perf_counter() - start < 20


@pytest.mark.parametrize("limit", ["_MAX_TABLES", "_MAX_NUMBERS"])
def test_shared_tables_and_vectors_do_not_explode(int8_bytes, schema, monkeypatch, limit):
    monkeypatch.setattr(structure, limit, 50)
    with pytest.raises(ValueError, match="more than 50"):
        check_structure(int8_bytes, schema)
