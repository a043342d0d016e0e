"""Models of Keras 3 as models of tf_keras, and back.

Both directions read a model as a list of calls, nested models inlined, and make each layer anew
from the same table. A quantized model goes through its graph: what it computes in float becomes
the layers, and what the graph knows of ranges goes to the quantizers of tfmot's
`QuantizeWrapperV2` around them.

Importing this module needs tf_keras and tensorflow-model-optimization; see `_packages`.
"""

import dataclasses
from typing import Any

import keras
import numpy as np
import tensorflow as tf
import tf_keras
from keras import ops
from tensorflow_model_optimization.python.core.quantization.keras.quantize_layer import (
    QuantizeLayer,
)
from tensorflow_model_optimization.quantization.keras import QuantizeWrapper

from ..build import RANGE_SUFFIX, build_model
from ..fake_quant import (
    FIXED_RANGES,
    LEARNED,
    MOVING_AVERAGE,
    ChannelScale,
    FakeQuant,
    PixelShift,
)
from ..folding import fold
from ..graph import functional_of, read_model
from ..lowering import QuantizedReader, is_quantized, read_quantized
from ..params import PIXELS, QuantParams, widen
from ..quantize import set_kernel_limits
from ..scheme import FIXED, OUTPUT_RULES, SAME, expects_pixels, fixed_params, needs_range
from . import layers
from .quantizers import KERNELS, InputQuantizer, LayerConfig, Quantized, TensorQuantizer

# Arguments that make a layer, the same in both packages.
_CONVOLUTION = ("kernel_size", "strides", "padding", "data_format", "dilation_rate", "activation")
_POOLING = ("pool_size", "strides", "padding", "data_format")
ARGUMENTS = {
    "Activation": ("activation",),
    "Add": (),
    "AveragePooling2D": _POOLING,
    "BatchNormalization": ("axis", "momentum", "epsilon", "center", "scale"),
    "ChannelScale": ("factors",),
    "Concatenate": ("axis",),
    "Conv2D": ("filters", "groups", "use_bias", *_CONVOLUTION),
    "Dense": ("units", "use_bias", "activation"),
    "DepthwiseConv2D": ("depth_multiplier", "use_bias", *_CONVOLUTION),
    "Dropout": ("rate", "noise_shape", "seed"),
    "Flatten": ("data_format",),
    "GlobalAveragePooling2D": ("data_format", "keepdims"),
    "GlobalMaxPooling2D": ("data_format", "keepdims"),
    "MaxPooling2D": _POOLING,
    "Multiply": (),
    "Normalization": ("axis", "mean", "variance", "invert"),
    "PixelShift": ("offsets",),
    "ReLU": ("max_value", "negative_slope", "threshold"),
    "Rescaling": ("scale", "offset"),
    "Reshape": ("target_shape",),
    "Softmax": ("axis",),
    "SpatialDropout2D": ("rate",),
    "ZeroPadding2D": ("padding", "data_format"),
}
# What stands for layers that tf_keras lacks or does not have as they are needed, and Keras lacks.
_TWINS = {
    "ChannelScale": layers.ChannelScale,
    "Normalization": layers.Normalization,
    "PixelShift": layers.PixelShift,
    "Rescaling": layers.Rescaling,
}
_ORIGINALS = {"ChannelScale": ChannelScale, "PixelShift": PixelShift}
_ACTIVATIONS = {
    "linear": tf_keras.activations.linear,
    "relu": tf_keras.activations.relu,
    "relu6": layers.relu6,
    "sigmoid": tf_keras.activations.sigmoid,
    "hard_sigmoid": layers.relu6_sigmoid,
    "swish": tf_keras.activations.swish,
    "hard_swish": layers.hard_swish,
    "softmax": tf_keras.activations.softmax,
    "tanh": tf_keras.activations.tanh,
}
# Keras 3 serializes activations by these names.
_ALIASES = {"silu": "swish", "hard_silu": "hard_swish"}

# tfmot's own first range of a tensor that it has not seen.
_UNSEEN = QuantParams.from_range(-6.0, 6.0)


@dataclasses.dataclass
class _Call:
    """One call of a layer: the ids of the tensors that it reads, and of the one that it makes."""

    layer: Any
    inputs: list[int]
    output: int


@dataclasses.dataclass
class _Settings:
    """How the layer of one node is wrapped."""

    output: dict[str, Any]
    preserve_sparsity: bool
    limits: np.ndarray | None


# --- Keras 3 to tf_keras -----------------------------------------------------------------------


