"""A Functional model as a flat list of nodes that can be rewritten.

Reading a model turns it into `Node`s in topological order: nested models are inlined, constants
are NumPy arrays, Dropout stays (it is the identity outside training). Every later step (folding,
equalization, ranges) works on this list; `build.py` turns it into a Keras model again.
"""

import dataclasses
import difflib

import keras
import numpy as np
from keras.src.models.functional import Functional

from .params import QuantParams

# Activations by their Keras names, mapped to the op of the graph.
ACTIVATIONS = {
    "linear": "identity",
    "relu": "relu",
    "relu6": "relu6",
    "sigmoid": "sigmoid",
    "hard_sigmoid": "hard_sigmoid",
    "swish": "swish",
    "silu": "swish",
    "hard_swish": "hard_swish",
    "hard_silu": "hard_swish",
    "softmax": "softmax",
    "tanh": "tanh",
}

KERNEL_OPS = ("conv", "depthwise", "dense")


@dataclasses.dataclass
class Node:
    """One operation and the tensor that it makes.

    Attributes:
        name: Unique name; also the name of the tensor.
        op: Kind of operation, such as "conv" or "add".
        inputs: Names of the nodes that it reads.
        shape: Shape of the tensor without the batch dimension.
        layer: Name of the layer of the source model that it comes from.
        attrs: Static arguments of the operation.
        weights: Constants of the operation, float32 arrays; "limits" of a quantized kernel are
            the largest magnitudes that its channels represent, "mean" and "deviation" the moments
            to which a folded batch norm brought its output, "divisors" what its output channels
            were divided by since the model was read.
        params: Quantization parameters of the tensor, once they are known.
        is_float: Whether the operation computes in float.
    """

    name: str
    op: str
    inputs: list[str]
    shape: tuple[int, ...]
    layer: str
    attrs: dict = dataclasses.field(default_factory=dict)
    weights: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    params: QuantParams | None = None
    is_float: bool = False


def kernel_owner(node: Node) -> str:
    """Returns the name of the node whose kernel a node has: its own, unless it shares another's."""
    return node.attrs.get("kernel_of", node.name)


def is_projection(node: Node) -> bool:
    """Whether a node is a 1 x 1 convolution without strides, groups, activation, not in float."""
    return (
        node.op == "conv"
        and node.weights["kernel"].shape[:2] == (1, 1)
        and tuple(node.attrs["strides"]) == (1, 1)
        and node.attrs["groups"] == 1
        and node.attrs["activation"] == "linear"
        and not node.is_float
    )


class Graph:
    """Nodes in topological order, with the names of the input and of the outputs."""

    def __init__(self, name: str):
        self.name = name
        self.nodes: dict[str, Node] = {}
        self.input = ""
        self.outputs: list[str] = []

    def __iter__(self):
        return iter(list(self.nodes.values()))

    def __getitem__(self, name: str) -> Node:
        return self.nodes[name]

    def unique(self, name: str) -> str:
        """Returns `name`, or `name_1`, `name_2`, ... if it is taken."""
        candidate, number = name, 0
        while candidate in self.nodes:
            number += 1
            candidate = f"{name}_{number}"
        return candidate

    def add(self, node: Node, after: str | None = None) -> Node:
        """Adds a node at the end, or directly behind the node `after`."""
        if node.name in self.nodes:
            raise ValueError(f"The graph already has a node named {node.name!r}.")
        if after is None:
            self.nodes[node.name] = node
            return node
        items = []
        for name, other in self.nodes.items():
            items.append((name, other))
            if name == after:
                items.append((node.name, node))
        self.nodes = dict(items)
        return node

    def consumers(self, name: str) -> list[Node]:
        """Returns the nodes that read the tensor `name`."""
        return [node for node in self.nodes.values() if name in node.inputs]

    def only_consumer(self, name: str) -> Node | None:
        """Returns the one reader of a tensor, or None if it has none, several, or is an output."""
        readers = self.consumers(name)
        return readers[0] if len(readers) == 1 and name not in self.outputs else None

    def redirect(self, old: str, new: str, but: tuple[str, ...] = ()) -> None:
        """Lets everything that reads `old` read `new`, apart from the nodes named in `but`."""
        for node in self.nodes.values():
            if node.name not in but:
                node.inputs = [new if name == old else name for name in node.inputs]
        self.outputs = [new if name == old else name for name in self.outputs]

    def bypass(self, name: str) -> None:
        """Removes a node with one input; its readers read that input."""
        node = self.nodes[name]
        self.redirect(name, node.inputs[0])
        del self.nodes[name]

    def rename(self, old: str, new: str) -> None:
        """Renames a node."""
        self.nodes = {(new if name == old else name): node for name, node in self.nodes.items()}
        self.nodes[new].name = new
        self.redirect(old, new)

    def kernel_nodes(self) -> list[Node]:
        """Returns convolutions, depthwise convolutions and dense layers."""
        return [node for node in self if node.op in KERNEL_OPS]

    def applications(self, name: str) -> list[Node]:
        """Returns the nodes that apply the kernel of a node, which is among them."""
        return [node for node in self.kernel_nodes() if kernel_owner(node) == name]


