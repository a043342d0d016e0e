"""Random variations of training images: of one photograph, and of a batch.

All are plain functions of a NumPy generator, so that a generator made of (seed, epoch, image)
gives the same image on every backend, in every run, wherever a run is resumed. Keras has layers of
these names; theirs keep a state of their own, and its RandAugment draws once for a whole batch
and computes all eleven operations each time.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from keras_effnet.preprocessing import crop_and_resize, to_rgb
from keras_effnet.specs import PreprocessingSpec
from keras_effnet.training.config import LARGEST_MAGNITUDE, AugmentationConfig

if TYPE_CHECKING:
    from PIL import Image

# Width over height of a random crop (Szegedy et al., 2015, section 6).
_PROPORTIONS = (3 / 4, 4 / 3)
_ATTEMPTS = 10
# What shows where an image was moved away.
_GREY = (128, 128, 128)
# At the largest magnitude (Cubuk et al., 2018, table 6, https://arxiv.org/abs/1805.09501).
_DEGREES = 30.0
_SHEAR = 0.3
_SHIFT = 0.45
_CONTRAST = 0.9


def vary(
    image: Image.Image,
    size: tuple[int, int],
    preprocessing: PreprocessingSpec,
    config: AugmentationConfig,
    random: np.random.Generator,
    crop: str = "published",
) -> np.ndarray:
    """Makes a training image of a photograph.

    Args:
        image: A Pillow image of any mode.
        size: `(height, width)` of the result in pixels.
        preprocessing: Gives the interpolation, and the padding of the published crop.
        config: What is done.
        random: Draws it.
        crop: `"published"`, `"center"` or `"stretch"`, where none is drawn.

    Returns:
        uint8 array of shape `(height, width, 3)`, RGB.

    Raises:
        ValueError: If the mode of the image cannot be converted.
    """
    from PIL import Image, ImageOps

    if config.min_area < 1:
        resampling = Image.Resampling[preprocessing.interpolation.upper()]
        box = _random_box(image.size, config.min_area, random)
        image = to_rgb(image).resize(size[::-1], resampling, box=box)
    else:
        image = Image.fromarray(crop_and_resize(image, size, preprocessing, crop))
    if config.flip and random.random() < 0.5:
        image = ImageOps.mirror(image)
    if config.rand_augment:
        image = rand_augment(image, config.rand_augment, config.magnitude, random)
    return np.asarray(image, np.uint8)


def _random_box(
    size: tuple[int, int], min_area: float, random: np.random.Generator
) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of a crop of random area, proportions and place."""
    width, height = size
    for _ in range(_ATTEMPTS):
        area = random.uniform(min_area, 1) * width * height
        proportion = math.exp(random.uniform(*np.log(_PROPORTIONS)))
        crop_width, crop_height = math.sqrt(area * proportion), math.sqrt(area / proportion)
        if crop_width <= width and crop_height <= height:
            left = random.uniform(0, width - crop_width)
            top = random.uniform(0, height - crop_height)
            return left, top, left + crop_width, top + crop_height
    # A long, narrow photograph has no such crop.
    return 0, 0, width, height


def rand_augment(
    image: Image.Image, number: int, magnitude: float, random: np.random.Generator
) -> Image.Image:
    """Applies random operations, all of one strength (Cubuk et al., 2019, section 3).

    Args:
        image: RGB.
        number: Of operations, one after the other; each is drawn from all fourteen.
        magnitude: Their strength, in 0..10.
        random: Draws the operations and their signs.

    Returns:
        An RGB image of the same size.
    """
    for _ in range(number):
        operation = OPERATIONS[random.integers(len(OPERATIONS))]
        sign = -1 if random.random() < 0.5 else 1
        image = apply(operation, image, magnitude / LARGEST_MAGNITUDE, sign)
    return image


OPERATIONS = (
    "identity",
    "auto_contrast",
    "equalize",
    "rotate",
    "solarize",
    "color",
    "posterize",
    "contrast",
    "brightness",
    "sharpness",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
)


