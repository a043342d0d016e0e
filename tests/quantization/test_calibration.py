"""Calibration: streaming statistics against NumPy, and every kind of bad data."""

import keras
import numpy as np
import pytest
from hand_made import folded, functional, layers, pixels, predict, values

from keras_effnet.quantization import QuantizationConfig, calibration, quantize_model
from keras_effnet.quantization.build import build_model
from keras_effnet.quantization.calibration import calibration_batches, collect
from keras_effnet.quantization.graph import read_model

# float32 sums of some thousand values of about 1.
MEAN_TOLERANCE = 1e-5
SIDE = 8


def convolution(x):
    return layers.Conv2D(4, 3, padding="same", name="conv")(x)


def scaled(x):
    return convolution(layers.Rescaling(1 / 255)(x))


def drawn(data, body=convolution, batch_size=4, minimum=2):
    """All that `calibration_batches` yields, in one array, and the number of batches."""
    graph = read_model(functional(SIDE, body))
    batches, total = calibration_batches(data, graph, batch_size, minimum)
    return np.concatenate(list(batches)), total


def statistics_of(images, sizes=(4, 4, 2), body=convolution):
    graph = folded(functional(SIDE, body))
    parts = np.split(images, np.cumsum(sizes)[:-1])
    tensors = predict(build_model(graph, quantized=False, observed=("conv",)), images)
    tensors = tensors[0] if isinstance(tensors, list) else tensors
    return collect(graph, parts, len(parts), verbose=False)["conv"], tensors


# --- Statistics -------------------------------------------------------------------------------


def test_statistics_are_those_of_numpy_on_all_data():
    found, tensors = statistics_of(values(10, side=SIDE))
    np.testing.assert_allclose(found.low, tensors.min(axis=(0, 1, 2)), atol=MEAN_TOLERANCE)
    np.testing.assert_allclose(found.high, tensors.max(axis=(0, 1, 2)), atol=MEAN_TOLERANCE)
    np.testing.assert_allclose(found.mean, tensors.mean(axis=(0, 1, 2)), atol=MEAN_TOLERANCE)
    batches = np.split(tensors, [4, 8])
    np.testing.assert_allclose(found.batch_low, [part.min() for part in batches], atol=1e-5)
    np.testing.assert_allclose(found.batch_high, [part.max() for part in batches], atol=1e-5)
    # Small tensors are kept whole, each row with its image.
    np.testing.assert_allclose(found.sample, tensors.reshape(-1, 4), atol=MEAN_TOLERANCE)
    np.testing.assert_array_equal(found.weights, 1)
    np.testing.assert_array_equal(found.images, np.repeat(np.arange(10), SIDE * SIDE))
    # The check can fail: without its last image the mean is another.
    less = tensors[:-1].mean(axis=(0, 1, 2))
    assert abs(found.mean - less).max() > 10 * MEAN_TOLERANCE


def test_a_bounded_sample_stands_for_all_places(monkeypatch):
    monkeypatch.setattr(calibration, "VALUES_PER_IMAGE", 64)  # 16 of 64 places
    monkeypatch.setattr(calibration, "VALUES_KEPT", 256)  # 64 rows
    found, tensors = statistics_of(values(40, side=SIDE), sizes=(8,) * 5)
    assert found.sample.size <= 3 * 256  # The rows, and the extremes of the images.
    assert len(found.sample) == len(found.weights) == len(found.images)
    # Rows of the sample stand for all places, extremes for one of theirs.
    extreme = found.weights < found.weights.max()
    assert found.weights[~extreme].sum() == pytest.approx(40 * SIDE * SIDE, rel=0.1)
    # Every row is of the image that it names.
    flat = tensors.reshape(40, -1, 4)
    for row, image in zip(found.sample[~extreme], found.images[~extreme], strict=True):
        assert abs(flat[image] - row).max(axis=1).min() < MEAN_TOLERANCE
    for row, image in zip(found.sample[extreme], found.images[extreme], strict=True):
        ends = np.stack([flat[image].min(axis=0), flat[image].max(axis=0)])
        assert abs(ends - row).max(axis=1).min() < MEAN_TOLERANCE
    # The extremes and the mean are those of everything.
    np.testing.assert_allclose(found.high, tensors.max(axis=(0, 1, 2)), atol=MEAN_TOLERANCE)
    np.testing.assert_allclose(found.mean, tensors.mean(axis=(0, 1, 2)), atol=MEAN_TOLERANCE)