def read_model(model: keras.Model, keep_float: tuple[str, ...] = ()) -> Graph:
    """Reads a Functional (or Sequential) model with one input.

    Args:
        model: The model; nested Functional models are inlined. It is not changed.
        keep_float: Names of layers to keep in float. A layer of a type that cannot be quantized
            is accepted only if it is named here.

    Returns:
        The graph, in float32.

    Raises:
        TypeError: If the model is not Functional, or a layer's type is not supported.
        ValueError: If the model has several inputs, shared layers, open spatial dimensions or
            layers in channels-first order, or if `keep_float` names an unknown layer.
    """
    functional = functional_of(model)
    if len(functional.inputs) != 1:
        raise ValueError(
            "Only models with one input can be quantized. "
            f"Received: a model with inputs {[tensor.name for tensor in functional.inputs]}"
        )
    shape = functional.inputs[0].shape
    if any(size is None for size in shape[1:]):
        raise ValueError(
            "Integer files hold static shapes: build the model with a full `input_shape`, such as "
            f"(224, 224, 3). Received: {tuple(shape)}"
        )
    reader = Reader(functional.name, set(keep_float))
    reader.read(functional)
    unknown = sorted(set(keep_float) - reader.layers)
    if unknown:
        hints = {name: difflib.get_close_matches(name, reader.layers, 3) for name in unknown}
        raise ValueError(
            "`keep_float` names layers that the model does not have. "
            f"Received: {unknown}; close matches: {hints}"
        )
    return reader.graph


def functional_of(model):
    if isinstance(model, keras.Sequential):
        if not model.built:
            raise ValueError(
                f"The Sequential model {model.name!r} is not built: give it an `Input`, or call "
                "it once."
            )
        model = model._functional
    if not isinstance(model, keras.Model):
        raise TypeError(
            "A Keras 3 model is needed (`keras.Model`, not tf_keras). "
            f"Received: {type(model).__module__}.{type(model).__name__}"
        )
    if not isinstance(model, Functional):
        raise TypeError(
            "Only Functional and Sequential models can be quantized: a subclassed model hides its "
            f"graph. Rebuild it with the functional API. Received: {type(model).__name__} "
            f"{model.name!r}"
        )
    return model


