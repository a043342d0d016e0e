"""Scales without ties, so that runtimes compute the same integers.

An integer kernel turns an accumulator `acc` into an output step by rounding `acc * multiplier`.
Runtimes compute that product differently: in float32, in fixed point of 31 or of 20 bits, rounding
halves up or to even; and a fake-quant model computes it from real numbers. They agree except where
the product lies so near a half that the rounding errors decide. One such element in ten thousand
is enough: each changes many of the next layer's, and after some blocks the runtimes differ in
every third integer (measured on B0), and in the predicted class of one photograph in forty.

So the scales are chosen such that it never lies near a half: with a multiplier of 1 / R, R an odd
integer, `acc / R` is never nearer than 1 / (2 R) to one. The price is a kernel scale that is
larger by 1 / R at most, with R in the hundreds. Activations whose scale does not depend on a kernel
move by as little. After that the Keras model, LiteRT (with its default XNNPACK kernels) and
onnxruntime agree bit for bit. The reference kernels of TFLite round twice, first in fixed point of
31 bits, which no choice of scales makes up for: they differ by single steps.

No source: the idea seems to be new. The arithmetic of the kernels is that of the TFLite 8-bit
specification (https://ai.google.dev/edge/litert/models/quantization_spec).
"""

import numpy as np

from .graph import Graph, Node, kernel_owner
from .lowering import integer_factors, tensor_params
from .params import INT8_MIN, KERNEL_MAX, UNIT_INTERVAL, QuantParams, kernel_scales
from .scheme import OUTPUT_RULES, OWN, SAME, SUM_STEPS
from .sides import FINER, is_negative_side, side_params, sides

# Larger ratios leave less room than float32 sums need; a kernel channel is then far finer than
# the output's step, so that coarser steps cost nothing.
MAX_RATIO = 4095
# Table operators (LOGISTIC, HARD_SWISH) must stay so far, in output steps, from a half. Single
# precision errs by some 1e-5 steps.
TABLE_MARGIN = 2e-4
# Relative changes of a scale that are tried until a table has no entry near a half.
TABLE_TRIALS = 1 + 1e-3 * np.arange(64)
# Relative error of a few float32 operations: scales this near are the same.
ROUNDING = 1e-6
# The same of what was chosen once and is chosen again, from ranges in float32: it then stays as it
# is, bit for bit.
_AGAIN = 5e-7


def odd(value: float) -> int:
    """Returns the odd integer nearest to a positive number, at least 1."""
    return max(1, 2 * round((value - 1) / 2) + 1)


def odd_below(values: np.ndarray) -> np.ndarray:
    """Returns the largest odd integers that do not exceed positive numbers, at least 1.

    Numbers within float32's rounding of an odd integer count as it, so that scales that were
    chosen by this function once are chosen again.
    """
    values = np.asarray(values, np.float64) * (1 + ROUNDING)
    return np.maximum(1, 2 * np.floor((values - 1) / 2) + 1)


def remove_ties(graph: Graph, groups: list[list[str]]) -> None:
    """Moves the scales of a graph a little, in place, so that no rounding is near a tie.

    Zero points stay, so a range grows or shrinks with its scale.

    Args:
        graph: The folded graph; all tensors have `params`, all kernels "limits".
        groups: Nodes that must share one range, as `scheme.shared_ranges` returns them; those of
            groups of several keep their scales.
    """
    fixed = {name for group in groups if len(group) > 1 for name in group}
    pairs = sides(graph)
    negative_sides = {positive: graph[negative] for negative, positive in pairs.items()}
    for node in graph:
        unscaled = any(_scale(graph, name) is None for name in node.inputs)
        if node.is_float or node.name in fixed or unscaled:
            continue
        if OUTPUT_RULES[node.op] == OWN and node.params is not None and node.name not in pairs:
            _ALIGN.get(node.op, _leave)(graph, node, fixed)
            if node.name in negative_sides:
                negative = negative_sides[node.name]
                negative.params = side_params(node.params, negative.params)
    for node in graph.kernel_nodes():
        if not node.is_float and node.name not in pairs:
            _align_kernel(graph, node)
            if node.name in negative_sides:
                negative_sides[node.name].weights["limits"] = node.weights["limits"]


