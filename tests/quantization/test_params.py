"""The NumPy reference, by hand, and fake-quant against it."""

import keras
import numpy as np
import pytest

from keras_effnet.quantization.fake_quant import FakeQuant, QuantizedDense
from keras_effnet.quantization.params import (
    PIXELS,
    QuantParams,
    dequantize,
    fake_quantize,
    kernel_scales,
    quantize,
    quantize_bias,
    quantize_kernel,
    widen,
)


def test_range_to_scale_and_zero_point_by_hand():
    # 255 steps of 0.1 from -5 to 20.5: zero is step 50 of 255, so int8 -128 + 50 = -78.
    params = QuantParams.from_range(-5.0, 20.5)
    assert params.scale == pytest.approx(0.1)
    assert params.zero_point == -78
    assert quantize(np.array([0.0, 0.1, -5.0, 20.5, 99.0]), params).tolist() == [
        -78,
        -77,
        -128,
        127,
        127,
    ]
    assert dequantize(np.array([-78], np.int8), params)[0] == 0


def test_a_zero_between_two_steps_is_nudged():
    # Steps of 1 from -0.4: zero would be step 0.4 of 255 and becomes step 0, the bounds 0 and 255.
    params = QuantParams.from_range(-0.4, 254.6)
    assert params.zero_point == -128
    assert (params.min, params.max) == (0.0, 255.0)


def test_pixels_are_their_integers():
    values = np.array([0, 1, 128, 255], "float32")
    assert quantize(values, PIXELS).tolist() == [-128, -127, 0, 127]
    assert dequantize(quantize(values, PIXELS), PIXELS).tolist() == values.tolist()


def test_halves_round_up():
    # Steps of 1: 0.5 -> 1, -0.5 -> 0, 1.5 -> 2, which is neither to even nor away from zero.
    params = QuantParams(1.0, 0)
    assert quantize(np.array([0.5, -0.5, 1.5, -1.5]), params).tolist() == [1, 0, 2, -1]
    assert fake_quantize(np.array([0.5, -0.5, 1.5, -1.5]), -128, 127).tolist() == [1, 0, 2, -1]


def test_kernel_by_hand():
    # Limit 12.7: a step is 0.1; 0.05 is half a step and goes up; nothing reaches -128.
    kernel = np.array([12.7, -12.7, 0.1, 0.04, -99.0], "float32")
    assert quantize_kernel(kernel, np.float32(12.7)).tolist() == [127, -127, 1, 0, -127]


def test_each_channel_of_a_kernel_has_its_own_step():
    kernel = np.array([[1.0, 1.0], [0.5, -0.5]], "float32")
    # 1.27 / 127 = 0.01 and 127 / 127 = 1; -0.5 of a step of 1 is a half and goes up to 0.
    limits = np.array([1.27, 127.0], "float32")
    np.testing.assert_allclose(kernel_scales(limits), [0.01, 1.0], rtol=1e-6)
    assert quantize_kernel(kernel, limits).tolist() == [[100, 1], [50, 0]]


@pytest.mark.parametrize("limit", [0.0, -1.0, np.nan, np.inf])
def test_bad_kernel_limits_are_named(limit):
    with pytest.raises(ValueError, match="limits must be positive and finite"):
        kernel_scales(np.array([1.0, limit]))


def test_bias_by_hand():
    # Steps 0.5 * 0.1 = 0.05 and 0.5 * 0.01 = 0.005.
    integers = quantize_bias(np.array([1.0, -0.5]), 0.5, np.array([0.1, 0.01]))
    assert integers.tolist() == [20, -100]
    with pytest.raises(OverflowError, match="does not fit an int32"):
        quantize_bias(np.array([1.0]), 1e-6, np.array([1e-6]))


@pytest.mark.parametrize(
    "low, high, expected",
    [
        (1.0, 3.0, (0.0, 3.0)),  # 0 must be in it.
        (-3.0, -1.0, (-3.0, 0.0)),
        (-1.0, 2.0, (-1.0, 2.0)),
        (0.0, 0.0, (0.0, 1.0)),  # Dead: any range holds it.
        (0.0, 1e-9, (0.0, 1.0)),
    ],
)
def test_usable_ranges(low, high, expected):
    assert widen(low, high) == expected


@pytest.mark.parametrize("low, high", [(np.nan, 1.0), (0.0, np.inf), (2.0, 1.0)])
def test_ranges_that_cannot_be_widened_are_named(low, high):
    with pytest.raises(ValueError, match="two finite bounds"):
        widen(low, high)


def test_bad_ranges_are_named():
    for low, high in ((1.0, 2.0), (0.0, 0.0), (np.nan, 1.0)):
        with pytest.raises(ValueError, match="must be finite and not empty, and must contain 0"):
            QuantParams.from_range(low, high)


def test_bad_parameters_are_named():
    with pytest.raises(ValueError, match="`scale` must be a positive finite number"):
        QuantParams(0.0, 0)
    with pytest.raises(ValueError, match="`zero_point` must lie in"):
        QuantParams(1.0, 128)


@pytest.mark.parametrize("low, high", [(-5.0, 20.5), (0.0, 6.0), (-0.278, 3.1), (-1.0, 1.0)])
def test_fake_quant_layer_equals_the_reference_bit_for_bit(low, high):
    values = np.random.default_rng(0).normal(0, (high - low) / 2, (64, 64)).astype("float32")
    inputs = keras.Input((64,))
    layer = keras.Model(inputs, FakeQuant(low, high)(inputs))
    rounded = layer.predict_on_batch(values)
    np.testing.assert_array_equal(rounded, fake_quantize(values, low, high))
    # And the integers are those of the layer's parameters.
    params = layer.layers[-1].params
    np.testing.assert_array_equal(rounded, dequantize(quantize(rounded, params), params))
    # The check can fail: a range wider by a part in 256 rounds otherwise.
    assert np.any(rounded != fake_quantize(values, low, high * 257 / 256))


@pytest.mark.parametrize("per_channel", [True, False])
def test_quantized_kernels_equal_the_reference_bit_for_bit(per_channel):
    layer = QuantizedDense(8, per_channel=per_channel)
    layer.build((None, 64))
    kernel = np.random.default_rng(0).normal(size=(64, 8)).astype("float32")
    limits = abs(kernel).max(axis=0 if per_channel else None).reshape(-1)
    layer.set_real(kernel, np.zeros(8, "float32"), limits, input_reach=3.0)
    np.testing.assert_array_equal(layer.real_kernel(), kernel)
    limits = keras.ops.convert_to_numpy(layer.kernel_limits)
    assert limits.shape == ((8,) if per_channel else (1,))
    np.testing.assert_array_equal(limits.max(), abs(kernel).max())
    expected = quantize_kernel(kernel, limits).astype("float32") * kernel_scales(limits)
    rounded = keras.ops.convert_to_numpy(layer.quantized_kernel())
    np.testing.assert_array_equal(rounded, expected)
    assert np.any(rounded != kernel)
