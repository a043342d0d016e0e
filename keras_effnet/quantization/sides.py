"""The two sides of what was split (`splitting.py`), as every later step sees them.

The sides are told from the structure of a graph, so that one that was read back from a Keras model
has them too: the positive and the negative part of one product, and whatever is computed from both
of them in the same way, up to their sum.

Every negative side has steps `FINER` times as fine as the positive one. So both have the same
ratios of scales, and rounding has no ties on the one where it has none on the other (`ties.py`).
"""

from .graph import Graph, Node
from .params import INT8_MAX, INT8_MIN, QuantParams

# Steps of a negative side in one step of the positive one.
FINER = 5
# Values of a node's "part".
POSITIVE, NEGATIVE = 1, -1
POSITIVE_SUFFIX, NEGATIVE_SUFFIX = "_positive", "_negative"


def negative_name(positive: str) -> str:
    """Returns the name of the negative side of a node."""
    return positive.removesuffix(POSITIVE_SUFFIX) + NEGATIVE_SUFFIX


def is_negative_side(graph: Graph, node: Node) -> bool:
    """Whether a node reads the negative part of a product, directly or through gates."""
    parts = [graph[name] for name in node.inputs]
    parts += [graph[name] for part in parts if part.op == "mul" for name in part.inputs]
    return any(part.attrs.get("part") == NEGATIVE for part in parts)


def sides(graph: Graph) -> dict[str, str]:
    """Returns the negative sides of a graph and the positive side of each, by name."""
    parts: dict[int, dict[frozenset, str]] = {POSITIVE: {}, NEGATIVE: {}}
    for node in graph:
        if "part" in node.attrs:
            parts[node.attrs["part"]][frozenset(node.inputs)] = node.name
    pairs = {name: parts[POSITIVE][inputs] for inputs, name in parts[NEGATIVE].items()}
    pending = list(pairs.items())
    while pending:
        negative, positive = pending.pop()
        for reader in graph.consumers(negative):
            for other in graph.consumers(positive):
                rest = [name for name in reader.inputs if name != negative]
                same = rest == [name for name in other.inputs if name != positive]
                if reader.op == other.op and reader is not other and same:
                    pairs[reader.name] = other.name
                    pending.append((reader.name, other.name))
    return pairs


def bind_ranges(graph: Graph) -> None:
    """Gives the sides of what was split the scales that they must have, in place.

    Args:
        graph: The graph; all tensors have `params` of their own. Where the negative side needs a
            larger scale than it may have, that of the positive side grows.
    """
    for negative, positive in sides(graph).items():
        below, above = graph[negative], graph[positive]
        scale = max(above.params.scale, FINER * below.params.scale)
        for node, step, end in ((above, scale, INT8_MIN), (below, scale / FINER, INT8_MAX)):
            # Only kernels mix signs; their outputs reach to both sides of 0.
            zero_point = _centred(node.params, step) if node.op == "conv" else end
            node.params = QuantParams(step, zero_point)


def _centred(params: QuantParams, scale: float) -> int:
    """Returns the zero point with which a range of a larger scale has the middle of a range."""
    zero_point = -round((params.min + params.max) / 2 / scale + 0.5)
    return min(max(zero_point, INT8_MIN), INT8_MAX)


def side_params(positive: QuantParams, negative: QuantParams) -> QuantParams:
    """Returns the parameters of a negative side for those of the positive one."""
    return QuantParams(positive.scale / FINER, negative.zero_point)