def to_twin(model: keras.Model, preserve_sparsity: bool = False) -> tf_keras.Model:
    """Builds the tf_keras twin of a Keras 3 model; see `to_tf_keras`."""
    functional = functional_of(model)
    if not is_quantized(model):
        return _build_twin(functional, {})
    graph = read_quantized(model)
    if any(node.is_float for node in graph):
        raise ValueError(
            f"{model.name!r} keeps layers in float; tensorflow-model-optimization quantizes all. "
            "Quantize with `keep_float=()`."
        )
    split = [node.layer for node in graph if "part" in node.attrs]
    if split:
        raise ValueError(
            f"{model.name!r} splits swishes, whose kernels tensorflow-model-optimization cannot "
            'share. Quantize without "swish_splitting" in `corrections`. '
            f"Received: {split[:5]}"
        )
    modes = {
        call.layer.name.removesuffix(RANGE_SUFFIX): call.layer.ranges
        for call in _flatten(functional, _keras_node, keras.Model)[0]
        if isinstance(call.layer, FakeQuant)
    }
    if LEARNED in modes.values():
        raise ValueError(
            f"The ranges of {model.name!r} are learned by gradient; tensorflow-model-optimization "
            'keeps them or lets them follow the batches. Quantize with training_ranges="fixed" '
            'or "moving_average".'
        )
    settings = {}
    for node in graph:
        if node.attrs.get("per_channel"):
            raise ValueError(
                f"The dense layer {node.layer!r} has one scale for each unit, which TensorFlow's "
                "converter does not take from a trained model. Quantize with "
                "QuantizationConfig(per_channel_head=False)."
            )
        if node.params is not None:
            output = {
                "minimum": node.params.min,
                "maximum": node.params.max,
                "moving": modes.get(node.name) == MOVING_AVERAGE,
            }
            limits = node.weights.get("limits")
            settings[node.name] = _Settings(output, preserve_sparsity, limits)
    return _build_twin(build_model(graph, quantized=False), settings)


def _build_twin(model: keras.Model, settings: dict[str, _Settings]) -> tf_keras.Model:
    """Builds a float Keras 3 model in tf_keras, the layers that `settings` names wrapped."""
    calls, outputs = _flatten(model, _keras_node, keras.Model)
    tensors, made, wrappers, inputs = {}, {}, {}, []
    for number, tensor in enumerate(model.inputs):
        layer = tensor._keras_history.operation
        known = isinstance(layer, keras.layers.InputLayer)
        name = layer.name if known else f"input_{number + 1}"
        entry = tf_keras.Input(tensor.shape[1:], name=name, dtype=tensor.dtype)
        inputs.append(entry)
        if name in settings:
            quantizer = TensorQuantizer(**settings[name].output)
            entry = InputQuantizer(quantizer, name=name + RANGE_SUFFIX)(entry)
        tensors[id(tensor)] = entry
    for call in calls:
        sources = [tensors[name] for name in call.inputs]
        if id(call.layer) not in made:
            layer = _twin_layer(call.layer, sources[0].shape)
            if layer.name in settings:
                name = layer.name
                layer = wrappers[name] = _wrap(layer, settings[name])
            made[id(call.layer)] = layer
        tensors[call.output] = made[id(call.layer)](_single(sources))
    for name, wrapper in wrappers.items():
        for _, _, variables in wrapper._weight_vars:
            limits = np.reshape(settings[name].limits, variables["max_var"].shape)
            variables["min_var"].assign(-limits)
            variables["max_var"].assign(limits)
    tensors = [tensors[name] for name in outputs]
    return tf_keras.Model(_single(inputs), _single(tensors), name=model.name)


def _twin_layer(layer, input_shape):
    """Makes the tf_keras layer of a Keras 3 layer, with its weights."""
    name = type(layer).__name__
    if name not in ARGUMENTS or type(layer) is not _original_type(name):
        raise TypeError(_unsupported(layer))
    arguments = _arguments(layer, name)
    if "activation" in arguments:
        arguments["activation"] = _twin_activation(layer, arguments["activation"])
    twin = _twin_type(name)(**arguments, name=layer.name)
    if layer.weights and name != "ChannelScale":  # Its factors are an argument.
        # Before it is wrapped: the quantizer of a kernel begins with what it finds.
        with tf.name_scope(layer.name):
            twin.build(input_shape)
        twin.set_weights(layer.get_weights())
    twin.trainable = layer.trainable
    return twin


def _wrap(layer, settings):
    config = LayerConfig(**settings.output, preserve_sparsity=settings.preserve_sparsity)
    return Quantized(layer, config)


def _twin_type(name):
    return _TWINS.get(name) or getattr(tf_keras.layers, name)


def _original_type(name):
    return _ORIGINALS.get(name) or getattr(keras.layers, name)


def _unsupported(layer):
    return (
        f"Layer {layer.name!r} of type {type(layer).__name__} has no twin. Supported: "
        f"{', '.join(sorted(ARGUMENTS))}. Replace it, or leave it out. Received: {layer!r}"
    )


