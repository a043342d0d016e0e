"""A quantized Keras model as an integer ONNX graph of quantize and dequantize pairs (QDQ).

The graph is written from the integers of `keras_effnet.quantization.lowering`, as the TFLite file
is: its kernels, biases, scales and zero points are those of the Keras layers, bit for bit. Where
activations are uint8, their integers and zero points, and those of the kernels, are those of the
TFLite file plus 128. Kernels could stay int8; but then onnxruntime adds two products in 16 bits on
x86 processors without VNNI (Intel before 2019, AMD before 2022), where the sum saturates.

In a QDQ graph an operator stands between DequantizeLinear nodes, which give it floats, and a
QuantizeLinear node; a runtime replaces the three by one integer kernel. Operators that only move
or compare integers (reshaping, padding, maxima, concatenation) are written on the integers
themselves.

The operators are those of https://onnx.ai/onnx/operators/, in the form that they have from opset
13 to 21.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from keras_effnet.quantization import lowering
from keras_effnet.quantization.folding import same_padding
from keras_effnet.quantization.graph import Graph, Node, kernel_owner
from keras_effnet.quantization.params import INT8_MAX, INT8_MIN, QuantParams
from keras_effnet.quantization.scheme import OUTPUT_RULES, SAME

from ._optional import import_onnx
from .onnx_file import quantization_metadata

INPUT_NAME, OUTPUT_NAME = "images", "outputs"
BATCH = "batch"
GRAPH_NAME = "keras_effnet"
# Of an operand with so few channels, a row of pixels is repeated; see `_Writer.operand`.
_FEW_CHANNELS = 16


@dataclasses.dataclass(frozen=True)
class _Form:
    """What is asked of the graph, see `convert_quantized`."""

    layout: str
    io_dtype: str
    activation_dtype: str
    dynamic_batch: bool


def convert_quantized(
    model: Any,
    *,
    layout: str = "nhwc",
    io_dtype: str = "uint8",
    activation_dtype: str = "uint8",
    dynamic_batch: bool = False,
) -> tuple[Any, dict[str, str]]:
    """Converts a quantized Keras model to an ONNX graph.

    Args:
        model: A `keras.Model` made by `keras_effnet.quantization.quantize_model`.
        layout: Order of the axes of the input, and of outputs that are images: "nhwc" or "nchw".
            Between them the graph is in NCHW, as ONNX demands.
        io_dtype: Type of input and outputs: "uint8", "int8" or "float32".
        activation_dtype: Type of kernels and of the tensors between: "uint8" or "int8".
        dynamic_batch: Whether the batch size is left open; else it is 1.

    Returns:
        An `onnx.GraphProto` with the input "images" and the output "outputs" ("outputs_0",
        "outputs_1", ... if there are several), and the metadata that tell what the integers at
        its ends stand for.

    Raises:
        ImportError: If onnx is not installed.
        TypeError: If a layer has no operator here.
        ValueError: If the model is not quantized, or ranges are missing.
    """
    graph = lowering.read_quantized(model)
    form = _Form(layout, io_dtype, activation_dtype, dynamic_batch)
    ends = {"input": graph[graph.input].params}
    if len(graph.outputs) == 1:
        ends["output"] = lowering.tensor_params(graph, graph.outputs[0])
    metadata = {}
    for end, params in ends.items():
        if params is not None and io_dtype != "float32":
            zero = zero_point(params, io_dtype)
            metadata |= quantization_metadata(end, params.scale, zero)
    return _Writer(graph, form).write(), metadata


class _Writer:
    """Turns the nodes of a graph into ONNX nodes, in order."""

    def __init__(self, graph: Graph, form: _Form):
        self.onnx = import_onnx()
        self.graph, self.form = graph, form
        self.nodes: list[Any] = []
        self.initializers: dict[str, Any] = {}
        # Outputs that the graph gives as it computes them have their label as name from the start.
        self.labels: dict[str, str] = {}
        # Names of each node's tensor: as integers, as floats that were never rounded, and as the
        # floats that the integers stand for.
        self.integers: dict[str, str] = {}
        self.floats: dict[str, str] = {}
        self.reals: dict[str, str] = {}

    def write(self) -> Any:
        labels = self._output_names()
        if self.form.io_dtype == self.form.activation_dtype:
            for name, label in zip(self.graph.outputs, labels, strict=True):
                if not self._is_moved(self.graph[name]):
                    self.labels.setdefault(name, label)
        inputs = [self._input(self.graph[self.graph.input])]
        for node in self.graph:
            if node.op != "input":
                self._node(node)
        outputs = [
            self._output(name, label)
            for name, label in zip(self.graph.outputs, labels, strict=True)
        ]
        initializers = list(self.initializers.values())
        return self.onnx.helper.make_graph(self.nodes, GRAPH_NAME, inputs, outputs, initializers)

    def _output_names(self) -> list[str]:
        count = len(self.graph.outputs)
        if count == 1:
            return [OUTPUT_NAME]
        return [f"{OUTPUT_NAME}_{number}" for number in range(count)]

    # Parts of the graph

    def emit(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        """Adds an operator and returns the name of its output."""
        node = self.onnx.helper.make_node(op, inputs, [output], name=f"{output}/{op}", **attributes)
        self.nodes.append(node)
        return output

    def constant(self, name: str, values: Any, dtype: Any) -> str:
        """Adds a constant, once for each name, and returns its name."""
        if name not in self.initializers:
            array = np.asarray(values, dtype, order="C")
            self.initializers[name] = self.onnx.numpy_helper.from_array(array, name)
        return name

    def quantize(self, source: str, target: str, parameters: list[str]) -> str:
        """Adds a QuantizeLinear node."""
        return self.emit("QuantizeLinear", [source, *parameters], target)

    def dequantize(self, source: str, target: str, parameters: list[str]) -> str:
        """Adds a DequantizeLinear node."""
        return self.emit("DequantizeLinear", [source, *parameters], target)

    def parameters(self, name: str) -> list[str]:
        """The constants that hold the scale and zero point of a node's tensor."""
        return self.parameters_of(self._owner(name), self.params(name), self.form.activation_dtype)

    def parameters_of(self, name: str, params: QuantParams, dtype: str) -> list[str]:
        """Constants that hold a scale and a zero point, for a tensor of a type."""
        return [
            self.constant(f"{name}/scale", np.float32(params.scale), np.float32),
            self.constant(f"{name}/zero_point", zero_point(params, dtype), dtype),
        ]

    def weights(
        self,
        name: str,
        integers: np.ndarray,
        scales: np.ndarray,
        dtype: str = "int32",
        owner: str | None = None,
    ) -> str:
        """Adds the integers of a kernel or bias and returns the name of their real values.

        Those of the `owner` serve all that share its kernel.
        """
        constant, zero = owner or name, _type_shift(dtype)
        # In int32, where no sum overflows.
        source = self.constant(f"{constant}/integers", integers.astype(np.int32) + zero, dtype)
        if len(scales) == 1:
            scales = scales[0]
        scale = self.constant(f"{constant}/scale", scales, np.float32)
        # Also where it is zero: Gemm becomes an integer kernel only if it is given.
        shape = np.shape(scales)
        label = "/".join(["zero_points", dtype, *map(str, shape)])
        zero_points = self.constant(label, np.full(shape, zero), dtype)
        return self.emit("DequantizeLinear", [source, scale, zero_points], name, axis=0)

    def operand(self, name: str, integers: np.ndarray, params: QuantParams, node: Node) -> str:
        """Adds a constant with one value per channel, to be combined with the input of a node.

        Args:
            name: Of the constant.
            integers: int8 values, shape (channels,).
            params: What they stand for.
            node: The node that reads it.

        Returns:
            The name of its real values.
        """
        dtype = self.form.activation_dtype
        values = integers.astype(np.int16) + _type_shift(dtype)
        if len(node.shape) == 3:
            # Few channels are repeated for a row of pixels: broadcasting them one by one is slow.
            width = node.shape[1] if len(values) < _FEW_CHANNELS else 1
            values = np.broadcast_to(values[:, None, None], (len(values), 1, width))
        source = self.constant(f"{name}/integers", values[None], dtype)
        return self.dequantize(source, name, self.parameters_of(name, params, dtype))

    def kernel_and_bias(self, node: Node, transpose: tuple[int, ...]) -> list[str]:
        """Adds the weights of a node, with the output channels first."""
        if node.is_float:
            kernel = node.weights["kernel"].transpose(transpose)
            return [
                self.constant(f"{node.name}/kernel", kernel, np.float32),
                self.constant(f"{node.name}/bias", node.weights["bias"], np.float32),
            ]
        kernel, scales = lowering.integer_kernel(node)
        bias, bias_scales = lowering.integer_bias(self.graph, node)
        return [
            self.weights(
                f"{node.name}/kernel",
                kernel.transpose(transpose),
                scales,
                self.form.activation_dtype,
                owner=f"{kernel_owner(node)}/kernel",
            ),
            self.weights(f"{node.name}/bias", bias, bias_scales),
        ]

    def params(self, name: str) -> QuantParams:
        """The quantization parameters of a tensor."""
        return lowering.tensor_params(self.graph, name)

    def transposed(self, source: str, target: str, to: str) -> str:
        """Adds a Transpose from NHWC to NCHW or back."""
        order = {"nchw": (0, 3, 1, 2), "nhwc": (0, 2, 3, 1)}[to]
        return self.emit("Transpose", [source], target, perm=order)

    # Tensors

    def read(self, name: str) -> str:
        """Returns the tensor of a node as integers, quantized where it is float."""
        if name not in self.integers:
            source, target = self.floats[name], self.labels.get(name, name)
            self.integers[name] = self.quantize(source, target, self.parameters(name))
        return self.integers[name]

    def read_real(self, name: str, as_float: bool) -> str:
        """Returns the tensor of a node as floats: rounded to integers, unless `as_float`."""
        if as_float and name in self.floats:
            return self.floats[name]
        if name not in self.reals:
            target = f"{name}/real"
            self.reals[name] = self.dequantize(self.read(name), target, self.parameters(name))
        return self.reals[name]

    def _owner(self, name: str) -> str:
        """The tensor whose parameters a tensor has: its own, or those it passes on."""
        node = self.graph[name]
        if OUTPUT_RULES[node.op] == SAME and not node.is_float:
            return self._owner(node.inputs[0])
        return name

    def _shape(self, node: Node, layout: str) -> list[Any]:
        batch = BATCH if self.form.dynamic_batch else 1
        if len(node.shape) == 3 and layout == "nchw":
            height, width, channels = node.shape
            return [batch, channels, height, width]
        return [batch, *node.shape]

    def _value(self, name: str, dtype: str, node: Node) -> Any:
        helper = self.onnx.helper
        element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        return helper.make_tensor_value_info(name, element, self._shape(node, self.form.layout))

    def _input(self, node: Node) -> Any:
        form, params, name = self.form, node.params, INPUT_NAME
        given = "float32" if params is None else form.io_dtype
        value = self._value(name, given, node)
        if params is not None and given != form.activation_dtype:
            if given != "float32":
                parameters = self.parameters_of(f"{INPUT_NAME}/{given}", params, given)
                name = self.dequantize(name, f"{INPUT_NAME}/real", parameters)
            name = self.quantize(name, f"{node.name}/integers", self.parameters(node.name))
        if self._is_moved(node):
            # Of the integers, where there are any: a quarter of the bytes.
            name = self.transposed(name, f"{node.name}/nchw", "nchw")
        (self.floats if params is None else self.integers)[node.name] = name
        return value

    def _is_moved(self, node: Node) -> bool:
        """Whether the graph's ends have another order of axes than the tensor."""
        return self.form.layout == "nhwc" and len(node.shape) == 3

    def _output(self, name: str, label: str) -> Any:
        form, node = self.form, self.graph[name]
        kept = form.io_dtype == form.activation_dtype
        source, parameters = self.read(name), self.parameters(name)
        if self._is_moved(node):
            source = self.transposed(source, label if kept else f"{name}/nhwc", "nhwc")
        if not kept:
            is_float = form.io_dtype == "float32"
            source = self.dequantize(source, label if is_float else f"{label}/real", parameters)
            if not is_float:
                parameters = self.parameters_of(label, self.params(name), form.io_dtype)
                source = self.quantize(source, label, parameters)
        if source != label:  # One tensor is two outputs, or input and output.
            self.emit("Identity", [source], label)
        return self._value(label, form.io_dtype, node)

    # Nodes

    def _node(self, node: Node) -> None:
        if node.op == "dropout":  # The identity outside training.
            if node.is_float:
                self.floats[node.name] = self.read_real(node.inputs[0], True)
            else:
                self.integers[node.name] = self.read(node.inputs[0])
            return
        if node.op in _ON_INTEGERS:
            self._move(node)
            return
        if node.op not in _EMITTERS:
            raise TypeError(
                f"Layer {node.layer!r} ({node.op}) was kept in float and has no operator in this "
                "exporter; replace it or leave it out of the exported model."
            )
        inputs = [self.read_real(name, node.is_float) for name in node.inputs]
        self.floats[node.name] = f"{node.name}/float"
        _EMITTERS[node.op](self, node, inputs, self.floats[node.name])
        if not node.is_float:
            self.read(node.name)
            del self.floats[node.name]

    def _move(self, node: Node) -> None:
        """Writes what moves or compares values: on integers, or on floats where they are kept."""
        read = (lambda name: self.read_real(name, True)) if node.is_float else self.read
        inputs = [read(name) for name in node.inputs]
        target = f"{node.name}/float" if node.is_float else self.labels.get(node.name, node.name)
        _ON_INTEGERS[node.op](self, node, inputs, target)
        (self.floats if node.is_float else self.integers)[node.name] = target

    def padding_value(self, node: Node) -> str:
        """The constant that stands for 0 in the tensor that a node reads."""
        if node.is_float:
            return self.constant("zero", 0, np.float32)
        return self.parameters(node.inputs[0])[1]


