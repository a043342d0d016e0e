"""Learned rounding against nearest rounding, and the statistics that it needs against NumPy."""

import numpy as np
import pytest
from hand_made import folded, functional, layers, pixels, values

from keras_effnet.quantization import QuantizationConfig, quantize_model
from keras_effnet.quantization.folding import same_padding
from keras_effnet.quantization.lowering import integer_kernel, read_quantized
from keras_effnet.quantization.params import KERNEL_MAX, QuantParams, fake_quantize
from keras_effnet.quantization.rounding import PLACES_PER_IMAGE, collect_covariances, round_kernel

# Float32 products of values of about 1, summed over some hundred places, against float64.
COVARIANCE_TOLERANCE = 1e-5


def correlated(size=24, samples=4000, seed=0):
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(3, size))
    common = rng.normal(size=(samples, 3)) @ mixing
    return common + 0.2 * rng.normal(size=(samples, size))


def output_error(data, weights, integers, scales):
    return np.mean((data @ (weights - integers * scales[..., None])[0].T) ** 2)


def test_it_beats_nearest_rounding_where_inputs_are_correlated():
    data, rng = correlated(), np.random.default_rng(1)
    weights, scales = rng.normal(size=(1, 16, 24)), np.full((1, 16), 0.1)
    covariance = np.cov(data.T, bias=True)[None]
    learned = round_kernel(weights, scales, covariance)
    nearest = np.round(weights / 0.1)
    assert output_error(data, weights, learned, scales) < 0.5 * output_error(
        data, weights, nearest, scales
    )
    # On other samples of the same kind too.
    fresh = correlated(samples=8000)[4000:]
    assert output_error(fresh, weights, learned, scales) < output_error(
        fresh, weights, nearest, scales
    )
    # The check can fail: with the statistics of other inputs it does not help.
    other = round_kernel(weights, scales, np.cov(correlated(seed=5).T, bias=True)[None])
    assert output_error(data, weights, other, scales) > output_error(data, weights, nearest, scales)


def test_it_is_nearest_rounding_where_inputs_are_not():
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(2, 5, 9))
    covariance = np.stack([np.diag(rng.uniform(0.1, 10, 9)) for _ in range(2)])
    integers = round_kernel(weights, np.full((2, 5), 0.01), covariance)
    np.testing.assert_array_equal(
        integers, np.clip(np.round(weights / 0.01), -KERNEL_MAX, KERNEL_MAX)
    )


def test_two_equal_inputs_share_the_error_by_hand():
    # Both inputs are always equal, so only the sum of the weights counts: 0.4 + 0.4 steps is
    # nearest to 1, while each alone rounds to 0.
    covariance = np.ones((1, 2, 2))
    integers = round_kernel(np.full((1, 1, 2), 0.4), np.ones((1, 1)), covariance, damping=1e-6)
    assert integers.sum() == 1


def test_dead_inputs_are_rounded_to_nearest():
    weights = np.array([[[0.3, 0.7, -1.2]]])
    assert round_kernel(weights, np.ones((1, 1)), np.zeros((1, 3, 3)))[0, 0].tolist() == [0, 1, -1]


# --- Statistics -------------------------------------------------------------------------------


def patches(images, kernel, strides, padding, dilation=1):
    """Patches by NumPy, (places of all images, taps, channels)."""
    if padding == "same":
        pads = [same_padding(size, kernel, strides, dilation) for size in images.shape[1:3]]
        images = np.pad(images, ((0, 0), *pads, (0, 0)))
    reach = (kernel - 1) * dilation
    rows = []
    for image in images:
        for row in range(0, image.shape[0] - reach, strides):
            for column in range(0, image.shape[1] - reach, strides):
                patch = image[
                    row : row + reach + 1 : dilation, column : column + reach + 1 : dilation
                ]
                rows.append(patch.reshape(-1, image.shape[2]))
    return np.array(rows, np.float64)


def covariance_of(model, images, params=None):
    graph = folded(model)
    low, high = float(images.min()), float(images.max())
    params = params or QuantParams.from_range(min(low, 0.0), max(high, 0.0))
    for node in graph:
        node.params = params
    batches = [images[:3], images[3:]]
    (found,) = collect_covariances(graph, batches, 2, verbose=False).values()
    return found, fake_quantize(images, params.min, params.max)


