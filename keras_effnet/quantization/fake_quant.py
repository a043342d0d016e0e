"""Keras layers that compute what integer kernels compute.

`FakeQuant` rounds a tensor to 256 levels; the quantized convolutions and dense layer round their
kernels. Gradients pass straight through the rounding (and to learned ranges where values are
clipped), as `keras.quantizers.fake_quant_with_min_max_vars` defines them.

That function drops its arguments when it is applied to a symbolic Keras tensor, so it is used
inside `Layer.call` alone.

What is trained is stored in units of its own range: kernels in units of the limit of their channel,
biases in that of a kernel whose input is as large as the largest, ranges in that of their width.
Folded and equalized channels differ by factors of thousands, and an optimizer such as Adam moves
every variable by about its learning rate: a rate that is right for one channel would wreck another.
In these units the usual rates fit all: 1e-4 is 1/80 of a kernel's step. Units are powers of two, so
that the real values are exact.

Rounding stays in float32 under mixed precision.
"""

import keras
import numpy as np
from keras import ops

from .params import KERNEL_MAX, UNIT_INTERVAL, QuantParams

PACKAGE = "keras_effnet"


# How training treats ranges.
FIXED_RANGES, MOVING_AVERAGE, LEARNED = "fixed", "moving_average", "learned"
TRAINING_RANGES = (FIXED_RANGES, MOVING_AVERAGE, LEARNED)
# Share of the old range that one batch leaves, of a range that follows the batches.
RANGE_MOMENTUM = 0.99
# As `keras.layers.BatchNormalization` has them by default.
NORM_MOMENTUM, NORM_EPSILON = 0.99, 1e-3
# A channel that a batch norm keeps at less than this part of the largest is dead.
LEAST_DEVIATION = 1e-3
# A learned range keeps at least this part of its first width: it never collapses.
LEAST_WIDTH = 1 / 256


def power_of_two(values) -> np.ndarray:
    """Returns the smallest powers of two that are not below positive numbers, float32."""
    return np.exp2(np.ceil(np.log2(np.asarray(values, np.float64)))).astype(np.float32)


def fake_quant(values, low, high, bounded=False, **kwargs):
    """`keras.quantizers.fake_quant_with_min_max_vars` for a range that no gradient trains.

    It rounds as that does, and its gradient to the values is 1 where they lie in the range. That
    function moves a range without a level at 0 by up to half a step, and has its gradient there. It
    also sums what was clipped, at both ends, which takes as long as all the rest, and keeps the
    values for it; here a mask is kept, a quarter of their size.

    Args:
        values: Float32 tensor.
        low: Smallest value of the range, or of each channel.
        high: Largest value of the range, or of each channel.
        bounded: Whether the values cannot leave the range by as much as a step: their gradient is 1
            everywhere, and nothing is kept.
        kwargs: Further arguments of that function.
    """

    @ops.custom_gradient
    def straight_through(values, low, high):
        inside = None if bounded else ops.logical_and(values >= low, values <= high)

        def gradient(*args, upstream=None):
            upstream = args[0] if upstream is None else upstream
            nothing = ops.zeros_like(low)
            # No product with the mask as numbers: TensorFlow makes those at once, and keeps them.
            passed = upstream if bounded else ops.where(inside, upstream, 0.0)
            return passed, nothing, nothing

        return keras.quantizers.fake_quant_with_min_max_vars(values, low, high, **kwargs), gradient

    # PyTorch keeps tensors alone, and limits of kernels are variables.
    return straight_through(*(ops.convert_to_tensor(value) for value in (values, low, high)))


def _fake_quant_kernel(kernel, limits, axis):
    # Apart from TensorFlow's, the backends of Keras quantize along the last axis alone.
    rounded = fake_quant(
        ops.swapaxes(kernel, axis, -1), -limits, limits, num_bits=8, narrow_range=True, axis=-1
    )
    return ops.swapaxes(rounded, axis, -1)


class _Beyond(keras.constraints.Constraint):
    """Keeps a bound on its side of 0, at least so far away."""

    def __init__(self, sign, least):
        self.sign, self.least = sign, least

    def __call__(self, value):
        return self.sign * ops.maximum(self.sign * value, self.least)