def _type_shift(dtype: str) -> int:
    """What is added to integers of TFLite to make them those of a type here."""
    return -INT8_MIN if dtype == "uint8" else 0


def zero_point(params: QuantParams, dtype: str) -> int:
    """The zero point of int8 parameters in another 8-bit type."""
    return params.zero_point + _type_shift(dtype)


# How each op is written: (writer, node, names of its inputs, name of its output).


def _window(node: Node, source: tuple[int, ...], size: tuple[int, int]) -> dict[str, Any]:
    """Attributes of a convolution or pooling window; "same" pads more behind than before."""
    pads = [(0, 0), (0, 0)]
    dilation = node.attrs.get("dilation", (1, 1))
    if node.attrs["padding"] == "same":
        pads = [
            same_padding(*values)
            for values in zip(source[:2], size, node.attrs["strides"], dilation, strict=True)
        ]
    attributes = {
        "kernel_shape": size,
        "strides": node.attrs["strides"],
        "pads": [pads[0][0], pads[1][0], pads[0][1], pads[1][1]],
    }
    return attributes if "dilation" not in node.attrs else attributes | {"dilations": dilation}


def _activated(writer: _Writer, node: Node, op: str, inputs: list[str], **attributes: Any) -> None:
    """Writes an operator with the activation that is fused into it.

    Quantizing the output clips as ReLU does where the range begins at 0; elsewhere the integers
    are clipped, so that nothing stands between the operator and its QuantizeLinear.
    """
    kind, target = node.attrs["activation"], f"{node.name}/float"
    if node.is_float:
        source = writer.emit(op, inputs, f"{target}/linear", **attributes)
        # Between DequantizeLinear and QuantizeLinear onnxruntime quantizes a float kernel of its
        # own accord, unless something that it cannot remove stands behind it.
        lowest = np.finfo(np.float32).min
        bound = writer.constant("lowest", lowest, np.float32)
        if kind == "linear":
            writer.emit("Max", [source, bound], target)
        else:
            _activate(writer, kind, writer.emit("Max", [source, bound], f"{target}/kept"), target)
        return
    source = writer.emit(op, inputs, target, **attributes)
    if kind != "linear":
        low, high = _clipped(writer.params(node.name), kind)
        if (low, high) == (INT8_MIN, INT8_MAX):
            return
        dtype = writer.form.activation_dtype
        source = writer.quantize(source, f"{node.name}/linear", writer.parameters(node.name))
        bounds = [
            writer.constant(f"{node.name}/{bound}", value + _type_shift(dtype), dtype)
            for bound, value in (("lowest", low), ("highest", high))
        ]
        label = writer.labels.get(node.name, node.name)
        writer.integers[node.name] = writer.emit("Clip", [source, *bounds], label)


