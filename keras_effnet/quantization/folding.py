"""Exact rewrites of a float graph into the one that integers compute.

`fold` applies them in order. None changes what the graph computes, apart from half a pixel step at
the border of an image whose normalization is folded (see `fold_input_normalization`).
"""

import numpy as np

from .graph import Graph, Node

# Where the means of the channels differ by more, the range of a shifted image grows too much.
MAX_SHIFT_SPREAD = 64


def fold(graph: Graph) -> Graph:
    """Folds and splits the nodes of `graph`, in place, and returns it.

    Afterwards there are no batch norms and no normalization, no swish, no zero padding that a
    convolution could do itself, and ReLU and ReLU6 stand inside the layer that they follow.
    """
    compose_affines(graph)
    fold_padding(graph)
    fold_affine_into_producer(graph)
    fold_input_normalization(graph)
    affine_to_depthwise(graph)
    keep_dimensions_in_pooling(graph)
    split_swish(graph)
    fuse_relu(graph)
    return graph


def compose_affines(graph: Graph) -> None:
    """Turns chains of per-channel x * scale + offset into one."""
    for node in graph:
        producer = graph[node.inputs[0]] if node.inputs else None
        if node.op != "affine" or producer.op != "affine":
            continue
        if graph.only_consumer(producer.name) is not node:
            continue
        scale, offset = node.weights["scale"], node.weights["offset"]
        # The moments of a batch norm's output are those of the last of the chain.
        node.weights["offset"] = producer.weights["offset"] * scale + offset
        node.weights["scale"] = producer.weights["scale"] * scale
        node.is_float |= producer.is_float
        graph.bypass(producer.name)


