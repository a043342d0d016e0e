"""Quantization parameters and the NumPy reference of quantize and dequantize.

The rules are those of the TFLite 8-bit specification
(https://ai.google.dev/edge/litert/models/quantization_spec) and of TensorFlow's
`fake_quant_with_min_max_vars`:

* real = scale * (q - zero_point);
* activations: int8, asymmetric, one scale and one zero point for the tensor;
* kernels: int8 in [-127, 127], symmetric, one scale for each output channel;
* biases: int32, symmetric, with scale `input_scale * kernel_scale[channel]`;
* the real value 0 is always exactly representable.

Everything is computed in float32, in the order of operations of the fake-quant kernels, so that
the reference, the Keras layers and the integers in an exported file are the same numbers.
"""

import dataclasses

import numpy as np

INT8_MIN, INT8_MAX = -128, 127
# Kernels leave -128 out, so that products fit the 16-bit accumulation of some processors.
KERNEL_MAX = 127
INT32_MAX = 2**31 - 1

# Below this width a range holds nothing but rounding noise and its scale would be subnormal.
MIN_RANGE = 1e-6


@dataclasses.dataclass(frozen=True)
class QuantParams:
    """Scale and zero point of one int8 activation tensor.

    Args:
        scale: Real size of one step, a positive finite number (rounded to float32).
        zero_point: The int8 value, in [-128, 127], that stands for the real value 0.

    Raises:
        ValueError: If a value is out of its range.
    """

    scale: float
    zero_point: int

    def __post_init__(self):
        if not (np.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"`scale` must be a positive finite number. Received: {self.scale}")
        if not INT8_MIN <= self.zero_point <= INT8_MAX:
            raise ValueError(
                f"`zero_point` must lie in [{INT8_MIN}, {INT8_MAX}]. Received: {self.zero_point}"
            )
        object.__setattr__(self, "scale", float(np.float32(self.scale)))
        object.__setattr__(self, "zero_point", int(self.zero_point))

    @property
    def min(self) -> float:
        """The smallest real value of the tensor."""
        return float(np.float32(INT8_MIN - self.zero_point) * np.float32(self.scale))

    @property
    def max(self) -> float:
        """The largest real value of the tensor."""
        return float(np.float32(INT8_MAX - self.zero_point) * np.float32(self.scale))

    @classmethod
    def from_range(cls, low: float, high: float) -> "QuantParams":
        """Returns the parameters that fake-quantization uses for the range [low, high].

        Args:
            low: Smallest real value, at most 0.
            high: Largest real value, at least 0, greater than `low`.

        Raises:
            ValueError: If the range is not finite, is empty or does not contain 0.
        """
        scale, _, zero_point = nudge(low, high)
        return cls(float(scale), int(zero_point) + INT8_MIN)


# Logistic and softmax outputs lie in [0, 1]; the specification fixes their parameters.
UNIT_INTERVAL = QuantParams(1 / 256, INT8_MIN)
# tanh and softsign outputs lie in [-1, 1].
SYMMETRIC_UNIT_INTERVAL = QuantParams(1 / 128, 0)
# 8-bit pixels as they come: the uint8 value is the real value.
PIXELS = QuantParams(1.0, INT8_MIN)


def widen(low: float, high: float) -> tuple[float, float]:
    """Returns the smallest usable range that contains [low, high] and 0.

    A dead tensor (all zeros) gets [0, 1]: any range represents it exactly.

    Raises:
        ValueError: If a bound is not finite or `low` exceeds `high`.
    """
    if not (np.isfinite(low) and np.isfinite(high)) or low > high:
        raise ValueError(f"A range needs two finite bounds, low <= high. Received: [{low}, {high}]")
    low, high = min(float(low), 0.0), max(float(high), 0.0)
    if high - low < MIN_RANGE:
        return 0.0, 1.0
    return low, high


