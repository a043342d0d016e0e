"""Judging a TFLite file by a target: what is mapped, what is not and why, what to change."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import targets
from .targets import OpRule, Target, get_target
from .tflite_file import OperatorInfo, SubgraphInfo, TFLiteGraph, read_graph

MAPPED, AT_RISK, NOT_MAPPED = "mapped", "at risk", "not mapped"

# Operators whose further inputs only say how to do it: axes, shapes, paddings, as int32.
_PARAMETERS_FROM = {
    "CONV_2D": 1,
    "DEPTHWISE_CONV_2D": 1,
    "FULLY_CONNECTED": 1,
    "MEAN": 1,
    "SUM": 1,
    "REDUCE_MAX": 1,
    "REDUCE_MIN": 1,
    "RESHAPE": 1,
    "PAD": 1,
    "EXPAND_DIMS": 1,
    "RESIZE_BILINEAR": 1,
    "RESIZE_NEAREST_NEIGHBOR": 1,
    "SLICE": 1,
    "STRIDED_SLICE": 1,
    "TRANSPOSE": 1,
}
_KERNEL_OPS = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "TRANSPOSE_CONV")


@dataclass(frozen=True)
class OpVerdict:
    """What becomes of one operator.

    Args:
        index: Its place in the main sub-graph.
        op: Its name.
        version: Its version.
        output: Name of the tensor that it writes.
        status: "mapped", "at risk" (it may stay on the processor) or "not mapped".
        reasons: Why it is not surely mapped.
        advice: What to change.
    """

    index: int
    op: str
    version: int
    output: str
    status: str
    reasons: tuple[str, ...] = ()
    advice: tuple[str, ...] = ()


@dataclass(frozen=True)
class Segment:
    """Operators in a row that run in one place.

    Args:
        place: Name of the accelerator, or "CPU".
        first: Index of the first operator.
        last: Index of the last one.
    """

    place: str
    first: int
    last: int


@dataclass(frozen=True)
class TargetReport:
    """What a target makes of a file.

    Args:
        target: Name of the target.
        title: Of the target, for people.
        size: Of the file, in bytes.
        operators: One verdict for each operator of the main sub-graph.
        problems: What is wrong with the file as a whole, each with what to do.
        segments: Where the graph would split.
        accelerated: How many operators run on the accelerator: of a target that needs all of
            them, those before the first that is not mapped.
        parameter_bytes: Of all constants.
        cache_bytes: On-chip memory for them, or None.
        advice: What to change, without repetitions.
        remarks: `(text, source)` of what no file shows.
        fits: Whether the target takes the file as it is.
    """

    target: str
    title: str
    size: int
    operators: tuple[OpVerdict, ...]
    problems: tuple[str, ...]
    segments: tuple[Segment, ...]
    accelerated: int
    parameter_bytes: int
    cache_bytes: int | None
    advice: tuple[str, ...]
    remarks: tuple[tuple[str, str], ...]
    fits: bool

    @property
    def fits_cache(self) -> bool | None:
        """Whether the parameters stay on chip; None if the target has no such memory."""
        return None if self.cache_bytes is None else self.parameter_bytes <= self.cache_bytes

    def count(self, status: str) -> int:
        """How many operators have a status."""
        return sum(verdict.status == status for verdict in self.operators)

    def as_json(self) -> dict[str, Any]:
        """The report as plain values; `operators` holds those alone that are not surely mapped,
        `histogram` counts all, by name and version."""
        return {
            "target": self.target,
            "title": self.title,
            "fits": self.fits,
            "bytes": self.size,
            "mapped": self.count(MAPPED),
            "at_risk": self.count(AT_RISK),
            "not_mapped": self.count(NOT_MAPPED),
            "accelerated": self.accelerated,
            "parameter_bytes": self.parameter_bytes,
            "cache_bytes": self.cache_bytes,
            "fits_cache": self.fits_cache,
            "problems": list(self.problems),
            "advice": list(self.advice),
            "histogram": [
                {"op": op, "version": version, "status": status, "count": count}
                for (op, version, status), count in self.histogram().items()
            ],
            "segments": [
                {"place": part.place, "first": part.first, "last": part.last}
                for part in self.segments
            ],
            "operators": [
                {
                    "index": verdict.index,
                    "op": verdict.op,
                    "version": verdict.version,
                    "output": verdict.output,
                    "status": verdict.status,
                    "reasons": list(verdict.reasons),
                    "advice": list(verdict.advice),
                }
                for verdict in self.operators
                if verdict.status != MAPPED
            ],
            "remarks": [{"text": text, "source": source} for text, source in self.remarks],
        }

    def histogram(self) -> dict[tuple[str, int, str], int]:
        """How many operators there are of each name, version and status, most frequent first."""
        counts: dict[tuple[str, int, str], int] = {}
        for verdict in self.operators:
            key = (verdict.op, verdict.version, verdict.status)
            counts[key] = counts.get(key, 0) + 1
        return dict(sorted(counts.items(), key=lambda item: -item[1]))


def check_file(source: str | os.PathLike | bytes, target: str) -> TargetReport:
    """Judges a TFLite file, of whatever origin, by a target.

    Args:
        source: Path, or the bytes of the file.
        target: "generic", "android" or "coral".

    Returns:
        The verdict on each operator and on the whole.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If LiteRT, which holds the file format, is not installed.
        ValueError: If there is no such target, or it is no TFLite file or a damaged one.
    """
    return judge(read_graph(source), get_target(target))


def judge(graph: TFLiteGraph, target: Target) -> TargetReport:
    """Judges a graph by a target; see `check_file`."""
    main = graph.subgraphs[0]
    verdicts = tuple(
        _verdict(index, operator, main, target) for index, operator in enumerate(main.operators)
    )
    problems = tuple(_problems(graph, target))
    segments = _segments(verdicts, target.accelerator)
    mapped = [part for part in segments if part.place != "CPU"]
    if target.needs_all:
        # One piece of the graph alone is compiled, the first.
        accelerated = mapped[0].last - mapped[0].first + 1 if mapped else 0
    else:
        accelerated = sum(part.last - part.first + 1 for part in mapped)
    failed = [verdict for verdict in verdicts if verdict.status == NOT_MAPPED]
    foreign = any(operator.custom for operator in main.operators)
    advice: list[str] = []
    for verdict in verdicts:
        advice.extend(text for text in verdict.advice if text not in advice)
    return TargetReport(
        target=target.name,
        title=target.title,
        size=graph.size,
        operators=verdicts,
        problems=problems,
        segments=segments,
        accelerated=accelerated,
        parameter_bytes=graph.parameter_bytes,
        cache_bytes=target.cache_bytes,
        advice=tuple(advice),
        remarks=tuple((remark.text, remark.source) for remark in target.remarks),
        fits=not problems and not foreign and not (failed and target.needs_all),
    )


def _problems(graph: TFLiteGraph, target: Target) -> list[str]:
    main, found = graph.subgraphs[0], []
    if not main.operators:
        found.append("The file has no operator.")
    if len(graph.subgraphs) > 1 and target.needs_all and target.ops:
        found.append(
            f"The file has {len(graph.subgraphs)} sub-graphs, of which only the first is compiled: "
            "remove control flow (if, while)."
        )
    ends = [("input", i) for i in main.inputs] + [("output", i) for i in main.outputs]
    for role, index in ends:
        tensor = main.tensors[index]
        if target.io_dtypes and tensor.dtype not in target.io_dtypes:
            found.append(
                f"The {role} {tensor.name!r} is {tensor.dtype}: export with uint8 input and output "
                "(--quantization int8 --io-dtype uint8)."
            )
        if target.constant_shapes and (-1 in tensor.shape or tensor.shape[:1] not in ((1,), ())):
            found.append(
                f"The {role} {tensor.name!r} has the shape {list(tensor.shape)}: export with a "
                "batch of 1 and constant sizes."
            )
    return found


def _verdict(index: int, operator: OperatorInfo, graph: SubgraphInfo, target: Target) -> OpVerdict:
    output = graph.tensors[operator.outputs[0]].name if operator.outputs else ""
    found = list(_findings(operator, graph, target))
    status = MAPPED
    if found:
        status = NOT_MAPPED if any(grave for grave, _, _ in found) else AT_RISK
    return OpVerdict(
        index=index,
        op=operator.name,
        version=operator.version,
        output=output,
        status=status,
        reasons=tuple(reason for _, reason, _ in found),
        advice=tuple(advice for _, _, advice in found if advice),
    )


def _findings(operator: OperatorInfo, graph: SubgraphInfo, target: Target):
    """Yields (whether it cannot be mapped, why, what to do)."""
    if operator.custom:
        yield (
            True,
            f"{operator.name} is no operator of TFLite",
            f"Replace the layer that became {operator.name} by layers of TFLite's own operators.",
        )
        return
    if target.constant_shapes:
        open_shapes = [
            tensor.name for tensor in _tensors(operator.outputs, graph) if -1 in tensor.shape
        ]
        if open_shapes:
            yield (
                True,
                f"the shape of {open_shapes[0]!r} is open",
                "Convert with a fixed input shape, batch_shape=(1, height, width, 3).",
            )
    if not target.ops:
        return
    rule = target.ops.get(operator.name)
    if rule is None:
        advice = _replacement(operator.name) if target.needs_all else ""
        yield True, f"{target.accelerator} has no {operator.name}", advice
        return
    yield from _dtype_findings(operator, graph, rule, target)
    if rule.version is not None and operator.version > rule.version:
        yield (
            True,
            f"version {operator.version}, but {rule.version} is the highest that is parsed",
            _older_version(operator.name),
        )
    if target.max_rank is not None:
        for tensor in _tensors((*operator.inputs, *operator.outputs), graph):
            if tensor.constant:  # A kernel's own dimensions do not count.
                continue
            outer = tensor.shape[: max(len(tensor.shape) - target.max_rank, 0)]
            if any(size > 1 for size in outer):
                yield (
                    True,
                    f"{tensor.name!r} of the shape {list(tensor.shape)} exceeds 1 in more than "
                    f"{target.max_rank} dimensions",
                    "Use a batch of 1.",
                )
                break
    for name in rule.rules:
        yield from _RULES[name](operator, graph)


def _dtype_findings(operator: OperatorInfo, graph: SubgraphInfo, rule: OpRule, target: Target):
    allowed = rule.dtypes or target.dtypes
    if not allowed:
        return
    computed = _data_inputs(operator)
    if operator.name in ("QUANTIZE", "DEQUANTIZE") and "float32" in target.dtypes:
        computed = ()
    for tensor in _tensors((*computed, *operator.outputs), graph):
        if tensor.dtype not in allowed:
            yield (
                True,
                f"{tensor.name!r} is {tensor.dtype}, not {' or '.join(allowed)}",
                # Elsewhere on the device it runs all the same.
                _dtype_advice(tensor.dtype) if target.needs_all else "",
            )
            return
    if operator.name in _KERNEL_OPS and len(operator.inputs) > 1:
        kernel = graph.tensors[operator.inputs[1]]
        data = graph.tensors[operator.inputs[0]]
        if kernel.dtype not in allowed or (kernel.is_float != data.is_float):
            yield (
                True,
                f"the kernel {kernel.name!r} is {kernel.dtype} and the data are {data.dtype}",
                "Quantize weights and activations: --quantization int8.",
            )


def _dtype_advice(dtype: str) -> str:
    if dtype in ("int32", "int64"):
        return (
            "Shapes are computed while the file runs: convert with a fixed batch of 1 and pool "
            "with keepdims=True."
        )
    if dtype == "int16":
        return "Quantize activations to 8 bits."
    return "Quantize the whole model: --quantization int8 --io-dtype uint8, no --keep-float."


def _replacement(op: str) -> str:
    if op == "HARD_SWISH":
        return (
            "Export with --target coral, which writes hard swish as a depthwise convolution and a "
            "product, or use relu6 or swish."
        )
    if op == "DEQUANTIZE":
        return "Export with --io-dtype uint8: nothing is converted to float then."
    if op in ("SHAPE", "FILL", "GATHER", "REDUCE_PROD"):
        return _dtype_advice("int32")
    return f"Replace the layer that became {op}."


def _older_version(op: str) -> str:
    if op == "FULLY_CONNECTED":
        return "Use one scale for the kernel: QuantizationConfig(per_channel_head=False)."
    return "Export with --target coral, or convert with an older TensorFlow (2.5)."


def _tensors(indices, graph: SubgraphInfo):
    return [graph.tensors[index] for index in indices if index >= 0]


def _data_inputs(operator: OperatorInfo) -> tuple[int, ...]:
    if operator.name == "TRANSPOSE_CONV":  # Shape, kernel, data.
        return operator.inputs[2:3]
    if operator.name == "SPLIT":  # Axis, data.
        return operator.inputs[1:]
    return operator.inputs[: _PARAMETERS_FROM.get(operator.name)]


def _integers(index: int, graph: SubgraphInfo) -> np.ndarray | None:
    """The values of a constant of integers, or None."""
    tensor = graph.tensors[index]
    if index not in graph.values or tensor.dtype not in ("int32", "int64"):
        return None
    return np.frombuffer(graph.values[index], tensor.dtype)


# Rules: each yields (whether it cannot be mapped, why, what to do).


def _no_fused_activation(operator, graph):
    if operator.options.get("fusedActivationFunction", 0):
        yield True, "it has a fused activation", "Write the activation as a layer of its own."


def _no_dilation(operator, graph):
    if max(_dilation(operator)) > 1:
        yield True, "its kernel is dilated", "Use a dilation rate of 1."


def _equal_dilation(operator, graph):
    if len(set(_dilation(operator))) > 1:
        yield True, "its dilation differs between the axes", "Use the same dilation rate for both."


def _dilation(operator):
    options = operator.options
    return options.get("dilationHFactor", 1), options.get("dilationWFactor", 1)


def _constant_kernel(operator, graph):
    parameters = [index for index in operator.inputs[1:3] if index >= 0]
    if operator.name == "TRANSPOSE_CONV":
        parameters = [index for index in operator.inputs[:2] if index >= 0]
    if any(index not in graph.values for index in parameters):
        yield True, "its kernel or bias is computed", "Use kernels that the file holds."


def _per_tensor_kernel(operator, graph):
    if len(operator.inputs) > 1 and len(graph.tensors[operator.inputs[1]].scale) > 1:
        # Kernels of TensorFlow 2.5 know one scale alone, whatever the version says.
        yield False, "its kernel has a scale for each unit", _older_version("FULLY_CONNECTED")


def _flat_output(operator, graph):
    shape = graph.tensors[operator.outputs[0]].shape if operator.outputs else ()
    if any(size > 1 for size in shape[:-1]):
        yield True, f"its output {list(shape)} is no vector", "Flatten what goes into the layer."


def _spatial_axes(operator, graph):
    if len(operator.inputs) < 2:
        return
    axes, shape = _integers(operator.inputs[1], graph), graph.tensors[operator.inputs[0]].shape
    if axes is None:
        yield True, "its axes are computed", "Pool with keepdims=True and a fixed batch."
    elif len(shape) == 4 and not {int(axis) % 4 for axis in axes} <= {1, 2}:
        yield True, f"it reduces the axes {axes.tolist()}", "Reduce height and width alone."


def _small_mean(operator, graph):
    shape = graph.tensors[operator.inputs[0]].shape
    axes = _integers(operator.inputs[1], graph) if len(operator.inputs) > 1 else None
    if axes is None or len(shape) != 4:
        return
    pixels = int(np.prod([shape[int(axis) % 4] for axis in axes]))
    if pixels > targets.LARGEST_MEAN:
        yield (
            pixels >= targets.SMALLEST_FAILING_MEAN,
            f"it averages {pixels:,} pixels; up to {targets.LARGEST_MEAN:,} are known to map",
            "Export with --target coral, which pools in two steps, or use a smaller input.",
        )


def _spatial_padding(operator, graph):
    if len(operator.inputs) < 2:
        return
    pads, shape = _integers(operator.inputs[1], graph), graph.tensors[operator.inputs[0]].shape
    if pads is None or len(pads) != 2 * len(shape):
        yield True, "its padding is computed", "Use constant padding."
    elif len(shape) == 4 and (pads[:2].any() or pads[6:].any()):
        yield True, "it pads batch or channels", "Pad height and width alone."


def _short_softmax(operator, graph):
    shape = graph.tensors[operator.inputs[0]].shape
    if any(size > 1 for size in shape[:-1]) or shape[-1:] > (targets.LONGEST_SOFTMAX,):
        yield (
            True,
            f"its input {list(shape)} is no vector of up to {targets.LONGEST_SOFTMAX:,} elements",
            "End the model with its logits.",
        )


def _unit_strides(operator, graph):
    strides = _integers(operator.inputs[3], graph) if len(operator.inputs) > 3 else None
    masks = [operator.options.get(name, 0) for name in ("ellipsisMask", "newAxisMask")]
    if strides is None or (strides != 1).any() or any(masks):
        yield True, "its strides are not 1", "Slice in steps of 1."


def _kept_axes(operator, graph):
    if operator.outputs and len(graph.tensors[operator.outputs[0]].shape) != 4:
        yield False, "its output has no four dimensions", ""


def _few_inputs(operator, graph):
    if not 2 <= len(operator.inputs) <= 4:
        yield False, f"it has {len(operator.inputs)} inputs", "Join two to four tensors at a time."


_RULES: dict[str, Callable] = {
    targets.NO_FUSED_ACTIVATION: _no_fused_activation,
    targets.NO_DILATION: _no_dilation,
    targets.EQUAL_DILATION: _equal_dilation,
    targets.CONSTANT_KERNEL: _constant_kernel,
    targets.PER_TENSOR_KERNEL: _per_tensor_kernel,
    targets.FLAT_OUTPUT: _flat_output,
    targets.SPATIAL_AXES: _spatial_axes,
    targets.SMALL_MEAN: _small_mean,
    targets.SPATIAL_PADDING: _spatial_padding,
    targets.SHORT_SOFTMAX: _short_softmax,
    targets.UNIT_STRIDES: _unit_strides,
    targets.KEPT_AXES: _kept_axes,
    targets.FEW_INPUTS: _few_inputs,
}


def _segments(verdicts: tuple[OpVerdict, ...], accelerator: str) -> tuple[Segment, ...]:
    parts: list[Segment] = []
    for verdict in verdicts:
        place = "CPU" if verdict.status == NOT_MAPPED else accelerator
        if parts and parts[-1].place == place:
            parts[-1] = Segment(place, parts[-1].first, verdict.index)
        else:
            parts.append(Segment(place, verdict.index, verdict.index))
    return tuple(parts)