def _clipped(params: QuantParams, kind: str) -> tuple[int, int]:
    """The int8 bounds between which ReLU or ReLU6 leaves the integers of an output."""
    top = INT8_MAX
    if kind == "relu6":
        top = min(top, params.zero_point + round(6 / params.scale))
    return params.zero_point, top


def _activate(writer: _Writer, kind: str, source: str, target: str) -> None:
    if kind == "relu":
        writer.emit("Relu", [source], target)
        return
    bounds = [writer.constant(f"relu6/{value}", value, np.float32) for value in (0, 6)]
    writer.emit("Clip", [source, *bounds], target)


def _conv(writer, node, inputs, target):
    depthwise = node.op == "depthwise"
    kernel = node.weights["kernel"]
    weights = writer.kernel_and_bias(node, (2, 3, 0, 1) if depthwise else (3, 2, 0, 1))
    source = writer.graph[node.inputs[0]]
    group = kernel.shape[2] if depthwise else node.attrs["groups"]
    window = _window(node, source.shape, kernel.shape[:2])
    _activated(writer, node, "Conv", [*inputs, *weights], group=group, **window)


def _dense(writer, node, inputs, target):
    if len(node.shape) != 1:
        raise TypeError(
            f"Dense layer {node.layer!r} acts on a tensor of shape {node.shape}; this exporter "
            "knows flat ones. Flatten or pool before it, or use a 1x1 convolution."
        )
    weights = writer.kernel_and_bias(node, (1, 0))
    _activated(writer, node, "Gemm", [*inputs, *weights], transB=1)


