"""The quantization scheme as data: how each operation's output is quantized.

Source: TFLite 8-bit quantization specification
(https://ai.google.dev/edge/litert/models/quantization_spec).
"""

import numpy as np

from .graph import Graph, Node
from .params import INT8_MAX, INT8_MIN, PIXELS, UNIT_INTERVAL, QuantParams

# The inputs and the output of a sum are multiples of a common step, this part of an input's scale:
# see `ties.py`.
SUM_STEPS = 256

# The output has a range of its own, found by calibration.
OWN = "own"
# The output has the parameters of the input: the operation only moves or compares values.
SAME = "same"
# The output has parameters that the specification fixes.
FIXED = "fixed"

OUTPUT_RULES = {
    "input": OWN,
    "shift": FIXED,
    "conv": OWN,
    "depthwise": OWN,
    "dense": OWN,
    "scale": OWN,
    "add": OWN,
    "mul": OWN,
    "relu": OWN,
    "relu6": OWN,
    "hard_swish": OWN,
    "global_avg": OWN,
    "sigmoid": FIXED,
    "softmax": FIXED,
    "concat": SAME,
    "pad": SAME,
    "reshape": SAME,
    "max_pool": SAME,
    "avg_pool": SAME,
    "global_max": SAME,
    "dropout": SAME,
    "layer": OWN,
}


def owners(graph: Graph, name: str) -> list[str]:
    """Returns the nodes whose ranges are the range of the tensor `name`.

    That is the node itself, unless it only passes its inputs on, as integers.
    """
    node = graph[name]
    if OUTPUT_RULES[node.op] != SAME or node.is_float:
        return [name]
    found = []
    for source in node.inputs:
        found.extend(owner for owner in owners(graph, source) if owner not in found)
    return found


def shared_ranges(graph: Graph) -> list[list[str]]:
    """Returns groups of nodes that must have one range, each node in exactly one group.

    A concatenation needs one range for all its inputs, since integer kernels only copy them.

    Raises:
        ValueError: If a concatenation joins tensors with fixed ranges and others.
    """
    group = {
        node.name: [node.name] for node in graph if OUTPUT_RULES[node.op] != SAME or node.is_float
    }
    for node in graph:
        if node.op != "concat" or node.is_float:
            continue
        members = []
        for owner in owners(graph, node.name):
            members.extend(name for name in group[owner] if name not in members)
        if len(members) > 1 and any(OUTPUT_RULES[graph[name].op] == FIXED for name in members):
            raise ValueError(
                f"Concatenate {node.layer!r} joins a tensor with a fixed range (logistic or "
                "softmax output) and others; name it in `keep_float`. "
                f"Received: {members}"
            )
        for name in members:
            group[name] = members
    unique = {id(members): members for members in group.values()}
    return list(unique.values())


def needs_range(graph: Graph, node: Node) -> bool:
    """Whether the output of a node passes through a `FakeQuant` layer."""
    if OUTPUT_RULES[node.op] == SAME and not node.is_float:
        return False
    if not node.is_float or node.name in graph.outputs:
        return True
    return any(not reader.is_float for reader in readers(graph, node.name))


def readers(graph: Graph, name: str) -> list[Node]:
    """Returns the nodes that read a tensor, also through operations that only pass it on."""
    found = []
    for node in graph.consumers(name):
        if OUTPUT_RULES[node.op] == SAME and not node.is_float:
            found.extend(readers(graph, node.name))
        found.append(node)
    return found


def fixed_params(graph: Graph, node: Node) -> QuantParams:
    """Returns the parameters that the specification, or the arithmetic, fixes for a node."""
    if node.op in ("sigmoid", "softmax"):
        return UNIT_INTERVAL
    source = graph[node.inputs[0]].params or PIXELS
    offset = node.weights["offset"]
    spread = float(np.ptp(offset))
    if not spread:  # The integers stay as they are; only the zero point moves.
        return QuantParams(source.scale, source.zero_point - int(offset[0]))
    # The steps grow until all channels find room, to a multiple that leaves no ties (`ties.py`).
    steps = INT8_MAX - INT8_MIN
    ratio = odd_above(SUM_STEPS * (steps * source.scale + spread) / (steps * source.scale))
    scale = source.scale * ratio / SUM_STEPS
    low = source.min + float(offset.min())
    return QuantParams(scale, INT8_MIN - int(np.floor(low / scale + 0.5)))


def odd_above(value: float) -> int:
    """Returns the smallest odd integer that is not less than a number."""
    return 2 * int(np.ceil((value - 1) / 2)) + 1


def expects_pixels(graph: Graph) -> bool:
    """Whether a graph that was not folded yet begins by scaling pixels in 0..255 down."""
    for node in graph.consumers(graph.input):
        if node.op == "affine" and float(abs(node.weights["scale"]).max()) < 0.05:
            return True
    return False