class Reader:
    """Turns the layers of a model into the nodes of a graph."""

    def __init__(self, name, keep_float):
        self.graph = Graph(name)
        self.keep_float = keep_float
        self.layers = set()
        self.tensors = {}  # id of a Keras tensor -> name of its node

    def read(self, functional):
        tensor = functional.inputs[0]
        layer = tensor._keras_history.operation
        # An inner tensor can be the input of a model cut out of another one.
        name = layer.name if isinstance(layer, keras.layers.InputLayer) else "input"
        self.graph.input = name
        self.graph.add(Node(name, "input", [], tuple(tensor.shape[1:]), name))
        self.layers.add(name)
        self.tensors[id(tensor)] = name
        self._read_nodes(functional)
        self.graph.outputs = [self.tensors[id(tensor)] for tensor in functional.outputs]

    def _read_nodes(self, functional):
        for depth in sorted(functional._nodes_by_depth, reverse=True):
            for node in functional._nodes_by_depth[depth]:
                if node.is_input or id(node.outputs[0]) in self.tensors:
                    continue
                self._read_node(node)

    def _read_node(self, node):
        layer = node.operation
        inputs = node.input_tensors
        if isinstance(layer, (Functional, keras.Sequential)):
            inner = functional_of(layer)
            self._refuse_shared(layer)
            for outer, own in zip(inputs, inner.inputs, strict=True):
                self.tensors[id(own)] = self.tensors[id(outer)]
            self._read_nodes(inner)
            for outer, own in zip(node.outputs, inner.outputs, strict=True):
                self.tensors[id(outer)] = self.tensors[id(own)]
            self.layers.add(layer.name)
            return
        if len(node.outputs) != 1:
            raise TypeError(
                f"Layer {layer.name!r} ({type(layer).__name__}) has {len(node.outputs)} outputs; "
                "only layers with one output can be quantized."
            )
        self._refuse_shared(layer)
        self.layers.add(layer.name)
        names = [self.tensors[id(tensor)] for tensor in inputs]
        shape = tuple(node.outputs[0].shape[1:])
        self.tensors[id(node.outputs[0])] = self._convert(layer, names, shape)

    def _refuse_shared(self, layer):
        if layer.name in self.layers:
            raise ValueError(
                f"Layer {layer.name!r} is shared (called more than once, or two layers have this "
                "name). Shared layers cannot be quantized, since each call needs its own ranges: "
                "clone the layer for each call."
            )

    def _add(self, layer, op, inputs, shape, suffix="", attrs=None, weights=None):
        name = self.graph.unique(layer.name + suffix)
        weights = {key: np.asarray(value, np.float32) for key, value in (weights or {}).items()}
        for key, value in weights.items():
            if not np.all(np.isfinite(value)):
                raise ValueError(
                    f"The {key} of layer {layer.name!r} holds NaN or infinite values; the model "
                    "cannot be quantized."
                )
        node = Node(name, op, list(inputs), shape, layer.name, attrs or {}, weights)
        node.is_float = layer.name in self.keep_float
        self.graph.add(node)
        return name

    def _convert(self, layer, inputs, shape):
        convert = self.converters().get(type(layer))
        if convert is not None:
            return convert(self, layer, inputs, shape)
        if layer.name in self.keep_float and isinstance(layer, keras.layers.Layer):
            return self._add(layer, "layer", inputs, shape, attrs={"layer": layer})
        raise TypeError(
            f"Layer {layer.name!r} of type {type(layer).__name__} is not in the quantization "
            f"scheme, which knows {', '.join(supported_layers())}. Replace it, or name it in "
            f"`keep_float`. Received: {layer!r}"
        )

    def converters(self) -> dict:
        """Returns the functions that read layers, by the type of the layer."""
        return _CONVERTERS

    def _activation(self, layer, activation, name, shape):
        """Adds the activation that is fused into a layer, if it has one."""
        key = activation if isinstance(activation, str) else keras.activations.serialize(activation)
        key = key if isinstance(key, str) else repr(key)
        if key not in ACTIVATIONS:
            raise TypeError(
                f"Layer {layer.name!r} has the activation {key!r}, which the quantization scheme "
                f"does not know. Supported: {sorted(ACTIVATIONS)}"
            )
        op = ACTIVATIONS[key]
        if op == "identity":
            return name
        suffix = "" if isinstance(layer, keras.layers.Activation) else f"_{key}"
        attrs = {"axis": -1} if op == "softmax" else {}
        return self._add(layer, op, [name], shape, suffix, attrs)


def _require_channels_last(layer):
    if getattr(layer, "data_format", "channels_last") != "channels_last":
        raise ValueError(
            f"Layer {layer.name!r} is in channels_first order; build the model in channels_last "
            "order."
        )


def _array(value):
    return keras.ops.convert_to_numpy(value)