def _plain(op, **attributes):
    def emit(writer, node, inputs, target):
        writer.emit(op, inputs, target, **attributes)

    return emit


def _scale(writer, node, inputs, target):
    factors, params = lowering.integer_factors(node)
    factor = writer.operand(f"{node.name}/factors", factors, params, node)
    writer.emit("Mul", [*inputs, factor], target)


def _shift(writer, node, inputs, target):
    # Integers of up to 9 bits as 8-bit ones of scale 1, by their zero point.
    offsets = node.weights["offset"].astype(int).reshape(-1)
    middle = (int(offsets.min()) + int(offsets.max())) // 2
    params = QuantParams(1.0, int(np.clip(-middle, INT8_MIN, INT8_MAX)))
    integers = np.broadcast_to(offsets + params.zero_point, node.shape[-1:])
    offset = writer.operand(f"{node.name}/offset", integers, params, node)
    writer.emit("Add", [*inputs, offset], target)


def _softmax(writer, node, inputs, target):
    writer.emit("Softmax", inputs, target, axis=1 if len(node.shape) == 3 else -1)


def _relu6(writer, node, inputs, target):
    _activate(writer, "relu6", inputs[0], target)


def _hard_swish(writer, node, inputs, target):
    # Opset 14 has an operator; no runtime has an integer kernel for either.
    gate = writer.emit("HardSigmoid", inputs, f"{target}/gate", alpha=1 / 6, beta=0.5)
    writer.emit("Mul", [*inputs, gate], target)


