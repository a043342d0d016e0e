"""The input transform of a model: crop and resize, then `(x * scale + offset - mean) / std`.

A `PreprocessingSpec` holds the transform as data. The crop is done on the photograph, by
`crop_and_resize`; the arithmetic is done once, either outside the model by `preprocess` (NumPy,
`tf.data`) or inside it by the layers of `preprocess_in_graph`. Both give the same values.

Source of the crop: tensorflow/tpu, models/official/efficientnet/preprocessing.py
(`_decode_and_center_crop`). Source of the constants: the V1 and V2 code, see `specs`.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from keras_effnet.specs import PreprocessingSpec

if TYPE_CHECKING:
    from PIL import Image

CROPS = ("published", "center", "stretch")
DATA_FORMATS = ("channels_last", "channels_first")

Statistics = tuple[tuple[float, ...], tuple[float, ...]]


def channel_statistics(preprocessing: PreprocessingSpec, channels: int) -> Statistics | None:
    """Mean and standard deviation of every input channel.

    The specs hold the statistics of RGB. One channel (grey) takes the mean of the three values;
    any other number of channels repeats them: channel `c` has the statistics of RGB channel
    `c % 3`, as the kernel of a pretrained stem is repeated.

    Args:
        preprocessing: The input transform.
        channels: Number of input channels, at least 1.

    Returns:
        `(mean, std)`, each with `channels` values on the scale after `scale` and `offset`, or
        None if the transform has no standardization.

    Raises:
        ValueError: If `channels` is not a positive integer.
    """
    if not isinstance(channels, int) or channels < 1:
        raise ValueError(
            "The number of input channels must be known and at least 1. "
            f"Received: channels={channels!r}"
        )
    if preprocessing.mean is None:
        return None
    if channels == 1:
        return (sum(preprocessing.mean) / 3,), (sum(preprocessing.std) / 3,)
    repeated = [channel % 3 for channel in range(channels)]
    return (
        tuple(preprocessing.mean[channel] for channel in repeated),
        tuple(preprocessing.std[channel] for channel in repeated),
    )


def preprocess(
    images: Any, preprocessing: PreprocessingSpec, data_format: str = "channels_last"
) -> Any:
    """Transforms pixels into what the stem reads, for models without preprocessing layers.

    One implementation serves NumPy and `tf.data`:
    `dataset.map(lambda image: preprocess(image, spec.preprocessing))`.

    Args:
        images: Pixels in 0..255, RGB, integers or floats, of shape `(..., height, width,
            channels)`, or `(..., channels, height, width)` for `"channels_first"`: one image or
            a batch. A TensorFlow tensor, or anything that NumPy reads.
        preprocessing: The input transform.
        data_format: `"channels_last"` or `"channels_first"`.

    Returns:
        float32 of the same shape: a TensorFlow tensor if `images` is one, else a NumPy array.

    Raises:
        TypeError: If the images do not hold numbers.
        ValueError: If the shape or `data_format` is wrong.
    """
    _check_data_format(data_format)
    images = _as_float32(images)
    if len(images.shape) < 3:
        raise ValueError(
            "Images have the shape (height, width, channels), with or without a batch axis. "
            f"Received: shape {tuple(images.shape)}"
        )
    channel_axis = -1 if data_format == "channels_last" else -3
    statistics = channel_statistics(preprocessing, images.shape[channel_axis])
    images = images * np.float32(preprocessing.scale) + np.float32(preprocessing.offset)
    if statistics is None:
        return images
    mean, std = (np.asarray(values, np.float32) for values in statistics)
    if data_format == "channels_first":
        mean, std = mean[:, None, None], std[:, None, None]
    return (images - mean) / std


def preprocess_in_graph(
    x: keras.KerasTensor, preprocessing: PreprocessingSpec, data_format: str | None = None
) -> keras.KerasTensor:
    """Puts the input transform into a Functional model, as stock Keras layers.

    Adds `Rescaling(name="rescaling")` and, where the transform has a mean and a standard
    deviation, `Normalization(name="normalization")`: the layers and names of
    keras.applications. With `preprocessing.stored_in_weights` the constants are weights (mean,
    variance, count) and stand in weights files; otherwise they are part of the configuration.

    Keras copies the weights of `Normalization` into constants when a file is loaded. After
    `model.set_weights(...)`, which loads no file, call `finalize_state()` of the layer.

    Args:
        x: Pixels in 0..255, shape `(batch, height, width, channels)` or, for channels first,
            `(batch, channels, height, width)`.
        preprocessing: The input transform.
        data_format: `"channels_last"`, `"channels_first"`, or None for Keras' global setting.

    Returns:
        The transformed tensor, same shape, float32 (float64 under a float64 policy).

    Raises:
        ValueError: If the number of channels is unknown or `data_format` is wrong.
    """
    data_format = keras.config.image_data_format() if data_format is None else data_format
    _check_data_format(data_format)
    # Normalization counts positive axes, and keras.applications stores them this way.
    channel_axis = 3 if data_format == "channels_last" else 1
    if len(x.shape) != 4:
        raise ValueError(f"Expected a batch of images, of rank 4. Received: shape {x.shape}")
    statistics = channel_statistics(preprocessing, x.shape[channel_axis])

    # Half precision would round the constants, and with them every pixel. In float32 the two
    # layers cost next to nothing, and the layers that follow cast to their own type.
    policy = keras.config.dtype_policy()
    dtype = "float64" if policy.compute_dtype == "float64" else "float32"
    x = keras.layers.Rescaling(
        preprocessing.scale, offset=preprocessing.offset, dtype=dtype, name="rescaling"
    )(x)
    if statistics is None:
        return x
    mean, std = statistics
    variance = [value**2 for value in std]
    if not preprocessing.stored_in_weights:
        return keras.layers.Normalization(
            axis=channel_axis, mean=list(mean), variance=variance, dtype=dtype, name="normalization"
        )(x)
    layer = keras.layers.Normalization(axis=channel_axis, dtype=dtype, name="normalization")
    layer.build(x.shape)
    layer.adapt_mean.assign(mean)
    layer.adapt_variance.assign(variance)
    # The layer computes with copies of its weights, which only this call renews.
    layer.finalize_state()
    return layer(x)


def crop_and_resize(
    image: Image.Image,
    size: tuple[int, int],
    preprocessing: PreprocessingSpec,
    crop: str = "published",
) -> np.ndarray:
    """Brings a photograph to the size of a model's input.

    Args:
        image: A Pillow image of any mode; see `to_rgb`.
        size: `(height, width)` in pixels.
        preprocessing: Gives `crop_padding` and `interpolation`.
        crop: `"published"`: the central region of the published evaluation, resized (see
            `crop_box`). `"center"`: the central region of exactly `size`, no resizing, for images
            that are already at the model's scale. `"stretch"`: the whole image resized, its
            proportions lost.

    Returns:
        uint8 array of shape `(height, width, 3)`, RGB. Resizing is Pillow's, antialiased.

    Raises:
        ValueError: If `crop` is unknown, `size` is no pair of positive integers, the image is
            smaller than `size` with `"center"`, or its mode cannot be converted.
    """
    from PIL import Image

    box = crop_box((image.height, image.width), size, preprocessing, crop)
    image = to_rgb(image.crop(box))
    height, width = size
    if image.size != (width, height):
        resampling = Image.Resampling[preprocessing.interpolation.upper()]
        image = image.resize((width, height), resampling)
    return np.array(image, dtype=np.uint8)


def crop_box(
    image_size: tuple[int, int],
    size: tuple[int, int],
    preprocessing: PreprocessingSpec,
    crop: str = "published",
) -> tuple[int, int, int, int]:
    """The region of an image that `crop_and_resize` reads.

    `"published"` takes the central square of side `min(image) * size / (size + crop_padding)`,
    rounded down. For inputs that are not square it is the largest central region in the input's
    proportions, `size * min(image_height / (height + padding), image_width / (width + padding))`,
    which is the same for squares.

    Args:
        image_size: `(height, width)` of the image in pixels.
        size: `(height, width)` of the model's input in pixels.
        preprocessing: Gives `crop_padding`.
        crop: `"published"`, `"center"` or `"stretch"`, see `crop_and_resize`.

    Returns:
        `(left, upper, right, lower)` in pixels, as Pillow counts them.

    Raises:
        ValueError: As `crop_and_resize`.
    """
    check_crop(size, crop)
    (image_height, image_width), (height, width) = image_size, size
    if crop == "stretch":
        return 0, 0, image_width, image_height
    if crop == "published":
        padding = preprocessing.crop_padding
        # Integers throughout: with floats a region would now and then lose a row by rounding.
        if image_height * (width + padding) <= image_width * (height + padding):
            numerator, denominator = image_height, height + padding
        else:
            numerator, denominator = image_width, width + padding
        height = max(1, height * numerator // denominator)
        width = max(1, width * numerator // denominator)
    elif image_height < height or image_width < width:
        raise ValueError(
            f"The image of {image_height} x {image_width} (height x width) is smaller than the "
            f"model's input of {height} x {width}, and crop='center' does not resize. Use "
            "crop='published' or crop='stretch'."
        )
    upper = (image_height - height + 1) // 2
    left = (image_width - width + 1) // 2
    return left, upper, left + width, upper + height


def check_crop(size: tuple[int, int], crop: str) -> None:
    """Raises ValueError unless `size` is `(height, width)` and `crop` is one of `CROPS`."""
    if crop not in CROPS:
        raise ValueError(f"`crop` must be one of {CROPS}. Received: crop={crop!r}")
    if (
        not isinstance(size, (tuple, list))
        or len(size) != 2
        or not all(isinstance(side, (int, np.integer)) and side > 0 for side in size)
    ):
        raise ValueError(
            f"`size` is (height, width), two positive integers in pixels. Received: size={size!r}"
        )


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts a Pillow image of any photographic mode to 8-bit RGB.

    Transparency is composited over white, as viewers show it (dropping the alpha channel would
    bring out whatever colour lies hidden under transparent pixels). 16-bit grey is scaled to
    8 bits. CMYK is converted without a colour profile; profiles are ignored throughout.

    Args:
        image: Modes 1, L, LA, P, PA, RGB, RGBA, CMYK, YCbCr, HSV, I and I;16.

    Returns:
        An image of mode RGB and the same size.

    Raises:
        ValueError: If the mode cannot be converted.
    """
    from PIL import Image

    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow opens 16-bit grey in one of these modes, and its own conversion would clip it.
        values = np.asarray(image).astype(np.uint32).clip(0, 65535)
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    if image.mode not in ("1", "L", "P", "CMYK", "YCbCr", "HSV"):
        raise ValueError(
            f"Images of mode {image.mode!r} cannot be converted to 8-bit RGB without knowing "
            "their range. Save the image as 8-bit RGB or grey first."
        )
    return image.convert("RGB")


def _as_float32(images: Any) -> Any:
    # A TensorFlow tensor can only exist once TensorFlow is loaded, and NumPy users need not be.
    tensorflow = sys.modules.get("tensorflow")
    if tensorflow is not None and tensorflow.is_tensor(images):
        return tensorflow.cast(images, tensorflow.float32)
    array = np.asarray(images)
    if array.dtype.kind not in "uif":
        raise TypeError(
            f"Images hold integers or floats in 0..255. Received: dtype {array.dtype} "
            f"({type(images).__name__})"
        )
    return array.astype(np.float32)


def _check_data_format(data_format: str) -> None:
    if data_format not in DATA_FORMATS:
        raise ValueError(
            f"`data_format` must be one of {DATA_FORMATS}. Received: data_format={data_format!r}"
        )