@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize(
    "strides, padding, dilation", [(1, "same", 1), (2, "same", 1), (2, "valid", 1), (1, "same", 2)]
)
def test_statistics_of_patches_are_those_of_numpy(strides, padding, dilation, depthwise):
    arguments = {"strides": strides, "padding": padding, "dilation_rate": dilation}
    kind = layers.DepthwiseConv2D(3, **arguments) if depthwise else layers.Conv2D(2, 3, **arguments)
    images = values(5, side=7)
    found, rounded = covariance_of(functional(7, kind), images)
    rows = patches(rounded, 3, strides, padding, dilation)
    if depthwise:
        expected = [np.cov(rows[..., channel].T, bias=True) for channel in range(3)]
    else:
        expected = [np.cov(rows.reshape(len(rows), -1).T, bias=True)]
    np.testing.assert_allclose(found, expected, atol=COVARIANCE_TOLERANCE)
    # The check can fail: patches of the images as they were differ by the rounding.
    raw = patches(images, 3, strides, padding, dilation)[..., 0]
    size = raw.shape[1]
    block = found[0] if depthwise else found[0].reshape(size, 3, size, 3)[:, 0, :, 0]
    assert abs(block - np.cov(raw.T, bias=True)).max() > COVARIANCE_TOLERANCE


def test_statistics_of_a_dense_layer_are_those_of_numpy():
    images = values(6, side=4)
    found, rounded = covariance_of(
        functional(4, lambda x: layers.Dense(2)(layers.Flatten()(x))), images
    )
    expected = np.cov(rounded.reshape(6, -1).T, bias=True)[None]
    np.testing.assert_allclose(found, expected, atol=COVARIANCE_TOLERANCE)


def test_a_variance_that_is_small_beside_the_mean_is_not_lost():
    # 1000 to 1000.001 squared has no room in float32 for the variance, some 1e-7.
    rng = np.random.default_rng(0)
    images = (1000 + 0.01 * rng.normal(size=(40, 4, 4, 3))).astype("float32")
    params = QuantParams(1000.5 / 254, -128)  # A channel is one or the other of two steps.
    found, rounded = covariance_of(functional(4, lambda x: layers.Conv2D(2, 1)(x)), images, params)
    assert np.all(np.linalg.eigvalsh(found) > -1e-9)
    np.testing.assert_allclose(
        found[0], np.cov(rounded.reshape(-1, 3).T.astype(np.float64), bias=True), atol=1e-6
    )


def test_large_images_are_looked_at_in_some_places():
    side = int(np.sqrt(PLACES_PER_IMAGE)) + 8
    images = values(4, side=side)
    found, rounded = covariance_of(functional(side, lambda x: layers.Conv2D(2, 1)(x)), images)
    expected = np.cov(rounded.reshape(-1, 3).T, bias=True)
    # 4 * 1024 places: a variance is known to sqrt(2 / 4096) = 2 %, here with a factor of 4.
    np.testing.assert_allclose(found[0], expected, atol=0.09)


@pytest.mark.parametrize("kind", ["conv", "depthwise", "dense"])
def test_a_model_of_one_kernel(kind):
    body = {
        "conv": lambda x: layers.Conv2D(4, 3, padding="same", name="kernel")(x),
        "depthwise": lambda x: layers.DepthwiseConv2D(3, name="kernel")(x),
        "dense": lambda x: layers.Dense(4, name="kernel")(layers.Flatten()(x)),
    }[kind]
    model = functional(8, body)
    # Neighbours are equal in pairs, and so are correlated.
    images = pixels(12, side=4).repeat(2, axis=1).repeat(2, axis=2)
    results = {}
    for corrections in ((), ("learned_rounding",)):
        config = QuantizationConfig(corrections=corrections)
        node = read_quantized(quantize_model(model, images, config, verbose=False))["kernel"]
        results[corrections] = integer_kernel(node)
    (nearest, scales), (learned, same) = results.values()
    # The steps are the same, some integers are not, and none is far off.
    np.testing.assert_array_equal(scales, same)
    assert np.any(nearest != learned)
    assert abs(nearest.astype(int) - learned).max() < 20