def apply(operation: str, image: Image.Image, strength: float, sign: int) -> Image.Image:
    """Applies one operation of RandAugment.

    Args:
        operation: One of `OPERATIONS`.
        image: RGB.
        strength: In 0..1; at 0 nothing changes, apart from "auto_contrast" and "equalize", which
            have no strength.
        sign: 1 or -1: the direction, of operations that have one.

    Returns:
        An RGB image of the same size.
    """
    from PIL import Image, ImageEnhance, ImageOps

    enhancers = {
        "color": ImageEnhance.Color,
        "contrast": ImageEnhance.Contrast,
        "brightness": ImageEnhance.Brightness,
        "sharpness": ImageEnhance.Sharpness,
    }
    # Matrices of output to input coordinates, relative to the corner.
    moves = {
        "shear_x": (1, sign * strength * _SHEAR, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, sign * strength * _SHEAR, 1, 0),
        "translate_x": (1, 0, sign * strength * _SHIFT * image.width, 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, sign * strength * _SHIFT * image.height),
    }
    if operation in enhancers:
        return enhancers[operation](image).enhance(1 + sign * strength * _CONTRAST)
    if operation in moves:
        return image.transform(
            image.size,
            Image.Transform.AFFINE,
            moves[operation],
            Image.Resampling.BILINEAR,
            fillcolor=_GREY,
        )
    if operation == "rotate":
        angle = sign * strength * _DEGREES
        return image.rotate(angle, Image.Resampling.BILINEAR, fillcolor=_GREY)
    if operation == "solarize":
        return ImageOps.solarize(image, round(256 * (1 - strength)))
    if operation == "posterize":
        return ImageOps.posterize(image, 8 - round(4 * strength))
    if operation == "auto_contrast":
        return ImageOps.autocontrast(image)
    if operation == "equalize":
        return ImageOps.equalize(image)
    return image


class Mix:
    """How the images of one batch are mixed with each other, by MixUp or by CutMix.

    Args:
        config: What is done.
        size: `(height, width)` of the images.
        batch_size: Images of the batch.
        random: Draws the partners, the share and the rectangle.

    Attributes:
        partners: The image that each image is mixed with, int64 of shape `(batch_size,)`; None if
            nothing is mixed.
        share: What an image keeps of itself, in 0..1.
        box: Top, bottom, left and right of what CutMix replaces; None for MixUp.
    """

    def __init__(
        self,
        config: AugmentationConfig,
        size: tuple[int, int],
        batch_size: int,
        random: np.random.Generator,
    ) -> None:
        self.partners, self.share, self.box = None, 1.0, None
        kinds = [name for name in ("mixup", "cutmix") if getattr(config, name)]
        if not kinds:
            return
        kind = kinds[random.integers(len(kinds))]
        alpha = getattr(config, kind)
        self.partners = random.permutation(batch_size)
        self.share = float(random.beta(alpha, alpha))
        if kind == "cutmix":
            self.box = _cut(size, 1 - self.share, random)
            top, bottom, left, right = self.box
            # The rectangle is whole pixels, and cut off at the border.
            self.share = 1 - (bottom - top) * (right - left) / (size[0] * size[1])

    def images(self, own: np.ndarray, partners: np.ndarray) -> np.ndarray:
        """Mixes images, float32 of shape `(n, height, width, 3)`, with those of their partners."""
        if self.box is None:
            share = np.float32(self.share)
            return share * own + (1 - share) * partners
        top, bottom, left, right = self.box
        mixed = own.copy()
        mixed[:, top:bottom, left:right] = partners[:, top:bottom, left:right]
        return mixed

    def targets(self, own: np.ndarray, partners: np.ndarray) -> np.ndarray:
        """Mixes targets or weights, float32 of shape `(n, …)`."""
        share = np.float32(self.share)
        return share * own + (1 - share) * partners


def _cut(
    size: tuple[int, int], area: float, random: np.random.Generator
) -> tuple[int, int, int, int]:
    """A rectangle of the image's proportions around a random point (Yun et al., section 3.1)."""
    sides = []
    for side in size:
        half = side * math.sqrt(area) / 2
        centre = random.uniform(0, side)
        sides += [round(max(0, centre - half)), round(min(side, centre + half))]
    return tuple(sides)
