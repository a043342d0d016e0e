"""show what stands in a .tflite or .onnx file: operators, types, scales, metadata

examples:
  keras-effnet inspect flowers.tflite
  keras-effnet inspect flowers.tflite --tensors
  keras-effnet inspect flowers.onnx --json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from keras_effnet.cli.common import UsageError
from keras_effnet.cli.tables import text_table

_SHOWN_LABELS = 5


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument("file", metavar="FILE", help="a .tflite or .onnx file")
    parser.add_argument(
        "--tensors", action="store_true", help="show every tensor of a .tflite file"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object")


def run(args: argparse.Namespace) -> None:
    """Runs the command.

    Raises:
        UsageError: If the arguments cannot work.
        Exception: Whatever goes wrong later.
    """
    suffix = Path(args.file).suffix.lower()
    if suffix not in (".tflite", ".onnx"):
        raise UsageError(f"Only .tflite and .onnx files can be shown. Received: {args.file!r}")
    if not Path(args.file).is_file():
        raise UsageError(f"There is no file {args.file!r}.")
    if suffix == ".onnx" and args.tensors:
        raise UsageError("--tensors is for .tflite files.")
    found = _onnx(args.file) if suffix == ".onnx" else _tflite(args.file, args.tensors)
    if args.json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        print(_text(found))


def _tflite(path: str, with_tensors: bool) -> dict[str, Any]:
    from keras_effnet.export import read_metadata
    from keras_effnet.export.tflite_file import read_graph

    graph = read_graph(path)
    main = graph.subgraphs[0]
    counts: dict[tuple[str, int], int] = {}
    for subgraph in graph.subgraphs:
        for operator in subgraph.operators:
            key = (operator.name, operator.version)
            counts[key] = counts.get(key, 0) + 1
    dtypes: dict[str, int] = {}
    for tensor in main.tensors:
        dtypes[tensor.dtype] = dtypes.get(tensor.dtype, 0) + 1
    metadata = read_metadata(path)
    found = {
        "file": path,
        "bytes": graph.size,
        "subgraphs": len(graph.subgraphs),
        "parameter_bytes": graph.parameter_bytes,
        "inputs": [dataclasses.asdict(main.tensors[index]) for index in main.inputs],
        "outputs": [dataclasses.asdict(main.tensors[index]) for index in main.outputs],
        "signatures": {
            name: {"inputs": list(inputs), "outputs": list(outputs)}
            for name, (inputs, outputs) in graph.signatures.items()
        },
        "operators": [
            {"op": op, "version": version, "count": count}
            for (op, version), count in sorted(counts.items(), key=lambda item: -item[1])
        ],
        "tensors_by_type": dtypes,
        "metadata": None if metadata is None else dataclasses.asdict(metadata),
    }
    if with_tensors:
        found["tensors"] = [dataclasses.asdict(tensor) for tensor in main.tensors]
    return found


def _onnx(path: str) -> dict[str, Any]:
    from keras_effnet.export import read_onnx

    file = read_onnx(path)
    return {
        "file": path,
        "bytes": file.size,
        "opset": file.opset,
        "ir_version": file.ir_version,
        "inputs": [dataclasses.asdict(tensor) for tensor in file.inputs],
        "outputs": [dataclasses.asdict(tensor) for tensor in file.outputs],
        "operators": [{"op": op, "count": count} for op, count in file.ops.items()],
        "external_data": list(file.external),
        "metadata": file.metadata,
    }


def _text(found: dict[str, Any]) -> str:
    lines = [f"{found['file']}: {found['bytes']:,} bytes"]
    if "parameter_bytes" in found:
        lines[0] += f", of them {found['parameter_bytes']:,} of parameters"
    if "opset" in found:
        lines[0] += f", opset {found['opset']}, IR version {found['ir_version']}"
    ends = [("end", "name", "type", "shape", "scale", "zero point")]
    for role in ("inputs", "outputs"):
        ends += [(role[:-1], *_cells(tensor)) for tensor in found[role]]
    parts = [lines[0], text_table(ends, left=(0, 1, 2, 3))]
    versioned = "version" in (found["operators"] or [{}])[0]
    header = ("operator", "version", "count") if versioned else ("operator", "count")
    rows = [
        (row["op"], *([str(row["version"])] if versioned else []), str(row["count"]))
        for row in found["operators"]
    ]
    parts.append(text_table([header, *rows]))
    if "tensors_by_type" in found:
        counts = ", ".join(f"{count} {dtype}" for dtype, count in found["tensors_by_type"].items())
        parts.append(f"Tensors: {counts}")
    for name, ends in found.get("signatures", {}).items():
        inputs, outputs = (", ".join(ends[role]) for role in ("inputs", "outputs"))
        parts.append(f"Signature {name}: {inputs} -> {outputs}")
    if found["metadata"]:
        parts.append(_metadata(found["metadata"]))
    if "tensors" in found:
        rows = [("name", "type", "shape", "scale", "zero point")]
        rows += [_cells(tensor) for tensor in found["tensors"]]
        parts.append(text_table(rows, left=(0, 1, 2)))
    return "\n\n".join(parts)


def _cells(tensor: dict[str, Any]) -> tuple[str, ...]:
    scales, zeros = tensor["scale"], tensor["zero_point"]
    scale = zero = "-"
    if len(scales) == 1:
        scale, zero = f"{scales[0]:.6g}", str(zeros[0]) if zeros else "-"
    elif scales:
        scale = f"{len(scales)} scales, axis {tensor['quantized_dimension']}"
        zero = str(zeros[0]) if len(set(zeros)) == 1 else "several"
    return tensor["name"], tensor["dtype"], str(list(tensor["shape"])), scale, zero


def _metadata(metadata: dict[str, Any]) -> str:
    lines = []
    for name, value in metadata.items():
        if name == "labels" and isinstance(value, str):
            value = json.loads(value)
        if name == "labels" and value:
            more = "" if len(value) <= _SHOWN_LABELS else ", …"
            value = f"{len(value)}: " + ", ".join(value[:_SHOWN_LABELS]) + more
        if value not in ("", None):
            lines.append(f"  {name}: {value}")
    return "Metadata:\n" + "\n".join(lines)