def _conv(reader, layer, inputs, shape):
    _require_channels_last(layer)
    depthwise = isinstance(layer, keras.layers.DepthwiseConv2D)
    if layer.padding not in ("same", "valid"):
        raise ValueError(
            f"Layer {layer.name!r} must pad 'same' or 'valid'. Received: {layer.padding!r}"
        )
    kernel = _array(layer.kernel)
    if depthwise and kernel.shape[3] != 1:
        raise ValueError(
            f"DepthwiseConv2D {layer.name!r} must have depth_multiplier=1. "
            f"Received: {kernel.shape[3]}"
        )
    channels = kernel.shape[2] if depthwise else kernel.shape[3]
    attrs = {
        "strides": tuple(layer.strides),
        "padding": layer.padding,
        "dilation": tuple(layer.dilation_rate),
        "activation": "linear",
    }
    if not depthwise:
        attrs["groups"] = layer.groups
    bias = _array(layer.bias) if layer.use_bias else np.zeros(channels, np.float32)
    name = reader._add(
        layer,
        "depthwise" if depthwise else "conv",
        inputs,
        shape,
        attrs=attrs,
        weights={"kernel": kernel, "bias": bias},
    )
    return reader._activation(layer, layer.activation, name, shape)


def _dense(reader, layer, inputs, shape):
    kernel = _array(layer.kernel)
    bias = _array(layer.bias) if layer.use_bias else np.zeros(kernel.shape[1], np.float32)
    weights = {"kernel": kernel, "bias": bias}
    name = reader._add(
        layer, "dense", inputs, shape, attrs={"activation": "linear"}, weights=weights
    )
    return reader._activation(layer, layer.activation, name, shape)


def _batch_norm(reader, layer, inputs, shape):
    axis = layer.axis if isinstance(layer.axis, int) else layer.axis[0]
    if axis not in (-1, len(shape)):
        raise ValueError(
            f"BatchNormalization {layer.name!r} must normalize the last axis. Received: {axis}"
        )
    # In float64, so that folding stays exact to float32.
    variance = _array(layer.moving_variance).astype(np.float64)
    scale = 1.0 / np.sqrt(variance + layer.epsilon)
    if layer.scale:
        scale = scale * _array(layer.gamma)
    offset = -_array(layer.moving_mean).astype(np.float64) * scale
    if layer.center:
        offset = offset + _array(layer.beta)
    # The moments of its output: training may go on normalizing by those of the batches.
    moments = {
        "mean": _array(layer.beta) if layer.center else np.zeros(shape[-1], np.float32),
        "deviation": abs(_array(layer.gamma)) if layer.scale else np.ones(shape[-1], np.float32),
    }
    weights = {"scale": scale, "offset": offset, **moments}
    return reader._add(layer, "affine", inputs, shape, weights=weights)


def _rescaling(reader, layer, inputs, shape):
    scale = np.broadcast_to(np.asarray(layer.scale, np.float32), shape[-1:])
    offset = np.broadcast_to(np.asarray(layer.offset, np.float32), shape[-1:])
    return reader._add(layer, "affine", inputs, shape, weights={"scale": scale, "offset": offset})


def _normalization(reader, layer, inputs, shape):
    axis = tuple(layer.axis) if isinstance(layer.axis, (list, tuple)) else (layer.axis,)
    if axis not in ((-1,), (len(shape),)):
        raise ValueError(
            f"Normalization {layer.name!r} must normalize the last axis. Received: {layer.axis}"
        )
    # `finalize_state` may not have run since the weights were set, so they are the truth.
    mean = layer.adapt_mean if layer.input_mean is None else layer.input_mean
    variance = layer.adapt_variance if layer.input_variance is None else layer.input_variance
    mean = np.broadcast_to(np.reshape(_array(mean), -1), shape[-1:]).astype(np.float64)
    variance = np.broadcast_to(np.reshape(_array(variance), -1), shape[-1:]).astype(np.float64)
    deviation = np.maximum(np.sqrt(variance), keras.config.epsilon())
    if layer.invert:
        scale, offset = deviation, mean
    else:
        scale, offset = 1.0 / deviation, -mean / deviation
    return reader._add(layer, "affine", inputs, shape, weights={"scale": scale, "offset": offset})