@keras.saving.register_keras_serializable(package=PACKAGE)
class FakeQuant(keras.layers.Layer):
    """Rounds a tensor to the 256 levels of one range: quantize, then dequantize.

    Args:
        minimum: Initial smallest real value, at most 0.
        maximum: Initial largest real value, at least 0.
        fixed: Whether the range belongs to the operation (logistic and softmax outputs, pixels)
            and never moves. Such outputs do not leave it by as much as a step, so no gradient is
            cut at its ends.
        ranges: What training does to the range: "fixed" leaves it; "moving_average" lets it follow
            the extremes of the batches until it is frozen (`FreezeRanges`); "learned" trains it by
            the gradient of the values that it clips (PACT, Choi et al., 2018, section 3,
            https://arxiv.org/abs/1805.06085).
        name: Name of the layer.
        dtype: Dtype policy. Rounding is done in float32 whatever it is.

    Call arguments:
        inputs: Float tensor of any shape.

    Returns:
        A tensor of the same shape and dtype.

    Raises:
        ValueError: If the range is not finite, is empty or does not contain 0, or `ranges` is
            unknown.

    Source: TFLite 8-bit quantization specification; Jacob et al., 2018, section 3
    (https://arxiv.org/abs/1712.05877).
    """

    def __init__(self, minimum, maximum, fixed=False, ranges=FIXED_RANGES, name=None, dtype=None):
        # Refuses an unusable range before a model is built on it.
        QuantParams.from_range(minimum, maximum)
        if ranges not in TRAINING_RANGES:
            raise ValueError(f"`ranges` must be one of {TRAINING_RANGES}. Received: {ranges!r}")
        self.ranges = FIXED_RANGES if fixed else ranges
        super().__init__(name=name, dtype=dtype, trainable=self.ranges == LEARNED)
        self.initial_minimum = float(minimum)
        self.initial_maximum = float(maximum)
        self.fixed = fixed
        self.unit = float(power_of_two(maximum - minimum))
        # Whether it does anything (`training.unrounded_outputs`).
        self.rounds = True

    def build(self, input_shape):
        # The bound that is farther from 0 stays away from it, so that the range never collapses.
        least = LEAST_WIDTH * (self.initial_maximum - self.initial_minimum) / self.unit
        negative = -self.initial_minimum > self.initial_maximum
        self.minimum = self._add_bound("minimum", self.initial_minimum, -1, least * negative)
        self.maximum = self._add_bound("maximum", self.initial_maximum, 1, least * (not negative))
        if self.ranges == MOVING_AVERAGE:
            self.moving = self.add_weight(
                shape=(), initializer="ones", trainable=False, autocast=False, name="moving"
            )

    def _add_bound(self, name, value, sign, least):
        return self.add_weight(
            shape=(),
            initializer=keras.initializers.Constant(value / self.unit),
            constraint=_Beyond(sign, least),
            trainable=self.ranges == LEARNED,
            autocast=False,
            # Replicas that see different batches agree on one range.
            aggregation="mean",
            name=name,
        )

    def call(self, inputs, training=None):
        values = ops.cast(inputs, "float32")
        if self.ranges == MOVING_AVERAGE and training:
            self._follow(values)
        if not self.rounds:
            return inputs
        ends = self.minimum * self.unit, self.maximum * self.unit
        if self.ranges == LEARNED:
            rounded = keras.quantizers.fake_quant_with_min_max_vars(values, *ends)
        else:
            rounded = fake_quant(values, *ends, bounded=self.fixed)
        return ops.cast(rounded, inputs.dtype)

    def _follow(self, values):
        share = (1 - RANGE_MOMENTUM) * self.moving
        low = ops.minimum(ops.min(values) / self.unit, 0.0)
        high = ops.maximum(ops.max(values) / self.unit, 0.0)
        self.minimum.assign(self.minimum + share * (low - self.minimum))
        self.maximum.assign(self.maximum + share * (high - self.maximum))

    @property
    def is_moving(self) -> bool:
        """Whether the range follows the batches in training."""
        return self.ranges == MOVING_AVERAGE and float(ops.convert_to_numpy(self.moving)) > 0

    def freeze(self):
        """Stops a range that follows the batches."""
        if self.ranges == MOVING_AVERAGE:
            self.moving.assign(0.0)

    def set_range(self, minimum, maximum):
        """Sets the range, in real values."""
        QuantParams.from_range(minimum, maximum)
        self.minimum.assign(minimum / self.unit)
        self.maximum.assign(maximum / self.unit)

    def real_range(self) -> tuple[float, float]:
        """Returns the smallest and the largest real value."""
        low, high = (ops.convert_to_numpy(value) for value in (self.minimum, self.maximum))
        # An optimizer averages bounds before their constraint brings them back to their side of 0.
        low, high = np.minimum(low, 0), np.maximum(high, 0)
        return float(low * np.float32(self.unit)), float(high * np.float32(self.unit))

    def compute_output_shape(self, input_shape):
        return input_shape

    @property
    def params(self) -> QuantParams:
        """The scale and zero point of the tensor."""
        return QuantParams.from_range(*self.real_range())

    def get_config(self):
        return {
            "name": self.name,
            "minimum": self.initial_minimum,
            "maximum": self.initial_maximum,
            "fixed": self.fixed,
            "ranges": self.ranges,
            "dtype": keras.dtype_policies.serialize(self.dtype_policy),
        }


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
class OneSided(keras.layers.Layer):
    """Keeps the positive or the negative values of a tensor; the others become 0.

    An integer kernel does it by the range of its output, which ends at 0 (`splitting.py`).

    Args:
        sign: 1 for the positive side, -1 for the negative one.
        name: Name of the layer.

    Raises:
        ValueError: If the sign is neither 1 nor -1.
    """

    def __init__(self, sign, name=None):
        super().__init__(name=name, trainable=False)
        if sign not in (1, -1):
            raise ValueError(f"`sign` must be 1 or -1. Received: {sign!r}")
        self.sign = sign

    def call(self, inputs):
        return self.sign * ops.relu(self.sign * inputs)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {"name": self.name, "sign": self.sign}


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
    """What the layers with quantized kernels share: units and limits of the kernel."""

    # Axis of the kernel that holds the output channels.
    channel_axis = -1
    batch_norm = False

    def add_weight(self, *args, **kwargs):
        # Kernels are rounded in float32, whatever the layer computes in.
        return super().add_weight(*args, autocast=False, **kwargs)

    def _build_limits(self, channels, filters):
        def constant(name, shape):
            return self.add_weight(shape=(shape,), initializer="ones", trainable=False, name=name)

        self.kernel_limits = constant("kernel_limits", channels)
        self.kernel_unit = constant("kernel_unit", channels)
        self.bias_unit = constant("bias_unit", filters)
        if self.batch_norm:
            # Of the normalized output, (output - mean) / deviation: all of them near 0 or 1.
            self.mean, self.deviation = constant("mean", filters), constant("deviation", filters)
            self.moving_mean = constant("moving_mean", filters)
            self.moving_variance = constant("moving_variance", filters)
            self.moving = constant("moving", 1)
            self.gamma = self.add_weight(shape=(filters,), initializer="ones", name="gamma")
            self.beta = self.add_weight(shape=(filters,), initializer="zeros", name="beta")
            self.moving_mean.assign(np.zeros(filters))

    def along_kernel(self, values):
        """Returns one value for each channel in a shape that broadcasts against the kernel."""
        # The channels of a depthwise kernel stand before its last axis.
        return values if self.channel_axis == -1 else values[:, None]

    def _compute(self, inputs, operation, training=None):
        """Applies `operation(inputs, kernel)`, the bias and the activation."""
        outputs = operation(inputs, ops.cast(self.quantized_kernel(), inputs.dtype))
        outputs = ops.add(outputs, ops.cast(self._folded_bias(), outputs.dtype))
        if self.batch_norm and training:
            outputs = ops.cast(self._normalized(ops.cast(outputs, "float32")), outputs.dtype)
        return self.activation(outputs)

    def _folded_kernel(self):
        kernel = self.kernel * self.along_kernel(self.kernel_unit)
        return kernel * self.along_kernel(self._gain()) if self.batch_norm else kernel

    def _folded_bias(self):
        bias = self.bias * self.bias_unit
        if not self.batch_norm:
            return bias
        normalized = (bias - self.mean) / self.deviation - self.moving_mean
        return (normalized * self._gain() + self.beta) * self.deviation + self.mean

    def _gain(self):
        return self.gamma / ops.sqrt(self.moving_variance)

    def _normalized(self, outputs):
        """Corrects outputs that were normalized by the moving moments to the batch's.

        While the moments move, the kernel is folded (and rounded) with the moving variance, and
        its outputs are corrected (Krishnamoorthi, 2018, section 3.2.2,
        https://arxiv.org/abs/1806.08342); one convolution serves for both.
        """
        values = (outputs - self.mean) / self.deviation
        axes = tuple(range(len(outputs.shape) - 1))
        mean, variance = ops.mean(values, axes), ops.var(values, axes)
        normalized = (values - mean) * ops.rsqrt(variance + NORM_EPSILON) * ops.abs(self.gamma)
        corrected = (normalized + self.beta) * self.deviation + self.mean
        # In the units of the kernel before folding, which the moving moments describe.
        gain = self._gain()
        share = (1 - NORM_MOMENTUM) * self.moving
        self.moving_mean.assign(self.moving_mean + share * (mean - self.beta) / gain)
        change = variance / ops.square(gain) - self.moving_variance
        self.moving_variance.assign(self.moving_variance + share * change)
        return ops.where(self.moving > 0, corrected, outputs)

    def set_moments(self, mean, deviation):
        """Sets the moments to which the batch norm brings the outputs, in real values."""
        least = LEAST_DEVIATION * max(float(np.max(deviation)), 1e-6)
        self.mean.assign(mean)
        self.deviation.assign(np.maximum(deviation, least))

    @property
    def is_moving(self) -> bool:
        """Whether training normalizes by the moments of the batches."""
        return self.batch_norm and float(ops.convert_to_numpy(self.moving)[0]) > 0

    def freeze(self):
        """Freezes the moments of the batch norm: training goes on with the folded kernel."""
        if self.batch_norm:
            self.moving.assign([0.0])

    def quantized_kernel(self):
        """Returns the kernel rounded to the integers of its limits, in real values, float32."""
        return _fake_quant_kernel(self._folded_kernel(), self.kernel_limits, self.channel_axis)

    # The convolutions of Keras save their kernel and bias alone; the limits belong to them too.
    def save_own_variables(self, store):
        keras.layers.Layer.save_own_variables(self, store)

    def load_own_variables(self, store):
        keras.layers.Layer.load_own_variables(self, store)

    def set_real(self, kernel, bias, limits=None, input_reach=None):
        """Sets kernel and bias, in real values, with the batch norm folded into them.

        Args:
            kernel: Array of the kernel's shape.
            bias: Array of the bias' shape.
            limits: Largest magnitudes of the channels of the kernel; by default they stay.
            input_reach: Largest magnitude of the layer's input. Given with the limits it renews the
                units, so that the optimizer's slots of a model in training fit no more.
        """
        if limits is not None:
            self.kernel_limits.assign(limits)
        if input_reach is not None:
            unit = power_of_two(ops.convert_to_numpy(self.kernel_limits))
            self.kernel_unit.assign(unit)
            self.bias_unit.assign(np.broadcast_to(unit * power_of_two(input_reach), bias.shape))
        unit = self.along_kernel(ops.convert_to_numpy(self.kernel_unit))
        self.kernel.assign(kernel / unit)
        self.bias.assign(bias / ops.convert_to_numpy(self.bias_unit))
        if self.batch_norm:
            for variable, value in (
                (self.gamma, 1.0),
                (self.beta, 0.0),
                (self.moving_mean, 0.0),
                (self.moving_variance, 1.0),
            ):
                variable.assign(np.full(variable.shape, value))

    def real_kernel(self) -> np.ndarray:
        """Returns the folded kernel as it is trained, not rounded, in real values."""
        return ops.convert_to_numpy(self._folded_kernel())

    def real_bias(self) -> np.ndarray:
        """Returns the folded bias in real values."""
        return ops.convert_to_numpy(self._folded_bias())