def _arguments(layer, name: str) -> dict[str, Any]:
    config = layer.get_config()
    for key, value in config.items():
        if key.endswith(("_regularizer", "_constraint")) and value is not None:
            raise ValueError(
                f"Layer {layer.name!r} has a {key}, which its twin would lack. Build the model "
                f"without it and add it to the twin. Received: {value}"
            )
    arguments = {key: config[key] for key in ARGUMENTS[name]}
    if name == "BatchNormalization" and not isinstance(arguments["axis"], int):
        (arguments["axis"],) = arguments["axis"]
    if name == "ChannelScale" and isinstance(layer, ChannelScale):
        # The configuration holds the first factors; a file of weights may have replaced them.
        arguments["factors"] = ops.convert_to_numpy(layer.factors)
    return arguments


def _twin_activation(layer, name):
    name = _ALIASES.get(name, name) if isinstance(name, str) else repr(name)
    if name not in _ACTIVATIONS:
        raise TypeError(
            f"Layer {layer.name!r} has the activation {name!r}, which has no twin. "
            f"Supported: {sorted(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[name]


# --- tf_keras to Keras 3 -----------------------------------------------------------------------


def from_twin(model: tf_keras.Model, quantized: bool) -> keras.Model:
    """Builds the Keras 3 model of a tf_keras model; see `from_tf_keras`."""
    check_tf_keras(model)
    original, ranges, limits, mode = _build_original(model)
    if not (quantized and ranges):
        return original
    reader = QuantizedReader(model.name)
    reader.read(original)
    graph = reader.graph
    for node in graph:
        if node.name not in ranges and OUTPUT_RULES.get(node.op) != SAME:
            raise ValueError(
                f"The output of layer {node.layer!r} has no range: it was added to the model after "
                "quantization. Add it to the float model and quantize that."
            )
        node.params = ranges.get(node.name)
    for name, values in limits.items():
        graph[name].weights["limits"] = np.reshape(values, -1)
        if graph[name].op == "dense":
            graph[name].attrs["per_channel"] = False
    return build_model(graph, quantized=True, training_ranges=mode)


def check_tf_keras(model) -> None:
    """Raises TypeError unless a model is a Functional (or built Sequential) one of tf_keras."""
    if not isinstance(model, tf_keras.Model):
        raise TypeError(
            "A tf_keras model is needed, such as `to_tf_keras` returns. "
            f"Received: {type(model).__module__}.{type(model).__name__}"
        )
    if not model._is_graph_network:
        raise TypeError(
            "Only Functional models and Sequential ones with an input shape have a graph to read. "
            f"Received: {type(model).__name__} {model.name!r}"
        )


def is_wrapped(model: tf_keras.Model) -> bool:
    """Whether a tf_keras model holds quantizers of tensorflow-model-optimization."""
    return any(isinstance(layer, (QuantizeWrapper, QuantizeLayer)) for layer in model.layers)


def _build_original(model):
    """Builds a tf_keras model in Keras 3, in float.

    Returns:
        The model; the `QuantParams` of the tensors that are quantized and the limits of their
        kernels, by the name of the layer; and what training does to the ranges.
    """
    calls, outputs = _flatten(model, _tf_keras_node, tf_keras.Model)
    tensors, made, names, ranges, limits, inputs = {}, {}, {}, {}, {}, []
    mode = FIXED_RANGES
    for tensor in model.inputs:
        name = tensor.node.layer.name
        entry = keras.Input(tuple(tensor.shape[1:]), name=name)
        inputs.append(entry)
        tensors[id(tensor)], names[id(tensor)] = entry, name
    for call in calls:
        sources = [tensors[name] for name in call.inputs]
        layer = call.layer
        if isinstance(layer, QuantizeLayer):
            _check_quantizer(layer, layer.quantizer, TensorQuantizer)
            ranges[names[call.inputs[0]]] = _params(layer.quantizer_vars)
            tensors[call.output] = sources[0]
            continue
        kernel = None
        if isinstance(layer, QuantizeWrapper):
            wrapper, layer = layer, layer.layer
            _check_quantizer(wrapper, wrapper.quantize_config, LayerConfig)
            ranges[layer.name] = _params(wrapper._output_quantizer_vars)
            if wrapper.quantize_config.output.moving:
                mode = MOVING_AVERAGE
            for variable, _, variables in wrapper._weight_vars:
                # The attribute of the layer holds the rounded tensor of the last call.
                kernel = variable.numpy()
                if "mask" in variables:
                    kernel = kernel * variables["mask"].numpy()
                limits[layer.name] = variables["max_var"].numpy()
        if id(layer) not in made:
            made[id(layer)] = _original_layer(layer, sources, kernel)
        tensors[call.output] = made[id(layer)](_single(sources))
    tensors = [tensors[name] for name in outputs]
    original = keras.Model(_single(inputs), _single(tensors), name=model.name)
    return original, ranges, limits, mode


def _check_quantizer(layer, found, expected):
    if not isinstance(found, expected):
        raise ValueError(
            f"Layer {layer.name!r} was quantized by another scheme than that of this package, "
            "whose ranges stand at other places. Quantize with `quantize_model` or with `scheme`. "
            f"Received: {type(found).__name__}"
        )


def _params(variables) -> QuantParams:
    low, high = (float(variables[name].numpy()) for name in ("min_var", "max_var"))
    return QuantParams.from_range(*widen(low, high))


def _original_layer(layer, sources, kernel):
    """Makes the Keras 3 layer of a tf_keras layer, with its weights, or with another kernel."""
    name = type(layer).__name__
    known = [kind.get(name) for kind in (_TWINS, vars(tf_keras.layers))]
    if name not in ARGUMENTS or type(layer) not in known:
        raise TypeError(
            f"{_unsupported(layer)}. Take the wrappers of pruning and clustering off first, with "
            "`strip_pruning` or `strip_clustering`."
        )
    arguments = _arguments(layer, name)
    if "activation" in arguments:
        arguments["activation"] = _original_activation(layer)
    original = _original_type(name)(**arguments, name=layer.name)
    original.trainable = layer.trainable
    if layer.weights:
        original.build(sources[0].shape)
        if name in KERNELS:
            kernel = getattr(layer, KERNELS[name][0]).numpy() if kernel is None else kernel
            bias = [layer.bias.numpy()] if layer.use_bias else []
            original.set_weights([kernel, *bias])
        else:
            original.set_weights(layer.get_weights())
        if name == "Normalization":
            original.finalize_state()
    return original


def _original_activation(layer):
    for name, function in _ACTIVATIONS.items():
        if layer.activation is function:
            return name
    raise TypeError(
        f"Layer {layer.name!r} has the activation {layer.activation!r}, which has no twin in "
        f"Keras 3. Supported: {sorted(_ACTIVATIONS)}"
    )


# --- The scheme --------------------------------------------------------------------------------


def fold_and_wrap(model: tf_keras.Model, preserve_sparsity: bool) -> tf_keras.Model:
    """Folds a float tf_keras model and wraps its layers, with ranges that nothing has seen yet."""
    if is_wrapped(model):
        raise ValueError(f"The model {model.name!r} is quantized already.")
    graph = read_model(from_twin(model, quantized=False))
    pixels = expects_pixels(graph)
    fold(graph)
    for node in graph:
        if not needs_range(graph, node):
            continue
        if OUTPUT_RULES[node.op] == FIXED:
            node.params = fixed_params(graph, node)
        else:
            node.params = PIXELS if node.op == "input" and pixels else _UNSEEN
    set_kernel_limits(graph, per_channel_head=False)
    quantized = build_model(graph, quantized=True, training_ranges=MOVING_AVERAGE)
    return to_twin(quantized, preserve_sparsity)


# --- Both --------------------------------------------------------------------------------------


def _keras_node(node):
    return node.operation, node.input_tensors, node.outputs


def _tf_keras_node(node):
    return node.layer, node.keras_inputs, tf.nest.flatten(node.outputs)


def _flatten(model, read_node, model_type):
    """Returns the calls of a model in order, nested models inlined, and the ids of its outputs.

    A call's own `training=` is not kept: in Keras 3 that of the model's call replaces it, and
    `False` may be nothing but the default of the layer.
    """
    calls, aliases = [], {}

    def resolve(tensor):
        name = id(tensor)
        while name in aliases:
            name = aliases[name]
        return name

    def read(part):
        for depth in sorted(part._nodes_by_depth, reverse=True):
            for node in part._nodes_by_depth[depth]:
                if node.is_input:
                    continue
                layer, inputs, outputs = read_node(node)
                if isinstance(layer, model_type):
                    inner = functional_of(layer) if model_type is keras.Model else layer
                    for own, outer in zip(inner.inputs, inputs, strict=True):
                        aliases[id(own)] = resolve(outer)
                    read(inner)
                    for outer, own in zip(outputs, inner.outputs, strict=True):
                        aliases[id(outer)] = resolve(own)
                    continue
                if len(outputs) != 1:
                    raise TypeError(
                        f"Layer {layer.name!r} ({type(layer).__name__}) has {len(outputs)} "
                        "outputs; only layers with one output have a twin."
                    )
                sources = [resolve(tensor) for tensor in inputs]
                calls.append(_Call(layer, sources, id(outputs[0])))

    read(model)
    return calls, [resolve(tensor) for tensor in model.outputs]


def _single(tensors):
    return tensors[0] if len(tensors) == 1 else tensors