def _scale(graph: Graph, name: str) -> float | None:
    params = tensor_params(graph, name)
    return None if params is None else params.scale


def _set(node: Node, scale: float) -> None:
    if abs(scale - node.params.scale) <= _AGAIN * scale:
        return
    node.params = QuantParams(scale, node.params.zero_point)


def _leave(graph, node, fixed):
    """Scales that no rounding depends on (inputs), or that no rule is known for."""


def _free(graph, node, fixed):
    """A layer with a kernel may have any scale: the kernel's follow. Only tables limit it."""
    scale = node.params.scale
    for factor in TABLE_TRIALS:
        _set(node, scale * factor)
        if _tables_are_clear(graph, node):
            return


def _product(graph, node, fixed):
    first, second = (_scale(graph, name) for name in node.inputs)
    # The negative side of a product that was split is computed from the same tensors, in finer
    # steps.
    _set_ratio(graph, node, first * second * (FINER if "part" in node.attrs else 1))


def _channel_scale(graph, node, fixed):
    _set_ratio(graph, node, _scale(graph, node.inputs[0]) * integer_factors(node)[1].scale)


def _mean(graph, node, fixed):
    source = graph[node.inputs[0]]
    _set_ratio(graph, node, _scale(graph, source.name) / np.prod(source.shape[:2]))


def _set_ratio(graph, node, step):
    """Makes the scale of a node an odd multiple of the step of its accumulator."""
    ratio = odd(node.params.scale / step)
    for change in range(0, 2 * len(TABLE_TRIALS), 2):
        _set(node, step * (ratio + change))
        if _tables_are_clear(graph, node):
            return