@keras.saving.register_keras_serializable(package=PACKAGE)
class QuantizedConv2D(_QuantizedKernel, keras.layers.Conv2D):
    """`keras.layers.Conv2D` whose kernel has 8 bits, one scale for each output channel.

    Args:
        batch_norm: Whether training normalizes the output by the moments of the batches, with a
            scale and an offset for each channel; outside training they are folded into kernel and
            bias.

    The other arguments are those of `keras.layers.Conv2D`.
    """

    def __init__(self, *args, batch_norm=False, **kwargs):
        super().__init__(*args, **kwargs)
        self.batch_norm = batch_norm

    def build(self, input_shape):
        super().build(input_shape)
        self._build_limits(self.filters, self.filters)

    def call(self, inputs, training=None):
        return self._compute(inputs, self.convolution_op, training)

    def get_config(self):
        return {**super().get_config(), "batch_norm": self.batch_norm}


@keras.saving.register_keras_serializable(package=PACKAGE)
class QuantizedDepthwiseConv2D(_QuantizedKernel, keras.layers.DepthwiseConv2D):
    """`keras.layers.DepthwiseConv2D` whose kernel has 8 bits, one scale for each channel.

    Args:
        batch_norm: As in `QuantizedConv2D`.

    The other arguments are those of `keras.layers.DepthwiseConv2D`; the depth multiplier must be 1.
    """

    channel_axis = 2

    def __init__(self, *args, batch_norm=False, **kwargs):
        super().__init__(*args, **kwargs)
        self.batch_norm = batch_norm

    def build(self, input_shape):
        super().build(input_shape)
        self._build_limits(self.kernel.shape[2], self.kernel.shape[2])

    def call(self, inputs, training=None):
        return self._compute(inputs, self._convolve, training)

    def get_config(self):
        return {**super().get_config(), "batch_norm": self.batch_norm}

    def _convolve(self, inputs, kernel):
        return ops.depthwise_conv(
            inputs,
            kernel,
            strides=self.strides,
            padding=self.padding,
            data_format=self.data_format,
            dilation_rate=self.dilation_rate,
        )


