"""Models of a few layers for the tests of quantization."""

import keras
import numpy as np
from eager import predict

from keras_effnet.export._optional import import_litert
from keras_effnet.export.int8_tflite import convert_quantized
from keras_effnet.quantization.build import build_model
from keras_effnet.quantization.folding import fold
from keras_effnet.quantization.graph import read_model
from keras_effnet.quantization.lowering import read_quantized, tensor_params
from keras_effnet.quantization.params import quantize

layers = keras.layers


def pixels(count=8, side=16, seed=0, channels=3):
    """Images of whole pixels in 0..255, of different brightness."""
    rng = np.random.default_rng(seed)
    levels = rng.uniform(0.3, 1, (count, 1, 1, channels))
    return np.round(255 * levels * rng.uniform(0, 1, (count, side, side, channels))).astype(
        "float32"
    )


def values(count=8, side=16, seed=0, channels=3):
    """Images of real numbers around 0."""
    return np.random.default_rng(seed).normal(size=(count, side, side, channels)).astype("float32")


def randomize(model, seed=0):
    """Gives every bias and batch norm random values: fresh ones hide what folding forgets."""
    rng = np.random.default_rng(seed)
    for variable in model.variables:
        if variable.path.endswith(("gamma", "moving_variance")):
            variable.assign(rng.uniform(0.5, 1.5, variable.shape))
        elif variable.path.endswith(("beta", "moving_mean", "bias")):
            variable.assign(rng.normal(0, 0.5, variable.shape))
    return model


def functional(side, body, channels=3, seed=0):
    """The model `body(input)` for images of `side` pixels, with random weights."""
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((side, side, channels))
    return randomize(keras.Model(inputs, body(inputs)), seed)


def network(x):
    """A small network of this family: a stem, an MBConv block with a residual sum, a head."""
    x = layers.Rescaling(1 / 255)(x)
    x = layers.Conv2D(8, 3, strides=2, padding="same", use_bias=False, name="stem_conv")(x)
    x = residual = layers.Activation("swish")(layers.BatchNormalization()(x))
    x = layers.Conv2D(16, 1, use_bias=False)(x)
    x = layers.Activation("swish")(layers.BatchNormalization()(x))
    x = layers.DepthwiseConv2D(3, padding="same", activation="swish")(x)
    gate = layers.GlobalAveragePooling2D(keepdims=True)(x)
    gate = layers.Conv2D(4, 1, activation="swish")(gate)
    gate = layers.Conv2D(16, 1, activation="sigmoid")(gate)
    x = layers.Conv2D(8, 1, use_bias=False)(layers.Multiply()([x, gate]))
    x = layers.Dropout(0.2)(layers.BatchNormalization()(x))
    x = layers.Conv2D(32, 1)(layers.Add()([x, residual]))
    x = layers.Activation("swish", name="top_activation")(x)
    return layers.Dense(6, activation="softmax")(layers.GlobalAveragePooling2D()(x))


def copy_of(model):
    """A model of the same layers and weights."""
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    return copy


def folded(model, **arguments):
    """The folded graph of a model."""
    return fold(read_model(model, **arguments))


def ops(graph):
    """The operations of a graph, in order."""
    return [node.op for node in graph]


def compute(graph, images):
    """What a folded graph computes in float."""
    return predict(build_model(graph, quantized=False), images)


def integers_of_model(quantized, images):
    """The int8 integers of the output of a quantized Keras model."""
    graph = read_quantized(quantized)
    params = tensor_params(graph, graph.outputs[0])
    return quantize(predict(quantized, images), params)


def integers_of_file(quantized, images, **arguments):
    """The int8 integers that LiteRT computes from the file of a quantized model."""
    interpreter = import_litert().Interpreter(
        model_content=convert_quantized(quantized, "int8"), **arguments
    )
    interpreter.allocate_tensors()
    (source,), (target,) = interpreter.get_input_details(), interpreter.get_output_details()
    graph = read_quantized(quantized)
    outputs = []
    for image in quantize(images, graph[graph.input].params):
        interpreter.set_tensor(source["index"], image[None])
        interpreter.invoke()
        outputs.append(interpreter.get_tensor(target["index"])[0])
    return np.stack(outputs)
