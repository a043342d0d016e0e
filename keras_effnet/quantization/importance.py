"""How much the rounding error of each channel of a tensor matters to what reads it.

Measured by the energy (sum of squares) of the kernels that read the channel: an error is amplified
by them. A depthwise convolution passes it on to the readers of the same channel, whose kernels
amplify it again. On networks whose channels have very different gains this decides the range of a
tensor far better than the plain squared error does.
"""

import numpy as np

from .graph import Graph
from .ranges import Consumer

# A squeeze-and-excite gate is about one half, so it passes a quarter of an error's energy.
GATE_ENERGY = 0.25
# Operations whose output has the channels of the input, with errors of about the same size.
PASSING = (
    "add",
    "dropout",
    "pad",
    "max_pool",
    "avg_pool",
    "reshape",
    "relu",
    "relu6",
    "hard_swish",
)


def consumer_of(graph: Graph, name: str) -> Consumer:
    """Returns what reads a tensor: the function, and the importance of each channel."""
    channels = graph[name].shape[-1]
    slope = np.ones(channels)
    function, target = "identity", name
    for reader in graph.consumers(name):
        if reader.op == "sigmoid":
            products = [other for other in graph.consumers(reader.name) if other.op == "mul"]
            swish = [other for other in products if name in other.inputs]
            function = "swish" if swish else "sigmoid"
            target = swish[0].name if swish else reader.name
        elif reader.op in ("hard_swish", "softmax"):
            function, target = reader.op, reader.name
        elif reader.op == "scale":
            gate = graph.consumers(reader.name)[0]
            product = graph.consumers(gate.name)[0]
            # The tensor itself times the sigmoid of its scaled self.
            return Consumer("swish", _importance(graph, product.name), reader.weights["factors"])
    if graph[name].op == "scale":
        gate = graph.consumers(name)[0]
        product = graph.consumers(gate.name)[0]
        factors = graph[name].weights["factors"].astype(np.float64)
        # swish(z) / s: the error after the product, in the units of its readers.
        importance = _importance(graph, product.name) / factors**2
        return Consumer("gate", importance, slope)
    return Consumer(function, _importance(graph, target), slope)


def _importance(graph: Graph, name: str) -> np.ndarray:
    """Returns the weight of the squared error of each channel: the energy of what reads it."""
    total = energy(graph, name)
    if not total.any():
        return np.ones(graph[name].shape[-1])
    return total / total.mean()


def energy(graph: Graph, name: str) -> np.ndarray:
    """Returns the energy with which each channel of a tensor reaches the kernels that read it."""
    channels = graph[name].shape[-1]
    total = np.zeros(channels)
    for reader in graph.consumers(name):
        if reader.op in ("conv", "dense"):
            kernel = reader.weights["kernel"].astype(np.float64)
            if reader.op == "conv" and reader.attrs["groups"] != 1:
                total += np.mean(kernel**2)
            else:
                axis = 1 if reader.op == "dense" else (0, 1, 3)
                total += np.sum(kernel**2, axis=axis)
        elif reader.op == "depthwise":
            # A channel stays itself, so what reads it behind decides as well.
            own = np.sum(reader.weights["kernel"].astype(np.float64) ** 2, axis=(0, 1, 3))
            behind = energy(graph, reader.name)
            total += own * behind if behind.any() else own
        elif reader.op == "mul" and reader.shape == graph[name].shape:
            total += GATE_ENERGY * energy(graph, reader.name)
        elif reader.op in PASSING:
            if reader.shape[-1] == channels:
                total += energy(graph, reader.name)
    # The mean over an image averages errors out, so global pooling counts only where nothing
    # else reads the tensor.
    if not total.any():
        for reader in graph.consumers(name):
            if reader.op in ("global_avg", "global_max"):
                total += energy(graph, reader.name)
    return total
