"""Keras layers that compute what integer kernels compute.

`FakeQuant` rounds a tensor to 256 levels; the quantized convolutions and dense layer round their
kernels. Gradients pass straight through the rounding (and to the ranges where values are clipped),
as `keras.quantizers.fake_quant_with_min_max_vars` defines them.

That function drops its arguments when it is applied to a symbolic Keras tensor, so it is used
inside `Layer.call` alone.
"""

import keras
import numpy as np
from keras import ops

from .params import KERNEL_MAX, UNIT_INTERVAL, QuantParams

PACKAGE = "keras_effnet"


def _fake_quant_kernel(kernel, limits, axis):
    # Apart from TensorFlow's, the backends of Keras quantize along the last axis alone.
    rounded = keras.quantizers.fake_quant_with_min_max_vars(
        ops.swapaxes(kernel, axis, -1), -limits, limits, num_bits=8, narrow_range=True, axis=-1
    )
    return ops.swapaxes(rounded, axis, -1)


@keras.saving.register_keras_serializable(package=PACKAGE)
class FakeQuant(keras.layers.Layer):
    """Rounds a tensor to the 256 levels of one range: quantize, then dequantize.

    Args:
        minimum: Initial smallest real value, at most 0.
        maximum: Initial largest real value, at least 0.
        fixed: Whether the range belongs to the operation (logistic and softmax outputs, pixels)
            and must never be trained.
        trainable: Whether training moves the range.
        name: Name of the layer.

    Call arguments:
        inputs: Float tensor of any shape.

    Returns:
        A tensor of the same shape and dtype.

    Source: TFLite 8-bit quantization specification; Jacob et al., 2018, section 3
    (https://arxiv.org/abs/1712.05877).
    """

    def __init__(self, minimum, maximum, fixed=False, trainable=False, name=None):
        super().__init__(name=name, trainable=trainable and not fixed)
        # Refuses an unusable range before a model is built on it.
        QuantParams.from_range(minimum, maximum)
        self.initial_minimum = float(minimum)
        self.initial_maximum = float(maximum)
        self.fixed = fixed

    def build(self, input_shape):
        self.minimum = self.add_weight(
            shape=(),
            initializer=keras.initializers.Constant(self.initial_minimum),
            name="minimum",
        )
        self.maximum = self.add_weight(
            shape=(),
            initializer=keras.initializers.Constant(self.initial_maximum),
            name="maximum",
        )

    def call(self, inputs):
        return keras.quantizers.fake_quant_with_min_max_vars(inputs, self.minimum, self.maximum)

    def compute_output_shape(self, input_shape):
        return input_shape

    @property
    def params(self) -> QuantParams:
        """The scale and zero point of the tensor."""
        return QuantParams.from_range(
            float(ops.convert_to_numpy(self.minimum)), float(ops.convert_to_numpy(self.maximum))
        )

    def get_config(self):
        config = {
            "name": self.name,
            "minimum": self.initial_minimum,
            "maximum": self.initial_maximum,
            "fixed": self.fixed,
            "trainable": self.trainable,
        }
        return config


@keras.saving.register_keras_serializable(package=PACKAGE)
class Dequantize(keras.layers.Layer):
    """Marks the place where an integer tensor becomes float: the identity, in float.

    What follows it computes in float until the next `FakeQuant`.
    """

    def call(self, inputs):
        return inputs

    def compute_output_shape(self, input_shape):
        return input_shape


@keras.saving.register_keras_serializable(package=PACKAGE)
class ChannelScale(keras.layers.Layer):
    """Multiplies each channel by a positive constant of 8 bits.

    The constants are integer multiples of one step, so that an integer kernel can hold them.

    Args:
        factors: Sequence of positive factors, one for each channel.
        name: Name of the layer.

    Raises:
        ValueError: If a factor is not positive and finite.
    """

    def __init__(self, factors, name=None):
        super().__init__(name=name, trainable=False)
        factors = np.asarray(factors, np.float32)
        if factors.ndim != 1 or not (np.all(np.isfinite(factors)) and np.all(factors > 0)):
            raise ValueError(
                "`factors` must be a sequence of positive finite numbers, one for each channel. "
                f"Received: {factors}"
            )
        self.initial_factors = factors

    def build(self, input_shape):
        self.factors = self.add_weight(
            shape=self.initial_factors.shape, initializer="zeros", name="factors"
        )
        self.factors.assign(self.initial_factors)

    def call(self, inputs):
        high = ops.max(self.factors)
        factors = keras.quantizers.fake_quant_with_min_max_vars(
            self.factors, ops.zeros_like(high), high
        )
        return ops.multiply(inputs, factors)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {"name": self.name, "factors": [float(value) for value in self.initial_factors]}


@keras.saving.register_keras_serializable(package=PACKAGE)
class PixelShift(keras.layers.Layer):
    """Adds integers to 8-bit pixels, so that 0 stands for the value that a convolution pads.

    Args:
        offsets: Sequence of integers, one for each channel.
        name: Name of the layer.

    Raises:
        ValueError: If an offset is no integer.
    """

    def __init__(self, offsets, name=None):
        super().__init__(name=name)
        if any(offset != int(offset) for offset in offsets):
            raise ValueError(f"`offsets` must be integers. Received: {list(offsets)}")
        self.offsets = [int(offset) for offset in offsets]

    def call(self, inputs):
        return ops.add(inputs, ops.convert_to_tensor(self.offsets, dtype=inputs.dtype))

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {"name": self.name, "offsets": self.offsets}


