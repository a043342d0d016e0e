"""Tensors that a float graph and the quantized one have in common, and where the latter has them.

Equalization and rescaling give the tensors around a swish other units in the quantized graph, and
splitting gives a projection two sides. What lies between the blocks is the same in both.
"""

import keras

from .build import RANGE_SUFFIX
from .graph import Graph
from .training import layers_of

_MAY_BE_EQUALIZED = ("sigmoid", "scale", "mul", "hard_swish")


def boundaries(teacher: Graph, student: Graph) -> list[str]:
    """Returns the tensors between blocks that both graphs have, in the same units.

    Everything behind such a tensor depends on it alone. Products and the inputs of activations are
    left out, since their channels may be equalized.
    """
    place = {node.name: number for number, node in enumerate(teacher)}
    found, furthest = [], 0
    for node in teacher:
        readers = teacher.consumers(node.name)
        alone = furthest <= place[node.name]
        furthest = max([furthest, *(place[reader.name] for reader in readers)])
        twin = student.nodes.get(node.name)
        if (
            alone
            and node.op in ("add", "conv")
            and twin is not None
            and twin.op == node.op
            and keeps_units(teacher, node.name)
        ):
            found.append(node.name)
    return found


def keeps_units(teacher: Graph, name: str) -> bool:
    """Whether a tensor of the float graph has the same units in the quantized one."""
    readers = teacher.consumers(name)
    return bool(readers) and not any(reader.op in _MAY_BE_EQUALIZED for reader in readers)


def quantized_tensor(model: keras.Model, name: str):
    """Returns the Keras tensor of a node in a quantized model, behind its range."""
    names = [layer.name for layer in layers_of(model)]
    ranged = name + RANGE_SUFFIX
    return model.get_layer(ranged if ranged in names else name).output