def _global_avg(writer, node, inputs, target):
    if node.attrs["keepdims"]:
        writer.emit("GlobalAveragePool", inputs, target)
        return
    # Quantized where the kernel ends, flattened as integers.
    pooled = writer.emit("GlobalAveragePool", inputs, f"{target}/pooled")
    if node.is_float:
        _flatten(writer, pooled, target)
        return
    label = writer.labels.get(node.name, node.name)
    pooled = writer.quantize(pooled, f"{node.name}/pooled", writer.parameters(node.name))
    writer.integers[node.name] = _flatten(writer, pooled, label)


def _flatten(writer, source, target):
    # 0 copies the batch.
    return writer.emit("Reshape", [source, writer.constant("flat", [0, -1], np.int64)], target)


def _avg_pool(writer, node, inputs, target):
    source = writer.graph[node.inputs[0]]
    writer.emit(
        "AveragePool", inputs, target, **_window(node, source.shape, node.attrs["pool_size"])
    )


_EMITTERS = {
    "conv": _conv,
    "depthwise": _conv,
    "dense": _dense,
    "scale": _scale,
    "shift": _shift,
    "add": _plain("Add"),
    "mul": _plain("Mul"),
    "sigmoid": _plain("Sigmoid"),
    "softmax": _softmax,
    "relu": _plain("Relu"),
    "relu6": _relu6,
    "hard_swish": _hard_swish,
    "global_avg": _global_avg,
    "avg_pool": _avg_pool,
}


