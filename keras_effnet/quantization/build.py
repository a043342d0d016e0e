"""A graph as a Keras model: in float for calibration, or with its fake-quant layers."""

import contextlib

import keras

from .fake_quant import (
    FIXED_RANGES,
    ChannelScale,
    Dequantize,
    FakeQuant,
    OneSided,
    PixelShift,
    QuantizedConv2D,
    QuantizedDense,
    QuantizedDepthwiseConv2D,
)
from .graph import KERNEL_OPS, Graph, Node, kernel_owner
from .lowering import tensor_params
from .scheme import FIXED, OUTPUT_RULES, shared_ranges

RANGE_SUFFIX = "_range"
PART_SUFFIX = "_part"


class in_float32(contextlib.ContextDecorator):
    """Builds layers that compute in float32, whatever the global dtype policy is.

    What is measured (ranges, noise, a teacher's outputs) must not depend on it.
    """

    def __enter__(self):
        self.policy = keras.config.dtype_policy()
        keras.config.set_dtype_policy("float32")

    def __exit__(self, *error):
        keras.config.set_dtype_policy(self.policy)


def build_model(
    graph: Graph,
    quantized: bool,
    observed: tuple[str, ...] | None = None,
    range_layer: type[FakeQuant] = FakeQuant,
    training_ranges: str = FIXED_RANGES,
    batch_norm: bool = False,
):
    """Builds a Keras model that computes a folded graph.

    Args:
        graph: The graph.
        quantized: Whether kernels and tensors are fake-quantized: all tensors whose `params` are
            set, and the kernels of the nodes that are not `is_float`. Otherwise the model computes
            in float.
        observed: Names of the nodes whose tensors are the outputs of the model; by default the
            outputs of the graph.
        range_layer: Type of the layers through which quantized tensors pass.
        training_ranges: What training does to ranges, as `FakeQuant` takes it. Ranges that several
            tensors share stay fixed.
        batch_norm: Whether training normalizes by the moments of the batches, where a batch norm
            was folded.

    Returns:
        A Functional `keras.Model` whose layers have the names of the nodes, with new weights.
    """
    tensors, layers = {}, {}
    groups = shared_ranges(graph) if quantized else []
    shared = {name for group in groups if len(group) > 1 for name in group}
    for node in graph:
        if node.op == "input":
            image = tensors[node.name] = keras.Input(node.shape, name=node.name)
        else:
            inputs = [tensors[name] for name in node.inputs]
            if quantized and node.is_float:
                inputs = [
                    Dequantize(name=f"{node.name}_dequantize_{number}")(tensor)
                    if _is_quantized(graph, name)
                    else tensor
                    for number, (name, tensor) in enumerate(zip(node.inputs, inputs, strict=True))
                ]
            whole = quantized and not node.is_float
            if node.op in KERNEL_OPS:
                tensors[node.name] = _apply_kernel(
                    graph, node, inputs[0], whole, batch_norm, layers
                )
            else:
                tensors[node.name] = _apply(node, inputs)
        if quantized and node.params is not None:
            layer = range_layer(
                node.params.min,
                node.params.max,
                fixed=OUTPUT_RULES[node.op] == FIXED or node.op == "input",
                ranges=FIXED_RANGES if node.name in shared else training_ranges,
                name=node.name + RANGE_SUFFIX,
            )
            tensors[node.name] = layer(tensors[node.name])
    names = graph.outputs if observed is None else observed
    outputs = [tensors[name] for name in names]
    single = observed is None and len(outputs) == 1
    return keras.Model(image, outputs[0] if single else outputs, name=graph.name)


def _is_quantized(graph: Graph, name: str) -> bool:
    return tensor_params(graph, name) is not None


def _apply(node: Node, inputs: list):
    output = _LAYERS[node.op](node)(inputs if len(inputs) > 1 else inputs[0])
    if "part" in node.attrs:
        output = OneSided(node.attrs["part"], name=node.name + PART_SUFFIX)(output)
    return output