def same_padding(size: int, kernel: int, stride: int, dilation: int) -> tuple[int, int]:
    """Returns what "same" pads before and after one dimension."""
    outputs = -(-size // stride)
    total = max((outputs - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
    return total // 2, total - total // 2


def fold_padding(graph: Graph) -> None:
    """Lets a convolution pad by itself where explicit zero padding equals its "same" padding."""
    for node in graph:
        if node.op not in ("conv", "depthwise") or node.attrs["padding"] != "valid":
            continue
        pad = graph[node.inputs[0]]
        if pad.op != "pad" or graph.only_consumer(pad.name) is not node:
            continue
        source = graph[pad.inputs[0]]
        same = tuple(
            same_padding(size, kernel, stride, dilation)
            for size, kernel, stride, dilation in zip(
                source.shape[:2],
                node.weights["kernel"].shape[:2],
                node.attrs["strides"],
                node.attrs["dilation"],
                strict=True,
            )
        )
        if pad.attrs["padding"] == same:
            node.attrs["padding"] = "same"
            graph.bypass(pad.name)


def fold_affine_into_producer(graph: Graph) -> None:
    """Folds batch norms (and any x * scale + offset) into the layer whose output they read."""
    for node in graph:
        if node.op != "affine":
            continue
        layer = graph[node.inputs[0]]
        if layer.op not in ("conv", "depthwise", "dense"):
            continue
        if graph.only_consumer(layer.name) is not node:
            continue
        scale = node.weights["scale"].astype(np.float64)
        kernel = layer.weights["kernel"].astype(np.float64)
        if layer.op == "depthwise":
            kernel = kernel * scale.reshape(kernel.shape[2:])
        else:
            kernel = kernel * scale
        layer.weights["kernel"] = kernel.astype(np.float32)
        bias = layer.weights["bias"] * scale + node.weights["offset"]
        layer.weights["bias"] = bias.astype(np.float32)
        for key in ("mean", "deviation"):
            layer.weights.pop(key, None)
            if key in node.weights:
                layer.weights[key] = node.weights[key].astype(np.float32)
        # To keep a batch norm in float is to keep the layer that it becomes a part of.
        layer.is_float |= node.is_float
        graph.bypass(node.name)


def fold_input_normalization(graph: Graph) -> None:
    """Folds the normalization of the image into the convolution that reads it.

    conv(x * scale + offset) is conv'(x) with the kernel times `scale` and a new bias, except where
    the convolution pads: it pads the normalized image with 0, which stands for the pixel value
    -offset / scale, the mean of the channel. An integer kernel pads with one value for all
    channels, the zero of its input. So the image is shifted first, each channel by its mean: the
    zero of the shifted image is the mean of each channel, to half a pixel step. One kernel of a
    convolution that does not pad takes it all.
    """
    for node in graph:
        if node.op != "affine":
            continue
        layer = graph.only_consumer(node.name)
        if layer is None or layer.op not in ("conv", "depthwise", "dense"):
            continue
        if layer.attrs.get("groups", 1) != 1:
            continue
        if node.is_float and not layer.is_float:
            continue
        scale = node.weights["scale"].astype(np.float64)
        offset = node.weights["offset"].astype(np.float64)
        if np.any(scale == 0):
            continue
        shift = np.zeros_like(scale)
        if layer.op != "dense" and layer.attrs["padding"] == "same":
            shift = np.round(offset / scale)
        if np.ptp(shift) > MAX_SHIFT_SPREAD:
            continue  # It stays a layer of its own.
        kernel = layer.weights["kernel"].astype(np.float64)
        remainder = offset - shift * scale
        if layer.op == "depthwise":
            bias = np.sum(kernel * remainder[:, None], axis=(0, 1)).reshape(-1)
        elif layer.op == "conv":
            bias = np.einsum("hwio,i->o", kernel, remainder)
        else:
            bias = remainder @ kernel
        layer.weights["kernel"] = (kernel * scale[:, None]).astype(np.float32)
        layer.weights["bias"] = (layer.weights["bias"] + bias).astype(np.float32)
        if shift.any():
            node.op, node.weights = "shift", {"offset": shift.astype(np.float32)}
            node.is_float = False  # Integers are exact.
        else:
            graph.bypass(node.name)


def affine_to_depthwise(graph: Graph) -> None:
    """Turns the x * scale + offset that nothing absorbed into a 1x1 depthwise convolution."""
    for node in graph:
        if node.op != "affine":
            continue
        if len(node.shape) != 3:
            raise ValueError(
                f"The normalization {node.layer!r} acts on a tensor of shape {node.shape} and no "
                "layer with a kernel stands before it, so it cannot be folded. Name it in "
                "`keep_float`, or move it."
            )
        node.op = "depthwise"
        node.attrs = {
            "strides": (1, 1),
            "padding": "valid",
            "dilation": (1, 1),
            "activation": "linear",
        }
        scale = node.weights["scale"].reshape(1, 1, -1, 1)
        node.weights = {"kernel": scale, "bias": node.weights["offset"]}


def keep_dimensions_in_pooling(graph: Graph) -> None:
    """Turns global pooling and a reshape to (1, 1, channels) into pooling that keeps dimensions."""
    for node in graph:
        if node.op != "reshape":
            continue
        pool = graph[node.inputs[0]]
        if pool.op not in ("global_avg", "global_max") or len(node.shape) != 3:
            continue
        if node.shape[:2] != (1, 1) or graph.only_consumer(pool.name) is not node:
            continue
        pool.attrs["keepdims"], pool.shape = True, node.shape
        graph.bypass(node.name)


def split_swish(graph: Graph) -> None:
    """Turns swish(x) into x * sigmoid(x): LOGISTIC and MUL of the integer kernels."""
    for node in graph:
        if node.op != "swish":
            continue
        source = node.inputs[0]
        gate = Node(
            graph.unique(f"{node.name}_sigmoid"),
            "sigmoid",
            [source],
            node.shape,
            node.layer,
            is_float=node.is_float,
        )
        graph.add(gate, after=source)
        node.op, node.inputs = "mul", [source, gate.name]


def fuse_relu(graph: Graph) -> None:
    """Moves ReLU and ReLU6 into the layer with a kernel that they follow."""
    for node in graph:
        if node.op not in ("relu", "relu6"):
            continue
        producer = graph[node.inputs[0]]
        if producer.op not in ("conv", "depthwise", "dense"):
            continue
        if graph.only_consumer(producer.name) is not node:
            continue
        if producer.attrs.get("activation", "linear") != "linear":
            continue
        if node.is_float and not producer.is_float:
            continue
        producer.attrs["activation"] = node.op
        graph.bypass(node.name)
