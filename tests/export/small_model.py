"""A model that exports in a second."""

import keras
import numpy as np

SIZE = 16
CLASSES = 7


def build_model(size=SIZE, classes=CLASSES, name="small"):
    """A few layers of every kind that EfficientNet has; its outputs differ from image to image."""
    keras.utils.set_random_seed(0)
    layers = keras.layers
    inputs = keras.Input((size, size, 3))
    x = layers.Rescaling(1 / 255)(inputs)
    x = layers.Normalization(mean=[0.5, 0.45, 0.4], variance=[0.05, 0.06, 0.07])(x)
    x = layers.Conv2D(8, 3, strides=2, padding="same", use_bias=False)(x)
    x = layers.BatchNormalization()(x)
    x = layers.Activation("swish")(x)
    gate = layers.GlobalAveragePooling2D(keepdims=True)(x)
    gate = layers.Conv2D(8, 1, activation="sigmoid")(gate)
    x = layers.Multiply()([x, gate])
    x = layers.Add()([x, layers.DepthwiseConv2D(3, padding="same")(x)])
    x = layers.Dropout(0.5)(x)
    x = layers.GlobalAveragePooling2D()(x)
    outputs = layers.Dense(classes, activation="softmax")(x)
    model = keras.Model(inputs, outputs, name=name)
    random = np.random.default_rng(0)
    for variable in model.variables:
        if variable.path.endswith(("gamma", "moving_variance")):
            variable.assign(random.uniform(0.5, 2.0, variable.shape))
        elif "dense" in variable.path and variable.path.endswith("kernel"):
            variable.assign(random.normal(0, 20, variable.shape))
    return model
