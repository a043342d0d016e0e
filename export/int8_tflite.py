"""A quantized Keras model as an integer-only TFLite file, written operator by operator.

The file is written from the integers of `keras_effnet.quantization.lowering`, not by TensorFlow's
converter: its kernels, biases, scales and zero points are those of the Keras layers, bit for bit,
its operators are exactly those of the graph, and it needs no TensorFlow.

The format is the FlatBuffers schema of TFLite
(https://github.com/tensorflow/tensorflow/blob/master/tensorflow/compiler/mlir/lite/schema/schema.fbs).
Operators have the lowest version whose semantics they use, by `tools/versioning/op_version.cc`
there, so that old runtimes and compilers read the files.

For the Edge TPU two operators are written as others that compute the same: HARD_SWISH, which it
lacks, and a mean over many pixels, which it may not map.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from keras_effnet.quantization import lowering
from keras_effnet.quantization.graph import Graph, Node, kernel_owner
from keras_effnet.quantization.params import INT8_MAX, INT8_MIN, KERNEL_MAX, QuantParams

from . import pack, targets
from ._optional import import_tflite_schema

IO_DTYPES = ("float32", "uint8", "int8")
INPUT_NAME, OUTPUT_NAME = "images", "outputs"
SIGNATURE = "serving_default"
_SCHEMA_VERSION = 3
# One of so many sums is a tie, which shifts the mean by 1/32 of a step.
_RARE_TIES = 16


def convert_quantized(model: Any, io_dtype: str = "uint8", target: str = targets.GENERIC) -> bytes:
    """Converts a quantized Keras model to an integer-only TFLite model of batch 1.

    Args:
        model: A `keras.Model` made by `keras_effnet.quantization.quantize_model`.
        io_dtype: Type of input and output: "uint8" (pixels as they come), "int8", or "float32".
            A type other than int8 adds a QUANTIZE at the input and a QUANTIZE or DEQUANTIZE at the
            output; there is none between.
        target: Name of the target; see the module.

    Returns:
        The content of the file. Input "images" of shape (1, height, width, channels), output
        "outputs" ("outputs_0", "outputs_1", ... if there are several), and one signature,
        "serving_default".

    Raises:
        ImportError: If LiteRT, which holds the file format, is not installed.
        TypeError: If a layer kept in float has no operator here.
        ValueError: If the model is not quantized, or `io_dtype` is unknown.
    """
    if io_dtype not in IO_DTYPES:
        raise ValueError(f"`io_dtype` must be one of {IO_DTYPES}. Received: {io_dtype!r}")
    graph = lowering.read_quantized(model)
    return _Writer(graph, io_dtype, target).write()


class _Writer:
    """Turns the nodes of a graph into operators, in order."""

    def __init__(self, graph: Graph, io_dtype: str, target: str):
        self.schema = import_tflite_schema()
        self.graph = graph
        self.io_dtype = io_dtype
        self.for_edge_tpu = target == targets.CORAL
        self.tensors: list[Any] = []
        self.buffers: list[bytes] = [b""]  # Buffer 0 is the empty one of all that is computed.
        self.operators: list[Any] = []
        self.codes: list[tuple[str, int]] = []
        self.constants: dict[tuple, int] = {}
        self.kernels: dict[str, int] = {}
        # Index of each node's tensor, as integers and as floats.
        self.integers: dict[str, int] = {}
        self.floats: dict[str, int] = {}

    def write(self) -> bytes:
        inputs = [self._input(self.graph[self.graph.input])]
        for node in self.graph:
            if node.op != "input":
                self._node(node)
        several = len(self.graph.outputs) > 1
        names = [
            f"{OUTPUT_NAME}_{number}" if several else OUTPUT_NAME
            for number in range(len(self.graph.outputs))
        ]
        outputs = [
            self._output(name, label) for name, label in zip(self.graph.outputs, names, strict=True)
        ]
        return self._serialize(inputs, outputs, names)

    # Tensors

    def _tensor(self, name, shape, dtype, scales=(), zero_point=0, axis=0, data=None):
        schema = self.schema
        tensor = schema.TensorT()
        tensor.name = name.encode()
        tensor.shape = np.asarray(shape, np.int32)
        tensor.type = getattr(schema.TensorType, np.dtype(dtype).name.upper())
        tensor.buffer = 0
        if data is not None:
            tensor.buffer = len(self.buffers)
            self.buffers.append(np.ascontiguousarray(data, dtype).tobytes())
        if len(scales):
            quantization = schema.QuantizationParametersT()
            quantization.scale = np.asarray(scales, np.float32)
            quantization.zeroPoint = np.full(len(scales), zero_point, np.int64)
            quantization.quantizedDimension = axis
            tensor.quantization = quantization
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def _integer_tensor(self, name, shape, params: QuantParams):
        return self._tensor(name, (1, *shape), np.int8, [params.scale], params.zero_point)

    def _constant(self, name, data, dtype):
        data = np.asarray(data, dtype)
        key = (data.tobytes(), data.shape, data.dtype.name)
        if key not in self.constants:
            self.constants[key] = self._tensor(name, data.shape, dtype, data=data)
        return self.constants[key]

    def _read(self, name: str, as_float: bool) -> int:
        """Returns the tensor of a node as floats or as integers, converted where needed."""
        node = self.graph[name]
        if as_float and name not in self.floats:
            target = self._tensor(f"{name}_float", (1, *node.shape), np.float32)
            self._operator("DEQUANTIZE", 2, [self.integers[name]], [target])
            self.floats[name] = target
        if not as_float and name not in self.integers:
            target = self._integer_tensor(f"{name}_int8", node.shape, node.params)
            self._operator("QUANTIZE", 1, [self.floats[name]], [target])
            self.integers[name] = target
        return (self.floats if as_float else self.integers)[name]

    def _input(self, node: Node) -> int:
        shape, params = (1, *node.shape), node.params
        if params is None:  # Read by float layers alone.
            self.floats[node.name] = self._tensor(INPUT_NAME, shape, np.float32)
            return self.floats[node.name]
        if self.io_dtype == "int8":
            self.integers[node.name] = self._integer_tensor(INPUT_NAME, node.shape, params)
            return self.integers[node.name]
        if self.io_dtype == "uint8":
            zero_point = params.zero_point - INT8_MIN
            source = self._tensor(INPUT_NAME, shape, np.uint8, [params.scale], zero_point)
        else:
            source = self._tensor(INPUT_NAME, shape, np.float32)
        target = self._integer_tensor(node.name, node.shape, params)
        self._operator("QUANTIZE", 2 if self.io_dtype == "uint8" else 1, [source], [target])
        self.integers[node.name] = target
        return source

    def _output(self, name: str, label: str) -> int:
        source = self._read(name, as_float=False)
        params = lowering.tensor_params(self.graph, name)
        shape = (1, *self.graph[name].shape)
        if self.io_dtype == "int8":
            # A name of its own, unless the tensor is an output already.
            self.tensors[source].name = label.encode()
            return source
        if self.io_dtype == "uint8":
            zero_point = params.zero_point - INT8_MIN
            target = self._tensor(label, shape, np.uint8, [params.scale], zero_point)
            self._operator("QUANTIZE", 2, [source], [target])
        else:
            target = self._tensor(label, shape, np.float32)
            self._operator("DEQUANTIZE", 2, [source], [target])
        return target

    # Operators

    def _operator(self, name, version, inputs, outputs, options=None, **values):
        schema = self.schema
        operator = schema.OperatorT()
        if (name, version) not in self.codes:
            self.codes.append((name, version))
        operator.opcodeIndex = self.codes.index((name, version))
        operator.inputs = np.asarray(inputs, np.int32)
        operator.outputs = np.asarray(outputs, np.int32)
        if options is not None:
            operator.builtinOptionsType = getattr(schema.BuiltinOptions, options)
            operator.builtinOptions = getattr(schema, f"{options}T")()
            for key, value in values.items():
                if not hasattr(operator.builtinOptions, key):
                    raise AttributeError(f"{options} has no field {key!r}.")
                setattr(operator.builtinOptions, key, value)
        self.operators.append(operator)

    def _node(self, node: Node) -> None:
        if node.op == "dropout":  # The identity outside training.
            known = self.floats if node.is_float else self.integers
            known[node.name] = self._read(node.inputs[0], node.is_float)
            return
        if node.op not in _EMITTERS:
            raise TypeError(
                f"Layer {node.layer!r} ({node.op}) was kept in float and has no operator in this "
                "exporter; replace it or leave it out of the exported model."
            )
        inputs = [self._read(name, node.is_float) for name in node.inputs]
        if node.is_float:
            target = self._tensor(node.name, (1, *node.shape), np.float32)
            self.floats[node.name] = target
        else:
            params = lowering.tensor_params(self.graph, node.name)
            target = self._integer_tensor(node.name, node.shape, params)
            self.integers[node.name] = target
        _EMITTERS[node.op](self, node, inputs, target)

    def _fused(self, node: Node) -> int:
        kinds = self.schema.ActivationFunctionType
        return {"linear": kinds.NONE, "relu": kinds.RELU, "relu6": kinds.RELU6}[
            node.attrs["activation"]
        ]

    def _padding(self, node: Node) -> int:
        kinds = self.schema.Padding
        return {"same": kinds.SAME, "valid": kinds.VALID}[node.attrs["padding"]]

    def _kernel_and_bias(self, node: Node, transpose: tuple[int, ...], axis: int) -> list[int]:
        if node.is_float:
            kernel = node.weights["kernel"].transpose(transpose)
            return [
                self._tensor(f"{node.name}/kernel", kernel.shape, np.float32, data=kernel),
                self._constant(f"{node.name}/bias", node.weights["bias"], np.float32),
            ]
        owner = kernel_owner(node)
        if owner not in self.kernels:
            kernel, scales = lowering.integer_kernel(node)
            kernel = kernel.transpose(transpose)
            self.kernels[owner] = self._tensor(
                f"{owner}/kernel", kernel.shape, np.int8, scales, 0, axis, kernel
            )
        bias, bias_scales = lowering.integer_bias(self.graph, node)
        return [
            self.kernels[owner],
            self._tensor(f"{node.name}/bias", bias.shape, np.int32, bias_scales, 0, 0, bias),
        ]

    def _serialize(self, inputs, outputs, names) -> bytes:
        schema = self.schema
        graph = schema.SubGraphT()
        graph.name = b"main"
        graph.tensors, graph.operators = self.tensors, self.operators
        graph.inputs = np.asarray(inputs, np.int32)
        graph.outputs = np.asarray(outputs, np.int32)

        model = schema.ModelT()
        model.version = _SCHEMA_VERSION
        model.description = b"keras_effnet"
        model.subgraphs = [graph]
        model.buffers = []
        for data in self.buffers:
            buffer = schema.BufferT()
            buffer.data = np.frombuffer(data, np.uint8) if data else None
            model.buffers.append(buffer)
        model.operatorCodes = []
        for name, version in self.codes:
            code = schema.OperatorCodeT()
            code.builtinCode = getattr(schema.BuiltinOperator, name)
            # Old readers know this field alone; it ends at 127.
            code.deprecatedBuiltinCode = min(code.builtinCode, 127)
            code.version = version
            model.operatorCodes.append(code)
        signature = schema.SignatureDefT()
        signature.signatureKey = SIGNATURE.encode()
        signature.inputs = [_tensor_map(schema, INPUT_NAME, inputs[0])]
        signature.outputs = [
            _tensor_map(schema, name, index) for name, index in zip(names, outputs, strict=True)
        ]
        model.signatureDefs = [signature]
        return pack.pack_model(model, schema)


def _tensor_map(schema, name, index):
    item = schema.TensorMapT()
    item.name, item.tensorIndex = name.encode(), index
    return item


# How each op is written: (writer, node, indices of its inputs, index of its output).


def _conv(writer, node, inputs, target):
    weights = writer._kernel_and_bias(node, (3, 0, 1, 2), axis=0)
    strides, dilation = node.attrs["strides"], node.attrs["dilation"]
    writer._operator(
        "CONV_2D",
        1 if node.is_float else 3,
        [*inputs, *weights],
        [target],
        "Conv2DOptions",
        padding=writer._padding(node),
        strideH=strides[0],
        strideW=strides[1],
        dilationHFactor=dilation[0],
        dilationWFactor=dilation[1],
        fusedActivationFunction=writer._fused(node),
    )


def _depthwise(writer, node, inputs, target):
    weights = writer._kernel_and_bias(node, (3, 0, 1, 2), axis=3)
    strides, dilation = node.attrs["strides"], node.attrs["dilation"]
    writer._operator(
        "DEPTHWISE_CONV_2D",
        _float_depthwise_version(dilation) if node.is_float else 3,
        [*inputs, *weights],
        [target],
        "DepthwiseConv2DOptions",
        padding=writer._padding(node),
        strideH=strides[0],
        strideW=strides[1],
        dilationHFactor=dilation[0],
        dilationWFactor=dilation[1],
        depthMultiplier=1,
        fusedActivationFunction=writer._fused(node),
    )


def _float_depthwise_version(dilation):
    return 1 if tuple(dilation) == (1, 1) else 2


def _dense(writer, node, inputs, target):
    weights = writer._kernel_and_bias(node, (1, 0), axis=0)
    per_channel = not node.is_float and node.attrs["per_channel"]
    keeps = len(node.shape) > 1
    version = 12 if per_channel else 5 if keeps else 1 if node.is_float else 4
    writer._operator(
        "FULLY_CONNECTED",
        version,
        [*inputs, *weights],
        [target],
        "FullyConnectedOptions",
        fusedActivationFunction=writer._fused(node),
        keepNumDims=keeps,
    )


def _elementwise(name, options):
    def emit(writer, node, inputs, target):
        version = 1 if node.is_float else 2
        if name == "MUL" and not node.is_float:
            first, second = (lowering.tensor_params(writer.graph, other) for other in node.inputs)
            version = _product_version(first.scale * second.scale, node.params.scale)
        writer._operator(name, version, inputs, [target], options)

    return emit


def _scale(writer, node, inputs, target):
    factors, params = lowering.integer_factors(node)
    constant = writer._tensor(
        f"{node.name}/factors",
        (1,) * len(node.shape) + factors.shape,
        np.int8,
        [params.scale],
        params.zero_point,
        data=factors,
    )
    source = lowering.tensor_params(writer.graph, node.inputs[0])
    version = _product_version(source.scale * params.scale, node.params.scale)
    writer._operator("MUL", version, [*inputs, constant], [target], "MulOptions")


def _shift(writer, node, inputs, target):
    # Integers of up to 9 bits as int8 of scale 1, by their zero point. One serves all if they
    # agree; else they are repeated for a row of pixels: XNNPACK is slow at broadcasting so few.
    offsets = node.weights["offset"].astype(int)
    same = len(np.unique(offsets)) == 1
    offsets = offsets[:1] if same else np.broadcast_to(offsets, node.shape[1:])
    middle = (int(offsets.min()) + int(offsets.max())) // 2
    zero_point = int(np.clip(-middle, INT8_MIN, INT8_MAX))
    constant = writer._tensor(
        f"{node.name}/offset",
        (1,) * (len(node.shape) + 1 - offsets.ndim) + offsets.shape,
        np.int8,
        [1.0],
        zero_point,
        data=offsets + zero_point,
    )
    writer._operator("ADD", 2, [*inputs, constant], [target], "AddOptions")


def _activation(name, options=None, **values):
    def emit(writer, node, inputs, target):
        version = 1 if node.is_float else 2
        writer._operator(name, version, inputs, [target], options, **values)

    return emit


def _hard_swish(writer, node, inputs, target):
    if node.is_float or not writer.for_edge_tpu:
        writer._operator("HARD_SWISH", 1, inputs, [target])
        return
    # x * clip(x / 6 + 1 / 2, 0, 1): the clipping is the saturation of the second factor's range.
    source = lowering.tensor_params(writer.graph, node.inputs[0])
    channels = node.shape[-1]
    kernel_scale = 1 / 6 / KERNEL_MAX
    bias_scale = source.scale * kernel_scale
    kernel = np.full((1, 1, 1, channels), KERNEL_MAX, np.int8)
    bias = np.full(channels, round(0.5 / bias_scale), np.int32)
    weights = [
        writer._tensor(f"{node.name}/slope", kernel.shape, np.int8, [kernel_scale], data=kernel),
        writer._tensor(f"{node.name}/offset", bias.shape, np.int32, [bias_scale], data=bias),
    ]
    gate_params = QuantParams(1 / (INT8_MAX - INT8_MIN), INT8_MIN)
    gate = writer._integer_tensor(f"{node.name}/gate", node.shape, gate_params)
    schema = writer.schema
    writer._operator(
        "DEPTHWISE_CONV_2D",
        3,
        [*inputs, *weights],
        [gate],
        "DepthwiseConv2DOptions",
        padding=schema.Padding.VALID,
        strideH=1,
        strideW=1,
        dilationHFactor=1,
        dilationWFactor=1,
        depthMultiplier=1,
    )
    version = _product_version(source.scale * gate_params.scale, node.params.scale)
    writer._operator("MUL", version, [*inputs, gate], [target], "MulOptions")


def _product_version(factor, scale):
    """MUL 2 takes factors below 1 alone."""
    return 3 if factor >= scale else 2


def _split_mean(writer, node, inputs):
    """Averages blocks of pixels first, so that the mean that is left is one that maps.

    The first step rounds to the steps of its input, and its errors average out in the second. Ties
    do not, AVERAGE_POOL_2D rounds them away from 0: an odd number of pixels has none, and of many
    they are rare.
    """
    height, width = writer.graph[node.inputs[0]].shape[:2]
    blocks = [
        (rows, columns)
        for rows in _divisors(height)
        for columns in _divisors(width)
        if height * width <= targets.LARGEST_MEAN * rows * columns
    ]

    def preference(block):
        pixels = block[0] * block[1]
        has_ties = pixels % 2 == 0 and pixels < _RARE_TIES
        return has_ties, pixels, abs(block[0] - block[1])

    rows, columns = min(blocks, key=preference)
    params = lowering.tensor_params(writer.graph, node.inputs[0])
    shape = (height // rows, width // columns, node.shape[-1])
    pooled = writer._integer_tensor(f"{node.name}/blocks", shape, params)
    writer._operator(
        "AVERAGE_POOL_2D",
        2,
        inputs,
        [pooled],
        "Pool2DOptions",
        padding=writer.schema.Padding.VALID,
        filterHeight=rows,
        filterWidth=columns,
        strideH=rows,
        strideW=columns,
    )
    return [pooled]


def _divisors(number):
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _global_pool(name):
    def emit(writer, node, inputs, target):
        if name == "MEAN" and writer.for_edge_tpu and not node.is_float:
            height, width = writer.graph[node.inputs[0]].shape[:2]
            if height * width > targets.LARGEST_MEAN:
                inputs = _split_mean(writer, node, inputs)
        axes = writer._constant("spatial_axes", [1, 2], np.int32)
        writer._operator(
            name,
            1 if node.is_float else 2,
            [*inputs, axes],
            [target],
            "ReducerOptions",
            keepDims=bool(node.attrs["keepdims"]),
        )

    return emit


def _pool(name):
    def emit(writer, node, inputs, target):
        pool, strides = node.attrs["pool_size"], node.attrs["strides"]
        writer._operator(
            name,
            1 if node.is_float else 2,
            inputs,
            [target],
            "Pool2DOptions",
            padding=writer._padding(node),
            filterHeight=pool[0],
            filterWidth=pool[1],
            strideH=strides[0],
            strideW=strides[1],
        )

    return emit


def _pad(writer, node, inputs, target):
    paddings = writer._constant(
        f"{node.name}/paddings", [(0, 0), *node.attrs["padding"], (0, 0)], np.int32
    )
    writer._operator("PAD", 1 if node.is_float else 2, [*inputs, paddings], [target], "PadOptions")


def _reshape(writer, node, inputs, target):
    shape = [1, *node.shape]
    constant = writer._constant(f"{node.name}/shape", shape, np.int32)
    writer._operator("RESHAPE", 1, [*inputs, constant], [target], "ReshapeOptions", newShape=shape)


def _concat(writer, node, inputs, target):
    writer._operator(
        "CONCATENATION",
        1 if node.is_float else 2,
        inputs,
        [target],
        "ConcatenationOptions",
        axis=len(node.shape),
    )


_EMITTERS = {
    "conv": _conv,
    "depthwise": _depthwise,
    "dense": _dense,
    "scale": _scale,
    "shift": _shift,
    "add": _elementwise("ADD", "AddOptions"),
    "mul": _elementwise("MUL", "MulOptions"),
    "sigmoid": _activation("LOGISTIC"),
    "softmax": _activation("SOFTMAX", "SoftmaxOptions", beta=1.0),
    "relu": _activation("RELU"),
    "relu6": _activation("RELU6"),
    "hard_swish": _hard_swish,
    "global_avg": _global_pool("MEAN"),
    "global_max": _global_pool("REDUCE_MAX"),
    "avg_pool": _pool("AVERAGE_POOL_2D"),
    "max_pool": _pool("MAX_POOL_2D"),
    "pad": _pad,
    "reshape": _reshape,
    "concat": _concat,
}
