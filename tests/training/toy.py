"""A model and images on which a training takes a second, with the layer names of the family."""

import keras
import numpy as np

from keras_effnet.data import open_images
from keras_effnet.specs import PreprocessingSpec
from keras_effnet.training import Images

SIZE = (16, 16)
COLOURS = np.array([(220, 30, 40), (30, 200, 60), (40, 60, 230)])


def toy_model(seed=0, dropout=0.3):
    """Tells three classes apart: stem, one block with a batch norm, dropout, classifier."""
    keras.utils.set_random_seed(seed)
    layers = keras.layers
    inputs = keras.Input((*SIZE, 3))
    x = layers.Rescaling(1 / 255, name="rescaling")(inputs)
    # Before a batch norm, a bias has no gradient but noise, of which Adam makes large steps.
    x = layers.Conv2D(4, 3, strides=2, use_bias=False, name="stem_conv")(x)
    x = layers.BatchNormalization(name="stem_bn")(x)
    x = layers.Activation("swish", name="stem_activation")(x)
    x = layers.Conv2D(8, 3, strides=2, use_bias=False, name="block1a_project_conv")(x)
    x = layers.BatchNormalization(name="block1a_project_bn")(x)
    x = layers.GlobalAveragePooling2D(name="avg_pool")(x)
    x = layers.Dropout(dropout, name="top_dropout")(x)
    x = layers.Dense(3, activation="softmax", name="predictions")(x)
    return keras.Model(inputs, x, name="toy")


def colour_arrays(count=36, seed=0):
    """Noisy images of three colours, float32 pixels in 0..255, and their classes."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    pixels = random.normal(COLOURS[labels][:, None, None, :], 60, (count, *SIZE, 3))
    return np.clip(pixels, 0, 255).astype(np.uint8).astype(np.float32), labels


def colour_images(count=36, seed=0):
    """The same as `Images`."""
    preprocessing = PreprocessingSpec(crop_padding=0)
    dataset = open_images(colour_arrays(count, seed), SIZE, preprocessing=preprocessing)
    return Images(dataset, 3, preprocessing)
