"""A quantized Keras model read back as a graph of integers.

Exporters write files from this graph: every tensor has its scale and zero point, every kernel its
limits, so all artefacts of a model hold the same integers, which are those of the Keras layers.
"""

import keras
import numpy as np

from .fake_quant import (
    QUANTIZED_KERNELS,
    ChannelScale,
    Dequantize,
    FakeQuant,
    OneSided,
    PixelShift,
    QuantizedConv2D,
    QuantizedDense,
    QuantizedDepthwiseConv2D,
)
from .graph import Graph, Node, Reader, functional_of
from .params import QuantParams, kernel_scales, quantize, quantize_bias, quantize_kernel
from .scheme import FIXED, OUTPUT_RULES, SAME, fixed_params
from .sides import is_negative_side, negative_name


def is_quantized(model: keras.Model) -> bool:
    """Returns whether a Keras model was quantized by `quantize_model`, or contains such a model.

    Args:
        model: Any Keras model.
    """
    return any(
        isinstance(layer, (FakeQuant, *QUANTIZED_KERNELS))
        or (isinstance(layer, keras.Model) and is_quantized(layer))
        for layer in getattr(model, "layers", ())
    )


def read_quantized(model: keras.Model) -> Graph:
    """Reads a quantized Keras model as a graph of integers.

    Args:
        model: A model made by `quantize_model`, as it is or trained further.

    Returns:
        The graph. Nodes with a kernel hold "kernel", "bias" and "limits" (see `integer_kernel`
        and `integer_bias`); `params` are set on every tensor that is quantized.

    Raises:
        ValueError: If the model is not quantized, or a layer was added that has no ranges.
    """
    if not is_quantized(model):
        raise ValueError(
            f"The model {getattr(model, 'name', model)!r} is not quantized; call `quantize_model` "
            "first."
        )
    functional = functional_of(model)
    reader = QuantizedReader(functional.name)
    reader.read(functional)
    graph = reader.graph
    for node in graph:
        rule = OUTPUT_RULES.get(node.op)
        if rule is None:
            raise ValueError(
                f"Layer {node.layer!r} ({node.op}) was added to the quantized model; integer "
                "kernels do not know it. Add it to the float model and quantize that."
            )
        if node.is_float or rule == SAME:
            continue
        if node.params is None:
            raise ValueError(
                f"The output of layer {node.layer!r} has no range: it was added to the model after "
                "quantization. Add it to the float model and quantize that."
            )
        if rule == FIXED and node.params != fixed_params(graph, node):
            raise ValueError(
                f"The range of {node.layer!r} ({node.op}) is fixed by the TFLite specification to "
                f"{fixed_params(graph, node)}. Received: {node.params}"
            )
    return graph


def tensor_params(graph: Graph, name: str) -> QuantParams | None:
    """Returns the quantization parameters of a tensor, or None if it is float."""
    node = graph[name]
    if OUTPUT_RULES[node.op] == SAME and not node.is_float:
        return tensor_params(graph, node.inputs[0])
    return node.params


def integer_kernel(node: Node) -> tuple[np.ndarray, np.ndarray]:
    """Returns the int8 kernel of a node, in Keras' layout, and its float32 scales.

    The scales have the shape (output channels,), or (1,) where one serves all.
    """
    limits = node.weights["limits"]
    shaped = limits.reshape(-1, 1) if node.op == "depthwise" else limits
    return quantize_kernel(node.weights["kernel"], shaped), kernel_scales(limits)


def dequantized_kernel(node: Node) -> np.ndarray:
    """Returns the real values of the integers of a kernel, float32, in Keras' layout."""
    integers, scales = integer_kernel(node)
    shaped = scales.reshape(-1, 1) if node.op == "depthwise" else scales
    return integers.astype(np.float32) * shaped


def integer_bias(graph: Graph, node: Node) -> tuple[np.ndarray, np.ndarray]:
    """Returns the int32 bias of a node and its float32 scales, those of the accumulator."""
    source = tensor_params(graph, node.inputs[0])
    scales = kernel_scales(node.weights["limits"])
    steps = np.float32(source.scale) * scales
    return quantize_bias(node.weights["bias"], source.scale, scales), steps.astype(np.float32)


def integer_factors(node: Node) -> tuple[np.ndarray, QuantParams]:
    """Returns the int8 constant of a channel scale and its parameters."""
    factors = node.weights["factors"]
    params = QuantParams.from_range(0.0, float(factors.max()))
    return quantize(factors, params), params


class QuantizedReader(Reader):
    """Reads the layers of a quantized model, with their ranges and limits."""

    def __init__(self, name):
        super().__init__(name, frozenset())
        self.float_tensors = set()  # ids of the Keras tensors that hold floats

    def _read_node(self, node):
        layer = node.operation
        source, output = node.input_tensors[0], node.outputs[0]
        if isinstance(layer, FakeQuant):
            name = self.tensors[id(source)]
            self.tensors[id(output)] = name
            self.graph[name].params = layer.params
            return
        if isinstance(layer, Dequantize):
            self.tensors[id(output)] = self.tensors[id(source)]
            self.float_tensors.add(id(output))
            return
        known = set(self.graph.nodes)
        super()._read_node(node)
        if any(id(tensor) in self.float_tensors for tensor in node.input_tensors):
            self.float_tensors.add(id(output))
            for name in set(self.graph.nodes) - known:
                self.graph[name].is_float = True

    def _activation(self, layer, activation, name, shape):
        # What is fused into a layer of a quantized model stays there.
        if isinstance(layer, keras.layers.Activation):
            return super()._activation(layer, activation, name, shape)
        self.graph[name].attrs["activation"] = keras.activations.serialize(activation)
        return name

    def _convert(self, layer, inputs, shape):
        if isinstance(layer, PixelShift):
            weights = {"offset": np.asarray(layer.offsets)}
            return self._add(layer, "shift", inputs, shape, weights=weights)
        if isinstance(layer, ChannelScale):
            factors = keras.ops.convert_to_numpy(layer.factors)
            return self._add(layer, "scale", inputs, shape, weights={"factors": factors})
        if isinstance(layer, OneSided):
            self.graph[inputs[0]].attrs["part"] = layer.sign
            return inputs[0]
        name = super()._convert(layer, inputs, shape)
        if isinstance(layer, QUANTIZED_KERNELS):
            kernel = self.graph[layer.name]
            if is_negative_side(self.graph, kernel):
                kernel.attrs["kernel_of"] = layer.name
                name = negative_name(layer.name)
                self.graph.rename(layer.name, name)
            kernel.weights.update(
                kernel=layer.real_kernel(),
                bias=layer.real_bias(),
                limits=keras.ops.convert_to_numpy(layer.kernel_limits),
            )
            if isinstance(layer, QuantizedDense):
                kernel.attrs["per_channel"] = layer.per_channel
        return name

    def _refuse_shared(self, layer):
        # One kernel may be applied to both sides of what was split.
        if not isinstance(layer, QuantizedConv2D):
            super()._refuse_shared(layer)

    def converters(self):
        same = {
            QuantizedConv2D: keras.layers.Conv2D,
            QuantizedDepthwiseConv2D: keras.layers.DepthwiseConv2D,
            QuantizedDense: keras.layers.Dense,
        }
        plain = super().converters()
        return {**plain, **{quantized: plain[kind] for quantized, kind in same.items()}}