class _QuantizedKernel:
    """What the layers with quantized kernels share: the limits of the kernel."""

    # Axis of the kernel that holds the output channels.
    channel_axis = -1

    def _build_limits(self, channels):
        self.kernel_limits = self.add_weight(
            shape=(channels,), initializer="ones", trainable=False, name="kernel_limits"
        )

    def quantized_kernel(self):
        """Returns the kernel rounded to the integers of its limits, in float."""
        return _fake_quant_kernel(self.kernel, self.kernel_limits, self.channel_axis)

    # The convolutions of Keras save their kernel and bias alone; the limits belong to them too.
    def save_own_variables(self, store):
        keras.layers.Layer.save_own_variables(self, store)

    def load_own_variables(self, store):
        keras.layers.Layer.load_own_variables(self, store)

    def fit_limits(self):
        """Sets the limits to the largest magnitude of each channel of the present kernel."""
        kernel = np.abs(ops.convert_to_numpy(self.kernel))
        axes = tuple(axis for axis in range(kernel.ndim) if axis != self.channel_axis % kernel.ndim)
        limits = kernel.max(axis=axes)
        # A dead channel may take any limit: it holds zeros.
        self.kernel_limits.assign(np.where(limits > 0, limits, 1.0))


@keras.saving.register_keras_serializable(package=PACKAGE)
class QuantizedConv2D(_QuantizedKernel, keras.layers.Conv2D):
    """`keras.layers.Conv2D` whose kernel has 8 bits, one scale for each output channel."""

    def build(self, input_shape):
        super().build(input_shape)
        self._build_limits(self.filters)

    def call(self, inputs):
        outputs = self.convolution_op(inputs, self.quantized_kernel())
        return self.activation(ops.add(outputs, self.bias))


@keras.saving.register_keras_serializable(package=PACKAGE)
class QuantizedDepthwiseConv2D(_QuantizedKernel, keras.layers.DepthwiseConv2D):
    """`keras.layers.DepthwiseConv2D` whose kernel has 8 bits, one scale for each channel.

    The depth multiplier must be 1.
    """

    channel_axis = 2

    def build(self, input_shape):
        super().build(input_shape)
        self._build_limits(self.kernel.shape[2])

    def call(self, inputs):
        outputs = ops.depthwise_conv(
            inputs,
            self.quantized_kernel(),
            strides=self.strides,
            padding=self.padding,
            data_format=self.data_format,
            dilation_rate=self.dilation_rate,
        )
        return self.activation(ops.add(outputs, self.bias))


@keras.saving.register_keras_serializable(package=PACKAGE)
class QuantizedDense(_QuantizedKernel, keras.layers.Layer):
    """`keras.layers.Dense` whose kernel has 8 bits, one scale for each unit or one for all.

    Args:
        units: Number of units.
        per_channel: Whether each unit has its own scale. FULLY_CONNECTED takes them from version
            12 on, so old runtimes and the Edge TPU need one scale.
        activation: Activation, as in `keras.layers.Dense`.
        name: Name of the layer.
    """

    def __init__(self, units, per_channel=True, activation=None, name=None):
        super().__init__(name=name)
        self.units = units
        self.activation = keras.activations.get(activation)
        self.use_bias = True
        self.per_channel = per_channel

    def build(self, input_shape):
        self.kernel = self.add_weight(shape=(input_shape[-1], self.units), name="kernel")
        self.bias = self.add_weight(shape=(self.units,), initializer="zeros", name="bias")
        self._build_limits(self.units if self.per_channel else 1)

    def quantized_kernel(self):
        if self.per_channel:
            return super().quantized_kernel()
        limits = self.kernel_limits[0]
        return keras.quantizers.fake_quant_with_min_max_vars(
            self.kernel, -limits, limits, num_bits=8, narrow_range=True
        )

    def fit_limits(self):
        super_limits = np.abs(ops.convert_to_numpy(self.kernel)).max(axis=0)
        limits = super_limits if self.per_channel else np.max(super_limits, keepdims=True)
        self.kernel_limits.assign(np.where(limits > 0, limits, 1.0))

    def call(self, inputs):
        outputs = ops.matmul(inputs, self.quantized_kernel())
        return self.activation(ops.add(outputs, self.bias))

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], self.units)

    def get_config(self):
        return {
            "name": self.name,
            "units": self.units,
            "per_channel": self.per_channel,
            "activation": keras.activations.serialize(self.activation),
        }


QUANTIZED_KERNELS = (QuantizedConv2D, QuantizedDepthwiseConv2D, QuantizedDense)


def factor_params(factors: np.ndarray) -> QuantParams:
    """Returns the quantization parameters of the constant of a `ChannelScale` layer."""
    return QuantParams.from_range(0.0, float(np.max(factors)))


__all__ = [
    "KERNEL_MAX",
    "QUANTIZED_KERNELS",
    "UNIT_INTERVAL",
    "ChannelScale",
    "Dequantize",
    "FakeQuant",
    "PixelShift",
    "QuantizedConv2D",
    "QuantizedDense",
    "QuantizedDepthwiseConv2D",
    "factor_params",
]