def nudge(low: float, high: float) -> tuple[np.float32, np.float32, np.float32]:
    """Returns (scale, inverse scale, zero point in [0, 255]) of a range, as fake-quant does.

    Args:
        low: Smallest real value, at most 0.
        high: Largest real value, at least 0, greater than `low`.

    Raises:
        ValueError: If the range is not finite, is empty or does not contain 0.
    """
    low, high = np.float32(low), np.float32(high)
    if not (np.isfinite(low) and np.isfinite(high)) or not low <= 0 <= high or low == high:
        raise ValueError(
            "A quantization range must be finite and not empty, and must contain 0; see `widen`. "
            f"Received: [{low}, {high}]"
        )
    steps = np.float32(INT8_MAX - INT8_MIN)
    scale = (high - low) / steps
    inverse = steps / (high - low)
    zero_point = np.round(np.clip(-low / scale, np.float32(0), steps))
    return scale, inverse, zero_point


def fake_quantize(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Returns float32 `values` rounded to the 256 levels of the range [low, high]."""
    scale, inverse, zero_point = nudge(low, high)
    nudged_min = (np.float32(0) - zero_point) * scale
    nudged_max = (np.float32(255) - zero_point) * scale
    zero = np.floor(-nudged_min * inverse + np.float32(0.5))
    clipped = np.clip(np.asarray(values, np.float32), nudged_min, nudged_max) - nudged_min
    return np.floor(clipped * inverse - zero + np.float32(0.5)) * scale


def quantize(values: np.ndarray, params: QuantParams) -> np.ndarray:
    """Returns the int8 integers of real `values` (any shape), rounding half up, saturating."""
    steps = np.floor(np.asarray(values, np.float64) / np.float64(params.scale) + 0.5)
    return np.clip(steps + params.zero_point, INT8_MIN, INT8_MAX).astype(np.int8)


def dequantize(integers: np.ndarray, params: QuantParams) -> np.ndarray:
    """Returns the float32 real values of int8 `integers`."""
    shifted = np.asarray(integers, np.float32) - np.float32(params.zero_point)
    return shifted * np.float32(params.scale)


def kernel_scales(limits: np.ndarray) -> np.ndarray:
    """Returns the float32 scales of symmetric kernels that span [-limit, limit].

    Args:
        limits: Positive limits, any shape, one for each channel.

    Raises:
        ValueError: If a limit is not positive and finite.
    """
    limits = np.asarray(limits, np.float32)
    if not (np.all(np.isfinite(limits)) and np.all(limits > 0)):
        raise ValueError(
            "Kernel limits must be positive and finite; a dead channel takes any positive limit. "
            f"Received: minimum {limits.min()}, maximum {limits.max()}"
        )
    return (limits + limits) / np.float32(2 * KERNEL_MAX)


def quantize_kernel(kernel: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """Returns the int8 integers, in [-127, 127], of a kernel.

    Args:
        kernel: Float kernel of any shape.
        limits: Positive limits, broadcastable against `kernel`.
    """
    limits = np.asarray(limits, np.float32)
    kernel_scales(limits)
    # The order of fake-quant: clip, shift, multiply by the inverse scale, round half up.
    scale = kernel_scales(limits)
    inverse = np.float32(2 * KERNEL_MAX) / (limits + limits)
    low = np.float32(-KERNEL_MAX) * scale
    high = np.float32(KERNEL_MAX) * scale
    zero = np.floor(-low * inverse + np.float32(0.5))
    clipped = np.clip(np.asarray(kernel, np.float32), low, high) - low
    return np.floor(clipped * inverse - zero + np.float32(0.5)).astype(np.int8)


def quantize_bias(bias: np.ndarray, input_scale: float, scales: np.ndarray) -> np.ndarray:
    """Returns the int32 integers of a bias, of scale `input_scale * scales`.

    Args:
        bias: Float bias, shape (channels,).
        input_scale: Scale of the layer's input.
        scales: Kernel scales, shape (channels,) or (1,).

    Raises:
        OverflowError: If a bias does not fit an int32.
    """
    step = np.float64(np.float32(input_scale)) * np.asarray(scales, np.float64)
    integers = np.round(np.asarray(bias, np.float64) / step)
    if np.any(np.abs(integers) > INT32_MAX):
        raise OverflowError(
            "A bias does not fit an int32: its kernel channel is too small beside it. "
            f"Received: bias {float(np.max(np.abs(bias)))}, smallest step {float(np.min(step))}"
        )
    return integers.astype(np.int32)
