import keras
import numpy as np
import pytest
from PIL import Image

from keras_effnet.preprocessing import (
    channel_statistics,
    crop_and_resize,
    crop_box,
    preprocess,
    preprocess_in_graph,
    to_rgb,
)
from keras_effnet.specs import PreprocessingSpec, get_spec

V1 = get_spec("EfficientNetB0").preprocessing
V2_BASE = get_spec("EfficientNetV2B0").preprocessing
V2_S = get_spec("EfficientNetV2S").preprocessing
SPECS = {"v1": V1, "v2_base": V2_BASE, "v2_s": V2_S}

# Two float32 roundings of values below 3, in another order of operations.
FLOAT32_TOLERANCE = 1e-6


@pytest.fixture(params=SPECS.values(), ids=SPECS.keys())
def spec(request):
    return request.param


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3), dtype=np.uint8)


def graph(spec, shape=(4, 5, 3), data_format="channels_last"):
    inputs = keras.Input(shape)
    return keras.Model(inputs, preprocess_in_graph(inputs, spec, data_format))


def run(model, images):
    return keras.ops.convert_to_numpy(model(images.astype(np.float32)))


# Statistics


def test_statistics_of_other_channel_counts():
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    assert channel_statistics(V1, 3) == (mean, std)
    assert channel_statistics(V1, 1) == (pytest.approx((0.449,)), pytest.approx((0.226,)))
    assert channel_statistics(V1, 5) == (mean + mean[:2], std + std[:2])
    assert channel_statistics(V2_S, 3) is None


@pytest.mark.parametrize("channels", [0, -1, None, 3.0])
def test_statistics_of_no_channels(channels):
    with pytest.raises(ValueError, match="number of input channels must be known.*Received"):
        channel_statistics(V1, channels)


# Arrays and tf.data


