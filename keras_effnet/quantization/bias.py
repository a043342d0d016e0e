"""Bias correction: rounding leaves the mean of every output channel as it is.

Rounded kernels, rounded and clipped inputs shift the mean of an output channel. The shift is known
from the statistics of the inputs, and the bias takes it back.

Source: Nagel et al., 2019, Data-Free Quantization Through Weight Equalization and Bias Correction,
section 4.2 (https://arxiv.org/abs/1906.04721), with means measured on the calibration data.
"""

import numpy as np

from .calibration import TensorStatistics
from .folding import same_padding
from .graph import Graph, Node, kernel_owner
from .lowering import dequantized_kernel, tensor_params
from .params import fake_quantize
from .scheme import owners


def correct_biases(
    graph: Graph, statistics: dict[str, TensorStatistics], kernels: dict[str, np.ndarray]
) -> None:
    """Moves the biases of a graph so that rounding shifts no mean, in place.

    Args:
        graph: The folded graph with the `params` of its tensors and the "limits" of its kernels;
            kernels may be rounded already.
        statistics: Statistics of the float graph by the name of the node.
        kernels: The float kernels by the name of the node.
    """
    shifts = {}
    for node in graph.kernel_nodes():
        if node.is_float or node.attrs.get("groups", 1) != 1:
            continue
        means = _input_means(graph, node.inputs[0], statistics)
        if means is None:
            continue
        exact, rounded = means
        shift = _output_means(graph, node, kernels[node.name], exact)
        shift -= _output_means(graph, node, dequantized_kernel(node), rounded)
        shifts.setdefault(kernel_owner(node), []).append((node, shift))
    for found in shifts.values():
        # A kernel that is applied to two tensors has one bias: each takes half of what both need.
        shift = np.mean([shift for _, shift in found], axis=0)
        for node, _ in found:
            node.weights["bias"] = (node.weights["bias"] + shift).astype(np.float32)


def _input_means(graph, name, statistics):
    """Returns the mean of each channel of a tensor in float, and rounded; None if unknown."""
    names = owners(graph, name)
    if len(names) != 1 or graph[names[0]].params is None:
        return None
    owner = graph[names[0]]
    if owner.op == "shift":
        # Pixels lose nothing worth correcting; only their mean is needed.
        mean = statistics[owner.inputs[0]].mean + owner.weights["offset"]
        return mean, mean
    found = statistics.get(owner.name)
    if found is None or graph[name].shape[-1] != len(found.mean):
        return None
    params = tensor_params(graph, owner.name)
    rounded = fake_quantize(found.sample, params.min, params.max)
    weights = found.weights / found.weights.sum(dtype=np.float64)
    return found.mean, found.mean + weights @ (rounded - found.sample)


def _output_means(graph: Graph, node: Node, kernel: np.ndarray, means: np.ndarray) -> np.ndarray:
    """Returns the mean of each output channel, without the bias."""
    kernel = kernel.astype(np.float64)
    if node.op == "dense":
        return means @ kernel
    coverage = _coverage(graph[node.inputs[0]].shape, node)
    if node.op == "depthwise":
        return np.einsum("hw,hwc,c->c", coverage, kernel[..., 0], means)
    return np.einsum("hw,hwio,i->o", coverage, kernel, means)


def _coverage(shape: tuple[int, ...], node: Node) -> np.ndarray:
    """Returns the share of places at which each weight of a kernel meets the image, not padding."""
    shares = []
    for axis, kernel in enumerate(node.weights["kernel"].shape[:2]):
        size, places = shape[axis], node.shape[axis]
        stride, step = node.attrs["strides"][axis], node.attrs["dilation"][axis]
        before = 0
        if node.attrs["padding"] == "same":
            before = same_padding(size, kernel, stride, step)[0]
        positions = np.arange(places)[None] * stride + np.arange(kernel)[:, None] * step - before
        shares.append(np.mean((positions >= 0) & (positions < size), axis=1))
    return np.outer(*shares)