@keras.saving.register_keras_serializable(package=PACKAGE)
class QuantizedDense(_QuantizedKernel, keras.layers.Layer):
    """`keras.layers.Dense` whose kernel has 8 bits, one scale for each unit or one for all.

    Args:
        units: Number of units.
        per_channel: Whether each unit has its own scale. FULLY_CONNECTED takes them from version
            12 on, so old runtimes and the Edge TPU need one scale.
        activation: Activation, as in `keras.layers.Dense`.
        name: Name of the layer.
        dtype: Dtype policy. Kernels are rounded in float32 whatever it is.
    """

    def __init__(self, units, per_channel=True, activation=None, name=None, dtype=None):
        super().__init__(name=name, dtype=dtype)
        self.units = units
        self.activation = keras.activations.get(activation)
        self.use_bias = True
        self.per_channel = per_channel

    def build(self, input_shape):
        self.kernel = self.add_weight(shape=(input_shape[-1], self.units), name="kernel")
        self.bias = self.add_weight(shape=(self.units,), initializer="zeros", name="bias")
        self._build_limits(self.units if self.per_channel else 1, self.units)

    def quantized_kernel(self):
        if self.per_channel:
            return super().quantized_kernel()
        limits = self.kernel_limits[0]
        return fake_quant(
            self.kernel * self.kernel_unit, -limits, limits, num_bits=8, narrow_range=True
        )

    def call(self, inputs):
        return self._compute(inputs, ops.matmul)

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], self.units)

    def get_config(self):
        return {
            "name": self.name,
            "units": self.units,
            "per_channel": self.per_channel,
            "activation": keras.activations.serialize(self.activation),
            "dtype": keras.dtype_policies.serialize(self.dtype_policy),
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
    "OneSided",
    "PixelShift",
    "QuantizedConv2D",
    "QuantizedDense",
    "QuantizedDepthwiseConv2D",
    "factor_params",
]