def test_values_by_hand():
    image = np.full((1, 1, 3), 255, np.uint8)
    expected = [(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    np.testing.assert_allclose(preprocess(image, V1)[0, 0], expected, atol=FLOAT32_TOLERANCE)
    grey = np.asarray([0, 64, 128], np.uint8).reshape(1, 3, 1)
    np.testing.assert_array_equal(preprocess(grey, V2_S).ravel(), [-1, -0.5, 0])


def test_data_formats_agree(spec, pixels):
    last = preprocess(pixels, spec)
    first = preprocess(pixels.transpose(0, 3, 1, 2), spec, "channels_first")
    np.testing.assert_array_equal(first, last.transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(preprocess(pixels[0], spec), last[0])


@pytest.mark.parametrize("dtype", ["uint8", "int64", "float16", "float64"])
def test_input_types(spec, pixels, dtype):
    result = preprocess(pixels.astype(dtype), spec)
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result, preprocess(pixels, spec))


def test_input_is_left_alone(spec, pixels):
    images = pixels.astype(np.float32)
    preprocess(images, spec)
    np.testing.assert_array_equal(images, pixels)


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_tf_data(spec, pixels, data_format):
    tf = pytest.importorskip("tensorflow")
    images = pixels if data_format == "channels_last" else pixels.transpose(0, 3, 1, 2)
    dataset = tf.data.Dataset.from_tensor_slices(images)
    dataset = dataset.map(lambda image: preprocess(image, spec, data_format))
    assert dataset.element_spec.dtype == tf.float32
    result = np.stack(list(dataset.as_numpy_iterator()))
    expected = preprocess(images, spec, data_format)
    np.testing.assert_allclose(result, expected, atol=FLOAT32_TOLERANCE)


def test_bad_arrays():
    with pytest.raises(TypeError, match="integers or floats.*Received: dtype <U1"):
        preprocess(np.asarray([["a"]]), V1)
    with pytest.raises(ValueError, match=r"height, width, channels.*Received: shape \(4, 5\)"):
        preprocess(np.zeros((4, 5)), V1)
    with pytest.raises(ValueError, match="data_format.*channels_first.*Received.*'NCHW'"):
        preprocess(np.zeros((4, 5, 3)), V1, "NCHW")


# In the graph


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_graph_equals_arrays(spec, data_format, channels):
    images = np.random.default_rng(0).integers(0, 256, (2, 4, 5, channels))
    if data_format == "channels_first":
        images = images.transpose(0, 3, 1, 2)
    model = graph(spec, images.shape[1:], data_format)
    expected = preprocess(images, spec, data_format)
    np.testing.assert_allclose(run(model, images), expected, atol=FLOAT32_TOLERANCE)


def test_layers():
    for spec, weights in ((V1, ["mean", "variance", "count"]), (V2_BASE, [])):
        model = graph(spec)
        assert [type(layer) for layer in model.layers[1:]] == [
            keras.layers.Rescaling,
            keras.layers.Normalization,
        ]
        assert [layer.name for layer in model.layers[1:]] == ["rescaling", "normalization"]
        assert [weight.name for weight in model.weights] == weights
        assert not model.trainable_weights
    assert [layer.name for layer in graph(V2_S).layers[1:]] == ["rescaling"]


def test_global_data_format(spec, pixels):
    images = pixels.transpose(0, 3, 1, 2)
    before = keras.config.image_data_format()
    keras.config.set_image_data_format("channels_first")
    try:
        model = graph(spec, images.shape[1:], None)
    finally:
        keras.config.set_image_data_format(before)
    expected = preprocess(images, spec, "channels_first")
    np.testing.assert_allclose(run(model, images), expected, atol=FLOAT32_TOLERANCE)


def test_keras_file_keeps_the_transform(spec, pixels, tmp_path):
    model = graph(spec)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(run(loaded, pixels), run(model, pixels))


def test_weights_file_keeps_the_transform(pixels, tmp_path):
    model = graph(V1)
    model.save_weights(tmp_path / "model.weights.h5")
    other = graph(PreprocessingSpec(mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0)))
    assert np.abs(run(other, pixels) - run(model, pixels)).max() > 0.1
    other.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(run(other, pixels), run(model, pixels))


def test_json_and_weights_keep_the_transform(spec, pixels, tmp_path):
    model = graph(spec)
    model.save_weights(tmp_path / "model.weights.h5")
    loaded = keras.models.model_from_json(model.to_json())
    loaded.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(run(loaded, pixels), run(model, pixels))


def test_set_weights_needs_finalize_state(pixels):
    model = graph(V1)
    copy = keras.models.model_from_json(model.to_json())
    copy.set_weights(model.get_weights())
    if keras.backend.backend() != "torch":  # There the layer's copies are views of the weights.
        assert np.abs(run(copy, pixels) - run(model, pixels)).max() > 0.1
    copy.get_layer("normalization").finalize_state()
    np.testing.assert_array_equal(run(copy, pixels), run(model, pixels))


@pytest.mark.parametrize(
    ("policy", "dtype"),
    [("mixed_float16", "float32"), ("mixed_bfloat16", "float32"), ("float64", "float64")],
)
def test_dtype_policies_do_not_round_the_constants(spec, pixels, policy, dtype):
    if keras.backend.backend() == "jax" and policy == "float64":
        pytest.skip("JAX computes in 64 bits only with a global switch")
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        model = graph(spec)
        result = run(model, pixels)
    finally:
        keras.config.set_dtype_policy(before)
    assert model.output.dtype == result.dtype == dtype
    np.testing.assert_allclose(result, preprocess(pixels, spec), atol=FLOAT32_TOLERANCE)


def test_bad_graphs():
    with pytest.raises(ValueError, match="number of input channels must be known.*None"):
        graph(V1, (4, 5, None))
    with pytest.raises(ValueError, match="rank 4.*Received"):
        graph(V1, (4, 5))
    with pytest.raises(ValueError, match="data_format.*Received.*'NCHW'"):
        graph(V1, data_format="NCHW")


# Crop


@pytest.mark.parametrize(
    ("image", "size", "padding", "box"),
    [
        # min(320, 400) * 224 / 256 = 280; ((400 - 280 + 1) // 2, (320 - 280 + 1) // 2)
        ((320, 400), (224, 224), 32, (60, 20, 340, 300)),
        ((400, 320), (224, 224), 32, (20, 60, 300, 340)),
        ((320, 400), (384, 384), 0, (40, 0, 360, 320)),
        # 333 * 240 / 272 = 293.8, rounded down
        ((333, 333), (240, 240), 32, (20, 20, 313, 313)),
        # min(300 / 200, 500 / 300) = 1.5: height 150, width 300 of an input of 100 x 200
        ((300, 500), (100, 200), 100, (100, 75, 400, 225)),
        ((1, 1), (224, 224), 32, (0, 0, 1, 1)),
    ],
)
def test_published_box(image, size, padding, box):
    assert crop_box(image, size, PreprocessingSpec(crop_padding=padding)) == box


def test_other_boxes():
    assert crop_box((227, 300), (224, 224), V1, "center") == (38, 2, 262, 226)
    assert crop_box((227, 300), (224, 224), V1, "stretch") == (0, 0, 300, 227)


def test_boxes_lie_inside_the_image():
    random = np.random.default_rng(0)
    for _ in range(300):
        image, size = random.integers(1, 400, 2), random.integers(1, 400, 2)
        spec = PreprocessingSpec(crop_padding=int(random.integers(0, 64)))
        left, upper, right, lower = crop_box(tuple(image), tuple(size), spec)
        assert 0 <= left < right <= image[1] and 0 <= upper < lower <= image[0]


@pytest.fixture
def photograph():
    values = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_published_crop(photograph, interpolation):
    spec = PreprocessingSpec(crop_padding=8, interpolation=interpolation)
    resampling = Image.Resampling[interpolation.upper()]
    # 40 * 24 / 32 = 30
    expected = photograph.crop((10, 5, 40, 35)).resize((24, 24), resampling)
    result = crop_and_resize(photograph, (24, 24), spec)
    assert result.dtype == np.uint8
    np.testing.assert_array_equal(result, np.asarray(expected))


def test_crop_of_an_input_that_is_not_square(photograph):
    assert crop_and_resize(photograph, (16, 24), V1).shape == (16, 24, 3)
    assert crop_and_resize(photograph, (16, 24), V1, "stretch").shape == (16, 24, 3)


def test_center_crop_keeps_the_pixels(photograph):
    result = crop_and_resize(photograph, (20, 30), V1, "center")
    np.testing.assert_array_equal(result, np.asarray(photograph)[10:30, 10:40])


def test_stretch_reads_the_whole_image():
    values = np.zeros((8, 16, 3), np.uint8)
    values[:, 8:] = 200
    result = crop_and_resize(Image.fromarray(values), (4, 4), V1, "stretch")
    assert (result[:, 0] < 20).all() and (result[:, -1] > 180).all()


def test_bad_crops(photograph):
    with pytest.raises(ValueError, match="published.*Received: crop='central'"):
        crop_and_resize(photograph, (24, 24), V1, "central")
    with pytest.raises(ValueError, match="40 x 50.*smaller than.*48 x 24.*crop='published'"):
        crop_and_resize(photograph, (48, 24), V1, "center")
    for size in (24, (24,), (24, 0), (24.0, 24), "24"):
        with pytest.raises(ValueError, match=r"`size` is \(height, width\).*Received"):
            crop_and_resize(photograph, size, V1)


# Colour modes


def test_grey_and_black_and_white():
    grey = to_rgb(Image.fromarray(np.asarray([[7, 200]], np.uint8)))
    np.testing.assert_array_equal(np.asarray(grey), [[[7] * 3, [200] * 3]])
    binary = to_rgb(Image.fromarray(np.asarray([[0, 255]], np.uint8)).convert("1"))
    np.testing.assert_array_equal(np.asarray(binary), [[[0] * 3, [255] * 3]])


@pytest.mark.parametrize("mode", ["I;16", "I"])
def test_16_bit_grey_is_scaled(mode):
    dtype = np.uint16 if mode == "I;16" else np.int32
    image = Image.fromarray(np.asarray([[0, 457, 128 * 257 + 100, 65535]], dtype))
    assert image.mode == mode
    np.testing.assert_array_equal(np.asarray(to_rgb(image))[0, :, 0], [0, 2, 128, 255])


def test_transparency_over_white():
    # Opaque, half transparent and wholly transparent red.
    image = Image.new("RGBA", (3, 1))
    for x, alpha in enumerate((255, 128, 0)):
        image.putpixel((x, 0), (200, 0, 0, alpha))
    np.testing.assert_array_equal(
        np.asarray(to_rgb(image))[0], [[200, 0, 0], [227, 127, 127], [255, 255, 255]]
    )
    grey = Image.new("LA", (1, 1), (0, 0))
    assert to_rgb(grey).getpixel((0, 0)) == (255, 255, 255)


def test_palettes():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    np.testing.assert_array_equal(np.asarray(to_rgb(image))[0], [[10, 20, 30], [40, 50, 60]])
    image.info["transparency"] = 1
    np.testing.assert_array_equal(np.asarray(to_rgb(image))[0], [[10, 20, 30], [255, 255, 255]])


def test_cmyk():
    image = Image.new("CMYK", (1, 1), (0, 255, 255, 0))
    assert to_rgb(image).getpixel((0, 0)) == (255, 0, 0)


def test_mode_without_a_range():
    with pytest.raises(ValueError, match="mode 'F' cannot be converted.*Save the image"):
        to_rgb(Image.new("F", (1, 1)))