def _apply_kernel(
    graph: Graph, node: Node, tensor, quantized: bool, batch_norm: bool, layers: dict
):
    """Applies the layer of a kernel; quantized kernels that two nodes share are one layer."""
    name = kernel_owner(node) if quantized else node.name
    if name in layers:
        return layers[name](tensor)
    kernel = node.weights["kernel"]
    moments = "deviation" in node.weights and node.op != "dense"
    normalized = quantized and batch_norm and moments
    if node.op == "dense":
        if quantized:
            layer = QuantizedDense(
                kernel.shape[1],
                per_channel=node.attrs["per_channel"],
                activation=node.attrs["activation"],
                name=name,
            )
        else:
            layer = keras.layers.Dense(
                kernel.shape[1], activation=node.attrs["activation"], name=name
            )
    else:
        arguments = {
            "kernel_size": kernel.shape[:2],
            "strides": node.attrs["strides"],
            "padding": node.attrs["padding"],
            "dilation_rate": node.attrs["dilation"],
            "data_format": "channels_last",
            "activation": node.attrs["activation"],
            "name": name,
        }
        if node.op == "depthwise":
            kind = QuantizedDepthwiseConv2D if quantized else keras.layers.DepthwiseConv2D
        else:
            kind = QuantizedConv2D if quantized else keras.layers.Conv2D
            arguments.update(filters=kernel.shape[3], groups=node.attrs["groups"])
        if normalized:
            arguments["batch_norm"] = True
        layer = kind(**arguments)
    layers[name] = layer
    output = layer(tensor)
    if quantized:
        source = tensor_params(graph, node.inputs[0])
        reach = 1.0 if source is None else max(-source.min, source.max)
        layer.set_real(kernel, node.weights["bias"], node.weights["limits"], reach)
        if normalized:
            layer.set_moments(node.weights["mean"], node.weights["deviation"])
    else:
        layer.kernel.assign(kernel)
        layer.bias.assign(node.weights["bias"])
    return output


def _dropout(node):
    return keras.layers.Dropout(
        node.attrs["rate"],
        noise_shape=node.attrs["noise_shape"],
        seed=node.attrs["seed"],
        name=node.name,
    )


def _pool(kind):
    def layer(node):
        return kind(
            node.attrs["pool_size"],
            strides=node.attrs["strides"],
            padding=node.attrs["padding"],
            data_format="channels_last",
            name=node.name,
        )

    return layer


def _global_pool(kind):
    def layer(node):
        return kind(data_format="channels_last", keepdims=node.attrs["keepdims"], name=node.name)

    return layer


def _activation(function):
    def layer(node):
        return keras.layers.Activation(function, name=node.name)

    return layer


def _opaque(node):
    source = node.attrs["layer"]
    layer = type(source).from_config(source.get_config())
    layer.build(source.input.shape)
    layer.set_weights(source.get_weights())
    return layer


_LAYERS = {
    "shift": lambda node: PixelShift(node.weights["offset"], name=node.name),
    "scale": lambda node: ChannelScale(node.weights["factors"], name=node.name),
    "add": lambda node: keras.layers.Add(name=node.name),
    "mul": lambda node: keras.layers.Multiply(name=node.name),
    "concat": lambda node: keras.layers.Concatenate(name=node.name),
    "relu": _activation("relu"),
    "relu6": _activation("relu6"),
    "hard_swish": _activation("hard_swish"),
    "sigmoid": _activation("sigmoid"),
    "softmax": _activation("softmax"),
    "global_avg": _global_pool(keras.layers.GlobalAveragePooling2D),
    "global_max": _global_pool(keras.layers.GlobalMaxPooling2D),
    "avg_pool": _pool(keras.layers.AveragePooling2D),
    "max_pool": _pool(keras.layers.MaxPooling2D),
    "pad": lambda node: keras.layers.ZeroPadding2D(node.attrs["padding"], name=node.name),
    "reshape": lambda node: keras.layers.Reshape(node.shape, name=node.name),
    "dropout": _dropout,
    "layer": _opaque,
}
