"""A small model of the family whose predictions differ, for the tests of the tfmot engine."""

import keras
import numpy as np
from hand_made import functional, predict

from keras_effnet.quantization.fake_quant import ChannelScale, PixelShift

layers = keras.layers
SIDE, CLASSES = 16, 6


def body(x):
    """All kinds of layers of EfficientNet in a few: stem, MBConv, fused MBConv, head."""
    x = layers.Rescaling(1 / 255, name="rescaling")(x)
    x = layers.Normalization(mean=[0.5, 0.45, 0.4], variance=[0.05, 0.06, 0.07])(x)
    x = layers.ZeroPadding2D(((0, 1), (0, 1)))(x)
    x = layers.Conv2D(8, 3, strides=2, padding="valid", use_bias=False, name="stem_conv")(x)
    x = residual = layers.Activation("swish")(layers.BatchNormalization()(x))
    x = layers.Conv2D(16, 1, use_bias=False, name="expand_conv")(x)
    x = layers.Activation("swish")(layers.BatchNormalization()(x))
    x = layers.DepthwiseConv2D(3, padding="same", use_bias=False, name="dwconv")(x)
    x = layers.Activation("swish")(layers.BatchNormalization()(x))
    gate = layers.GlobalAveragePooling2D()(x)
    gate = layers.Reshape((1, 1, 16))(gate)
    gate = layers.Conv2D(4, 1, activation="swish", name="se_reduce")(gate)
    gate = layers.Conv2D(16, 1, activation="sigmoid", name="se_expand")(gate)
    x = layers.Conv2D(8, 1, use_bias=False)(layers.Multiply()([x, gate]))
    x = layers.BatchNormalization()(x)
    # Drop path: whole images.
    x = layers.Dropout(0.2, noise_shape=(None, 1, 1, 1), name="drop")(x)
    x = layers.Add()([x, residual])
    x = layers.Conv2D(16, 3, padding="same", use_bias=False)(x)
    x = layers.Activation("swish")(layers.BatchNormalization()(x))
    x = layers.Dropout(0.2)(layers.GlobalAveragePooling2D(name="pool")(x))
    return layers.Dense(CLASSES, activation="softmax", name="predictions")(x)


def blotches(count, seed):
    """Coloured blotches in 0..255 and noise: their averages differ, unlike those of noise."""
    random = np.random.default_rng(seed)
    images = random.uniform(0, 255, (count, 2, 2, 3))
    images = images.repeat(SIDE // 2, axis=1).repeat(SIDE // 2, axis=2)
    return np.round(np.clip(images + random.normal(0, 20, images.shape), 0, 255)).astype("float32")


def varied_model():
    """The model, with a head that tells blotches apart."""
    model = functional(SIDE, body)
    pooled = predict(keras.Model(model.input, model.get_layer("pool").output), blotches(64, 7))
    head = model.get_layer("predictions")
    kernel, _ = head.get_weights()
    logits = pooled @ kernel
    deviation = logits.std(axis=0)
    head.set_weights([2 * kernel / deviation, -2 * logits.mean(axis=0) / deviation])
    return model


def small_model():
    """Three layers with kernels, one of each kind."""

    def body(x):
        x = layers.Conv2D(16, 3, use_bias=False, name="expand_conv")(layers.Rescaling(1 / 255)(x))
        x = layers.Activation("swish")(layers.BatchNormalization()(x))
        x = layers.DepthwiseConv2D(3, strides=2, activation="relu", name="dwconv")(x)
        x = layers.GlobalAveragePooling2D()(x)
        return layers.Dense(CLASSES, activation="softmax", name="predictions")(x)

    return functional(SIDE, body)


LAYERS = {
    "relu": layers.ReLU(),
    "relu6": layers.ReLU(max_value=6),
    "activation relu6": layers.Activation("relu6"),
    "sigmoid": layers.Activation("sigmoid"),
    "tanh": layers.Activation("tanh"),
    "hard_swish": layers.Activation("hard_swish"),
    "hard_sigmoid": layers.Activation("hard_sigmoid"),
    "softmax": layers.Softmax(),
    "fused relu": layers.Conv2D(4, 3, groups=2, dilation_rate=2, activation="relu"),
    "strided": layers.DepthwiseConv2D(3, strides=2, padding="same", activation="relu6"),
    "inverse": layers.Normalization(mean=[1.0, 2, 3, 4], variance=[1.0, 2, 3, 4], invert=True),
    "adapted": layers.Normalization(),
    "two scales": layers.Rescaling([1.0, 2.0, 3.0, 4.0], offset=[0.1, 0.2, 0.3, 0.4]),
    "average": layers.AveragePooling2D(3, strides=2, padding="same"),
    "maximum": layers.MaxPooling2D(2),
    "global average": layers.GlobalAveragePooling2D(keepdims=True),
    "global maximum": layers.GlobalMaxPooling2D(),
    "padding": layers.ZeroPadding2D(((0, 1), (2, 0))),
    "flatten": layers.Flatten(),
    "spatial dropout": layers.SpatialDropout2D(0.5),
    "batch norm": layers.BatchNormalization(scale=False, epsilon=1e-2),
    "dense": layers.Dense(3, use_bias=False),
    # Rounded to 8 bits by the layer itself.
    "channel scale": ChannelScale([0.1, 0.2, 0.35, 0.777]),
    "pixel shift": PixelShift([-124, -116, -104, -90]),
}