def _activation_layer(reader, layer, inputs, shape):
    return reader._activation(layer, layer.activation, inputs[0], shape)


def _relu(reader, layer, inputs, shape):
    slope, threshold = float(layer.negative_slope), float(layer.threshold)
    if slope or threshold or layer.max_value not in (None, 6, 6.0):
        raise ValueError(
            f"ReLU {layer.name!r} must be the plain ReLU or ReLU6. Received: "
            f"max_value={layer.max_value}, negative_slope={slope}, threshold={threshold}"
        )
    op = "relu" if layer.max_value is None else "relu6"
    return reader._add(layer, op, inputs, shape)


def _softmax(reader, layer, inputs, shape):
    if layer.axis not in (-1, len(shape)):
        raise ValueError(
            f"Softmax {layer.name!r} must act on the last axis. Received: {layer.axis}"
        )
    return reader._add(layer, "softmax", inputs, shape, attrs={"axis": -1})


def _padding(reader, layer, inputs, shape):
    _require_channels_last(layer)
    return reader._add(
        layer, "pad", inputs, shape, attrs={"padding": tuple(map(tuple, layer.padding))}
    )


def _pool(reader, layer, inputs, shape):
    _require_channels_last(layer)
    attrs = {
        "pool_size": tuple(layer.pool_size),
        "strides": tuple(layer.strides),
        "padding": layer.padding,
    }
    average = isinstance(layer, keras.layers.AveragePooling2D)
    return reader._add(layer, "avg_pool" if average else "max_pool", inputs, shape, attrs=attrs)


def _global_pool(reader, layer, inputs, shape):
    _require_channels_last(layer)
    average = isinstance(layer, keras.layers.GlobalAveragePooling2D)
    op = "global_avg" if average else "global_max"
    return reader._add(layer, op, inputs, shape, attrs={"keepdims": layer.keepdims})


def _reshape(reader, layer, inputs, shape):
    return reader._add(layer, "reshape", inputs, shape)


def _dropout(reader, layer, inputs, shape):
    config = layer.get_config()
    attrs = {key: config[key] for key in ("rate", "noise_shape", "seed")}
    return reader._add(layer, "dropout", inputs, shape, attrs=attrs)


def _merge(op):
    def convert(reader, layer, inputs, shape):
        if op == "concat" and layer.axis not in (-1, len(shape)):
            raise ValueError(
                f"Concatenate {layer.name!r} must join the last axis. Received: {layer.axis}"
            )
        if op == "concat" or len(inputs) == 2:
            return reader._add(layer, op, inputs, shape)
        # The integer kernels take two operands: a sum of n is n - 1 sums.
        name = inputs[0]
        for number, other in enumerate(inputs[1:], 1):
            suffix = "" if number == len(inputs) - 1 else f"_{number}"
            name = reader._add(layer, op, [name, other], shape, suffix)
        return name

    return convert


_CONVERTERS = {
    keras.layers.Conv2D: _conv,
    keras.layers.DepthwiseConv2D: _conv,
    keras.layers.Dense: _dense,
    keras.layers.BatchNormalization: _batch_norm,
    keras.layers.Rescaling: _rescaling,
    keras.layers.Normalization: _normalization,
    keras.layers.Activation: _activation_layer,
    keras.layers.ReLU: _relu,
    keras.layers.Softmax: _softmax,
    keras.layers.ZeroPadding2D: _padding,
    keras.layers.AveragePooling2D: _pool,
    keras.layers.MaxPooling2D: _pool,
    keras.layers.GlobalAveragePooling2D: _global_pool,
    keras.layers.GlobalMaxPooling2D: _global_pool,
    keras.layers.Reshape: _reshape,
    keras.layers.Flatten: _reshape,
    keras.layers.Dropout: _dropout,
    keras.layers.SpatialDropout2D: _dropout,
    keras.layers.Multiply: _merge("mul"),
    keras.layers.Add: _merge("add"),
    keras.layers.Concatenate: _merge("concat"),
}


def supported_layers() -> list[str]:
    """Returns the names of the layer types that can be quantized, in alphabetical order."""
    return sorted(kind.__name__ for kind in _CONVERTERS)
