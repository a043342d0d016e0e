"""Splitting: the two sides of a swish as two integer tensors, so that small values keep levels.

A swish is almost zero at most places, never below -0.28, and large where a channel fires, for a few
images alone. One range for all of that leaves its negative lobe but a few steps. All places of an
image that lie in the lobe are then rounded in the same direction, so that the mean over the image,
which is what late layers come to, does not average the error out, and each image has another error,
which no bias takes back. On V2-B0 this is by far the largest part of what integers cost.

So the swish is computed twice from the same tensors, max(swish, 0) and min(swish, 0): to an integer
kernel these are two products whose ranges end at zero, where the arithmetic saturates. Both pass
the gates of squeeze-and-excite, and the projection is applied to both, with one kernel:

    project(swish * gates) = project(max(swish, 0) * gates) + project(min(swish, 0) * gates)

The negative side has finer steps, up to and with the output of its projection (`sides.py`). It
costs a second product, gating and projection, whose kernel the files share, so it is done where
tensors are small (`REDUCTION`).

No source: the idea seems to be new.
"""

import dataclasses

import numpy as np

from .calibration import TensorStatistics
from .graph import Graph, Node, is_projection
from .sides import NEGATIVE, POSITIVE, POSITIVE_SUFFIX, negative_name

# Swishes are split where images have so many times fewer rows and columns than the input. V1-B0,
# rescaled and with reconstructed kernels, gains nothing by more: the noise of its scores is 1.6 %
# of their power with 32, 1.7 % with 16, and 1.8 % with 2.
REDUCTION = 32
# A swish is split if it reaches so many times as far up as down: finer steps hold all of its lobe
# then, and of the means over it, and there are too few without them.
LEAST_REACH = 20


def split_candidates(graph: Graph) -> list[str]:
    """Returns the names of the swishes that can be split and are worth it.

    Those are products of a depthwise convolution and its sigmoid that a 1 x 1 convolution reads,
    with or without squeeze-and-excite between, in the stages of the lowest resolution.
    """
    found = []
    largest = [-(-size // REDUCTION) for size in graph[graph.input].shape[:2]]
    for node in graph:
        depthwise = [name for name in node.inputs if graph[name].op == "depthwise"]
        if (
            node.op == "mul"
            and depthwise
            and all(size <= most for size, most in zip(node.shape, largest, strict=False))
            and any(graph[name].op == "sigmoid" for name in node.inputs)
            and _path(graph, node) is not None
        ):
            found.append(node.name)
    return found


def _path(graph: Graph, swish: Node) -> tuple[Node, Node | None, Node | None] | None:
    """Returns what reads a swish: projection, gating and squeeze; the last two may be missing."""
    product = squeeze = None
    readers = graph.consumers(swish.name)
    for reader in readers:
        if reader.op == "global_avg":
            squeeze = reader
        elif reader.op == "mul" and len(readers) == 2:
            product = reader
    if product is not None and squeeze is not None:
        others = [name for name in product.inputs if name != swish.name]
        if [graph[name].op for name in others] != ["sigmoid"]:
            return None
        readers = graph.consumers(product.name)
    if len(readers) != 1:
        return None
    project = readers[0]
    nodes = [node for node in (swish, project, product, squeeze) if node is not None]
    if not is_projection(project) or any(
        node.is_float or node.name in graph.outputs for node in nodes
    ):
        return None
    return project, product, squeeze


def lobes_are_shallow(statistics: TensorStatistics) -> bool:
    """Whether the negative lobe of a swish is so small beside its reach that a split gains."""
    return float(statistics.high.max()) >= -LEAST_REACH * float(statistics.low.min())


def split_swishes(
    graph: Graph, names: list[str], statistics: dict[str, TensorStatistics] | None = None
) -> None:
    """Splits swishes, in the graph and in its statistics.

    Args:
        graph: The folded graph, changed in place; it still computes the same in float.
        names: Swishes, out of `split_candidates`.
        statistics: Statistics of the float graph, changed in place to those of the new tensors;
            none if nothing is measured.
    """
    for name in names:
        _split(graph, graph[name], statistics or {})


def _split(graph, swish, statistics):
    project, product, squeeze = _path(graph, swish)
    negative = _twin(graph, swish, swish.inputs)
    swish.attrs["part"], negative.attrs["part"] = POSITIVE, NEGATIVE
    measured = swish.name in statistics
    if measured:
        _divide(statistics, swish.name, negative.name)
        lobe = statistics[negative.name].mean
    if squeeze is not None:
        below = _twin(graph, squeeze, [negative.name])
        total = _sum(graph, squeeze, below, graph.unique(squeeze.name + "_sum"))
        if measured:
            whole = statistics[total.name] = statistics[squeeze.name]
            # The mean of the lobe hardly differs from image to image.
            statistics[squeeze.name] = _mapped(whole, lambda rows: np.maximum(rows - lobe, 0))
            statistics[below.name] = _mapped(whole, lambda rows: np.broadcast_to(lobe, rows.shape))
        gates = [name for name in product.inputs if name != swish.name]
        read = _twin(graph, product, [negative.name, *gates])
        if measured:
            _divide(statistics, product.name, read.name)
    else:
        read = negative
    source = project.inputs[0]
    name = project.name
    graph.rename(name, graph.unique(name + POSITIVE_SUFFIX))
    project.weights["bias"] = project.weights["bias"] / 2
    below = _twin(graph, project, [read.name])
    below.attrs["kernel_of"] = project.name
    _sum(graph, project, below, name)
    if measured:
        for node, rows in ((project, statistics[source]), (below, statistics[read.name])):
            kernel, bias = node.weights["kernel"][0, 0], node.weights["bias"]
            statistics[node.name] = _mapped(rows, lambda x, k=kernel, b=bias: x @ k + b)


def _twin(graph: Graph, node: Node, inputs: list[str]) -> Node:
    """Adds the negative side of a node behind it, and returns it."""
    name = graph.unique(negative_name(node.name))
    weights = {key: value.copy() for key, value in node.weights.items()}
    twin = dataclasses.replace(
        node, name=name, inputs=list(inputs), attrs=dict(node.attrs), weights=weights
    )
    behind = [node.name, *inputs]
    return graph.add(twin, after=max(behind, key=list(graph.nodes).index))


def _sum(graph: Graph, first: Node, second: Node, name: str) -> Node:
    """Adds the sum of both sides, which all readers of the first one read from now on."""
    total = Node(name, "add", [first.name, second.name], first.shape, first.layer)
    graph.add(total, after=second.name)
    graph.redirect(first.name, name, but=(name,))
    return total


def _divide(statistics, positive, negative):
    whole = statistics[positive]
    statistics[positive] = _mapped(whole, lambda rows: np.maximum(rows, 0))
    statistics[negative] = _mapped(whole, lambda rows: np.minimum(rows, 0))


def _mapped(whole: TensorStatistics, function) -> TensorStatistics:
    """Returns the statistics of a function of each row, as far as the sample tells them."""
    rows = function(whole.sample).astype(np.float32)
    low, high = rows.min(axis=0), rows.max(axis=0)
    return TensorStatistics(
        low,
        high,
        np.average(rows, axis=0, weights=whole.weights),
        [float(low.min())] * len(whole.batch_low),
        [float(high.max())] * len(whole.batch_high),
        rows,
        whole.weights,
        whole.images,
    )
