"""Calibration results as a JSON file: the ranges of all tensors of a quantized model.

The limits of the kernels and the factors of an equalization are no part of it: they follow from
the weights. So ranges fit a model that is equalized in the same way, or not at all, as that one.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path

import keras

from .files import write_json
from .graph import Graph
from .lowering import read_quantized
from .params import QuantParams
from .scheme import needs_range, shared_ranges

FORMAT = "keras_effnet calibration"
VERSION = 1


@dataclasses.dataclass(frozen=True)
class TensorRange:
    """The range of one tensor.

    Args:
        params: Scale and zero point.
        channels: Number of channels of the tensor, by which other models are told apart.
    """

    params: QuantParams
    channels: int


def save_calibration(quantized: keras.Model, path: str | os.PathLike) -> None:
    """Writes the ranges of a quantized model as JSON, whole or not at all.

    Args:
        quantized: A model made by `quantize_model`, as it is or trained further.
        path: The file to write; an existing one is replaced.

    Raises:
        ValueError: If the model is not quantized.
        OSError: If the file cannot be written.
    """
    graph = read_quantized(quantized)
    tensors = {
        node.name: {
            "scale": node.params.scale,
            "zero_point": node.params.zero_point,
            "channels": node.shape[-1],
        }
        for node in graph
        if node.params is not None
    }
    data = {"format": FORMAT, "version": VERSION, "model": graph.name, "tensors": tensors}
    write_json(path, data)


def load_calibration(path: str | os.PathLike) -> dict[str, TensorRange]:
    """Reads ranges that `save_calibration` wrote.

    Args:
        path: The file.

    Returns:
        Ranges by the name of the tensor, for `quantize_model(ranges=...)`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file holds something else, or a range that is not allowed.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{str(path)!r} is no JSON file. Write it with `save_calibration`. Received: {error}"
        ) from error
    if not isinstance(data, dict) or (data.get("format"), data.get("version")) != (FORMAT, VERSION):
        received = list(data)[:5] if isinstance(data, dict) else type(data).__name__
        raise ValueError(
            f"{str(path)!r} must hold a {FORMAT!r} of version {VERSION}. Write it with "
            f"`save_calibration`. Received: {received}"
        )
    tensors = data.get("tensors")
    if not isinstance(tensors, dict):
        raise ValueError(
            f"{str(path)!r} must hold `tensors` by name. Write it with `save_calibration`. "
            f"Received: {type(tensors).__name__}"
        )
    return {name: _read_entry(str(path), name, entry) for name, entry in tensors.items()}


def _read_entry(path: str, name: str, entry: dict) -> TensorRange:
    try:
        params = QuantParams(float(entry["scale"]), int(entry["zero_point"]))
        return TensorRange(params, int(entry["channels"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path!r} holds no usable range of {name!r}, which needs a positive `scale`, a "
            f"`zero_point` in -128..127 and `channels`. Received: {entry!r} ({error!r})"
        ) from error


def check_ranges(graph: Graph, ranges: Mapping[str, TensorRange], complete: bool) -> None:
    """Checks that ranges belong to the tensors of a graph.

    Args:
        graph: The folded and equalized graph.
        ranges: Ranges by the name of the tensor.
        complete: Whether all tensors must be there, since there are no data to find others.

    Raises:
        ValueError: If a tensor is unknown, is missing, has another number of channels, or must
            share its range with one whose range differs.
    """
    groups = shared_ranges(graph)
    needed = [name for group in groups for name in group if needs_range(graph, graph[name])]
    unknown = [name for name in ranges if name not in needed]
    if unknown:
        raise ValueError(
            f"`ranges` name {len(unknown)} tensors that the model {graph.name!r} does not have, or "
            "that are float: they belong to another model, or to one that was equalized or kept in "
            f"float otherwise. Quantize with the same configuration. Received: {_few(unknown)}"
        )
    missing = [name for name in needed if name not in ranges]
    if missing and complete:
        raise ValueError(
            f"`ranges` lack {len(missing)} of the {len(needed)} tensors of the model "
            f"{graph.name!r}: they belong to another model or configuration. Give "
            f"`calibration_data` to find these. Missing: {_few(missing)}"
        )
    for name, found in ranges.items():
        channels = graph[name].shape[-1]
        if found.channels != channels:
            raise ValueError(
                f"`ranges` belong to another model than {graph.name!r}: {name!r} has {channels} "
                f"channels. Received: {found.channels}"
            )
    for group in groups:
        given = {ranges[name].params for name in group if name in ranges}
        if len(given) > 1:
            raise ValueError(
                f"The tensors {_few(group)} are joined and must have one range. Received: {given}"
            )


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(map(repr, names[:5])) + more