def test_statistics_divided_by_factors():
    found, tensors = statistics_of(values(10, side=SIDE))
    factors = np.array([1.0, 2.0, 4.0, 8.0])
    divided, tensors = found.divided_by(factors), tensors / factors
    np.testing.assert_allclose(divided.low, tensors.min(axis=(0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(divided.mean, tensors.mean(axis=(0, 1, 2)), atol=MEAN_TOLERANCE)
    np.testing.assert_allclose(divided.sample, tensors.reshape(-1, 4), atol=MEAN_TOLERANCE)
    assert max(divided.batch_high) == pytest.approx(tensors.max(), rel=1e-5)


# --- Kinds of data ----------------------------------------------------------------------------


class Data(keras.utils.PyDataset):
    def __init__(self, images):
        super().__init__()
        self.images = images

    def __len__(self):
        return len(self.images) // 4

    def __getitem__(self, index):
        return self.images[4 * index : 4 * index + 4], np.zeros(4)


def dataset(images):
    tf = pytest.importorskip("tensorflow")
    return tf.data.Dataset.from_tensor_slices((images, np.zeros(len(images)))).batch(4)


@pytest.mark.parametrize(
    "kind, total",
    [
        (lambda images: images, 3),
        (lambda images: images.astype("uint8"), 3),
        (lambda images: np.split(images, 3), 3),
        (lambda images: [(part, np.zeros(4)) for part in np.split(images, 3)], 3),
        (lambda images: (part for part in np.split(images, 3)), None),
        (dataset, 3),
        (Data, 3),
    ],
    ids=["array", "uint8", "list", "tuples", "generator", "tf.data", "PyDataset"],
)
def test_data_of_every_kind(kind, total):
    images = pixels(12, side=SIDE)
    found, batches = drawn(kind(images))
    assert found.dtype == np.float32 and batches == total
    np.testing.assert_array_equal(found, images)


@pytest.mark.parametrize("data", ["photographs", {"images": pixels(2, SIDE)}, b"bytes", None, 7])
def test_what_is_no_data_is_refused(data):
    with pytest.raises(TypeError, match="must be an array of images or an iterable of batches"):
        drawn(data)


def noise(low=0.0, high=255.0, count=4, side=SIDE):
    shape = (count, side, side, 3)
    return np.random.default_rng(0).uniform(low, high, shape).astype("float32")


@pytest.mark.parametrize(
    "data, message",
    [
        (noise(count=0), "needs at least 2 image.*Received: 0"),
        (noise(count=1), "needs at least 2 image.*Received: 1"),
        ([], "needs at least 2 image"),
        (iter(()), "needs at least 2 image"),
        (noise() * np.nan, "must be finite"),
        (noise() + np.float32(np.inf), "must be finite"),
        (noise() * 0 + 7, "must differ.*all values 7"),
        (noise(side=16), r"shape \(images, 8, 8, 3\). Received: \(4, 16, 16, 3\)"),
        (noise()[0], r"shape \(images, 8, 8, 3\). Received: \(8, 8, 3\)"),
        ([noise()[0]], r"shape \(images, 8, 8, 3\). Received: \(8, 8, 3\)"),
        (noise(high=1), r"wants them in 0..255.*values in \[.*, 0.99"),
        (noise(-5, 5), "wants them in 0..255"),
        (noise(high=65535), r"0..255 \(8 bits\).*values in"),
    ],
)
def test_bad_data_is_refused(data, message):
    with pytest.raises(ValueError, match=message):
        drawn(data, scaled)


def test_models_that_do_not_scale_take_any_finite_scale():
    for data in (noise(high=1), noise(-3, 3), noise(high=65535)):
        assert len(drawn(data)[0]) == 4


def test_the_method_wants_two_images_at_least():
    model = functional(SIDE, convolution)
    with pytest.raises(ValueError, match="needs at least 2 image"):
        quantize_model(model, noise(count=1), verbose=False)


# --- Bad tensors ------------------------------------------------------------------------------


def test_a_layer_that_overflows_is_named():
    def body(x):
        return layers.Conv2D(2, 1, name="second")(layers.Conv2D(2, 1, name="first")(x))

    model = functional(SIDE, body)
    for name in ("first", "second"):
        layer = model.get_layer(name)
        layer.kernel.assign(layer.kernel * 1e25)
    with pytest.raises(ValueError, match="'second' gives NaN or infinite values"):
        quantize_model(model, noise(), verbose=False)


@pytest.mark.parametrize("dead", ["channel", "layer"])
def test_dead_kernels_are_quantized_exactly(dead):
    def body(x):
        x = layers.Conv2D(4, 3, padding="same", activation="swish", name="conv")(x)
        x = layers.DepthwiseConv2D(3, padding="same", activation="swish", name="depthwise")(x)
        return layers.Dense(3, name="head")(layers.GlobalAveragePooling2D()(x))

    model, images = functional(SIDE, body), noise(count=8)
    for name in ("conv", "depthwise"):
        kernel, bias = model.get_layer(name).get_weights()
        kernel[..., :1, :] *= 0 if name == "depthwise" or dead == "layer" else 1
        kernel[..., 0] *= 0 if name == "conv" else 1
        kernel *= dead == "channel"
        bias *= dead == "channel"
        model.get_layer(name).set_weights([kernel, bias])
    quantized = quantize_model(model, images, verbose=False)
    expected, found = predict(model, images), predict(quantized, images)
    # 8 bits of four tensors, in units of the largest output.
    assert np.all(np.isfinite(found))
    assert abs(found - expected).max() < 0.05 * max(abs(expected).max(), 1)
    if dead == "layer":
        # Only the bias is left, which has 32 bits, rounded to 8 bits of the output.
        assert (
            abs(found - expected).max() < 1.1 * np.ptp(expected) / 255 + abs(expected).max() / 100
        )


def test_progress_is_shown_when_it_is_wanted(capsys):
    model = functional(SIDE, convolution)
    config = QuantizationConfig(corrections=(), batch_size=2)
    quantize_model(model, noise(), config, verbose=False)
    assert capsys.readouterr().out == ""
    quantize_model(model, noise(), config, verbose=True)
    assert "2/2" in capsys.readouterr().out