def _sum(graph, node, fixed):
    """Makes the scales of a sum p : SUM_STEPS : R with integers p and R, R odd."""
    if _adds_sides(graph, node):
        step = _scale(graph, node.inputs[1]) / SUM_STEPS
        _set(node, step * odd(node.params.scale / step))
        return
    for name, other in (node.inputs, node.inputs[::-1]):
        chain = _movable(graph, name, node, fixed)
        if chain is None:
            continue
        step = _scale(graph, other) / SUM_STEPS
        wanted = max(1, round(_scale(graph, name) / step))
        before = [part.params.scale for part in chain]
        for number in range(len(TABLE_TRIALS)):
            # wanted, wanted + 1, wanted - 1, ...
            multiple = wanted + (-(number // 2) if number % 2 == 0 else number // 2 + 1)
            if multiple < 1:
                continue
            factor = multiple * step / _scale(graph, name)
            for part in chain:
                _set(part, part.params.scale * factor)
            if all(_tables_are_clear(graph, part) for part in chain):
                break
        else:
            for part, scale in zip(chain, before, strict=True):
                _set(part, scale)
            continue
        _set(node, step * odd(node.params.scale / step))
        return


def _adds_sides(graph: Graph, node: Node) -> bool:
    """Whether a node adds the positive and the negative side of a tensor (`sides.py`)."""
    return is_negative_side(graph, graph[node.inputs[1]])


def _movable(graph: Graph, name: str, reader: Node, fixed: set[str]) -> list[Node] | None:
    """Returns the nodes whose scales can be moved together with that of a tensor.

    Those are a layer with a kernel that only `reader` reads, or such a layer with its swish, or
    with its other side and their sum.
    """
    node = graph[name]
    while OUTPUT_RULES[node.op] == SAME and not node.is_float:  # Dropout.
        if len(node.inputs) != 1 or graph.only_consumer(node.name) is None:
            return None
        node = graph[node.inputs[0]]
    if node.name in fixed or graph.only_consumer(node.name) is None:
        return None
    if node.op in ("conv", "depthwise", "dense"):
        return [node]
    if node.op == "add" and not node.is_float and _adds_sides(graph, node):
        return [node, *(graph[side] for side in node.inputs)]
    if node.op != "mul" or node.is_float:
        return None
    gates = [graph[source] for source in node.inputs if graph[source].op == "sigmoid"]
    if len(gates) != 1 or graph.only_consumer(gates[0].name) is not node:
        return None
    chain, source = [node], graph[gates[0].inputs[0]]
    if source.op == "scale":
        chain.append(source)
        source = graph[source.inputs[0]]
    chain.append(source)
    inside = {gates[0].name, *(part.name for part in chain)}
    alone = all(
        consumer.name in inside for part in chain[1:] for consumer in graph.consumers(part.name)
    )
    if source.op not in ("conv", "depthwise", "dense") or source.name in fixed or not alone:
        return None
    return chain


def _tables_are_clear(graph: Graph, node: Node) -> bool:
    """Whether no entry of the tables that read a tensor lies near a half."""
    integers = np.arange(256) + INT8_MIN - node.params.zero_point
    values = integers * np.float64(node.params.scale)
    for reader in graph.consumers(node.name):
        if reader.op == "sigmoid":
            steps = 1 / (1 + np.exp(-values)) / UNIT_INTERVAL.scale
        elif reader.op == "hard_swish" and reader.params is not None:
            steps = values * np.clip(values + 3, 0, 6) / 6 / reader.params.scale
        else:
            continue
        if np.min(np.abs(steps - np.floor(steps) - 0.5)) < TABLE_MARGIN:
            return False
    return True


def _hard_swish(graph, node, fixed):
    scale, source = node.params.scale, graph[node.inputs[0]]
    for factor in TABLE_TRIALS:
        _set(node, scale * factor)
        if source.params is None or _tables_are_clear(graph, source):
            return


def _align_kernel(graph: Graph, node: Node) -> None:
    source, target = _scale(graph, node.inputs[0]), _scale(graph, node.name)
    if source is None or target is None:
        return
    natural = kernel_scales(node.weights["limits"]).astype(np.float64)
    ratios = odd_below(np.minimum(target / (source * natural), MAX_RATIO))
    scales = target / (source * ratios)
    # Where one output step is less than the accumulator's, only a finer output step would help.
    helps = scales > natural * (1 - 2 * ROUNDING)
    # A channel that has its scale already keeps it to the last bit.
    moved = helps & (np.abs(scales - natural) > _AGAIN * natural)
    limits = np.where(moved, scales * KERNEL_MAX, node.weights["limits"])
    node.weights["limits"] = limits.astype(np.float32)


def round_biases(graph: Graph, again: bool = False) -> None:
    """Rounds the biases of a graph to the steps of their accumulators, in place.

    They are integers of these steps in a file; without this the Keras model would keep more.

    Args:
        graph: The graph, with scales and limits that stay.
        again: Whether they may be rounded already; those then keep every bit.
    """
    for node in graph.kernel_nodes():
        source = None if node.is_float else _scale(graph, node.inputs[0])
        if source is None or kernel_owner(node) != node.name:
            continue
        steps = np.float64(np.float32(source)) * kernel_scales(node.weights["limits"])
        given = node.weights["bias"].astype(np.float64)
        bias = np.round(given / steps) * steps
        if again:
            bias = np.where(np.abs(bias - given) <= _AGAIN * np.abs(given), given, bias)
        # Where a kernel is applied to both sides, the steps of the positive one are the coarser.
        for other in graph.applications(node.name):
            other.weights["bias"] = bias.astype(np.float32)


_ALIGN = {
    "conv": _free,
    "depthwise": _free,
    "dense": _free,
    "mul": _product,
    "scale": _channel_scale,
    "global_avg": _mean,
    "add": _sum,
    "hard_swish": _hard_swish,
}