# On the integers.


def _max_pool(writer, node, inputs, target):
    source = writer.graph[node.inputs[0]]
    writer.emit("MaxPool", inputs, target, **_window(node, source.shape, node.attrs["pool_size"]))


def _global_max(writer, node, inputs, target):
    # GlobalMaxPool knows no integers, ReduceMax changes its form with opset 18.
    size = writer.graph[node.inputs[0]].shape[:2]
    if node.attrs["keepdims"]:
        writer.emit("MaxPool", inputs, target, kernel_shape=size)
    else:
        _flatten(
            writer, writer.emit("MaxPool", inputs, f"{target}/pooled", kernel_shape=size), target
        )


def _pad(writer, node, inputs, target):
    (top, bottom), (left, right) = node.attrs["padding"]
    amounts = [0, 0, top, left, 0, 0, bottom, right]
    pads = writer.constant(f"{node.name}/paddings", amounts, np.int64)
    writer.emit("Pad", [*inputs, pads, writer.padding_value(node)], target)


def _reshape(writer, node, inputs, target):
    source = writer.graph[node.inputs[0]]
    [name] = inputs
    if _is_image(source.shape):
        name = writer.transposed(name, f"{target}/nhwc", "nhwc")
    back = _is_image(node.shape)
    shape = node.shape
    if len(shape) == 3 and not back:  # One pixel: its channels come first.
        shape = (shape[2], 1, 1)
    # 0 copies the batch.
    sizes = writer.constant(f"{node.name}/shape", [0, *shape], np.int64)
    name = writer.emit("Reshape", [name, sizes], f"{target}/reshaped" if back else target)
    if back:
        writer.transposed(name, target, "nchw")


def _is_image(shape: tuple[int, ...]) -> bool:
    """Whether the order of its axes matters: more than one pixel."""
    return len(shape) == 3 and shape[:2] != (1, 1)


def _concat(writer, node, inputs, target):
    writer.emit("Concat", inputs, target, axis=1 if len(node.shape) == 3 else -1)


_ON_INTEGERS = {
    "max_pool": _max_pool,
    "global_max": _global_max,
    "pad": _pad,
    "reshape": _reshape,
    "concat": _concat,
}
