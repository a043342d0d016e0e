"""Every variant of the table quantizes and exports, and its file predicts what its model predicts.

At a small resolution, with random weights whose batch norms were re-estimated on photographs: what
is compared is integer arithmetic, which does not ask where the weights come from.
"""

from dataclasses import replace

import keras
import numpy as np
import pytest
from batch_norms import settle
from PIL import Image

from keras_effnet import build, resolve
from keras_effnet.export import TFLiteRunner, read_tflite, to_tflite
from keras_effnet.preprocessing import crop_and_resize
from keras_effnet.quantization import QuantizationConfig, quantize_model
from keras_effnet.specs import SPECS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="exports to TFLite"),
]

SIDE = 64
CLASSES = 10
# The bar: of 100 photographs, at most one may be decided otherwise, by a tie of two integers.
AGREEMENT = 0.99
# The cheapest way: the other corrections have their own tests, on trained weights.
CONFIG = QuantizationConfig(method="min_max", corrections=())
# Larger networks have no other kind of block, and take minutes: they are shortened.
PARAMETERS = 6e6


def affordable(spec):
    """The variant itself at the small resolution; of a large one, all kinds of its blocks."""
    spec = replace(spec, resolution=SIDE)
    if resolve(spec).parameters < PARAMETERS:
        return spec
    stages = tuple(replace(stage, repeats=min(stage.repeats, 2)) for stage in spec.stages)
    return replace(spec, stages=stages, depth=min(spec.depth, 1.0), width=min(spec.width, 1.0))


@pytest.fixture(scope="module")
def photographs(shared):
    """116 photographs: 16 to settle and calibrate, 100 to compare."""
    files = sorted(shared("data/imagenet-sample/evaluation").rglob("*.jpg"))[:116]
    transform = SPECS["EfficientNetB0"].preprocessing
    return np.stack(
        [crop_and_resize(Image.open(file), (SIDE, SIDE), transform) for file in files]
    ).astype("float32")


def settled(spec, images):
    """A model whose batch norms know what they read, and whose classes are all possible."""
    model = build(spec, classes=CLASSES, input_shape=(SIDE, SIDE, 3))
    settle(model, images)
    pooled = keras.Model(model.inputs, model.get_layer("avg_pool").output)
    head = model.get_layer("predictions")
    kernel, _ = head.get_weights()
    logits = keras.ops.convert_to_numpy(pooled([images], training=False)) @ kernel
    # Without this the classes of random kernels differ more than photographs do.
    deviation = logits.std(axis=0)
    head.set_weights([2 * kernel / deviation, -2 * logits.mean(axis=0) / deviation])
    return model


def decisions(model, images):
    return keras.ops.convert_to_numpy(model(images, training=False)).argmax(-1)


def quantized_with_file(name, photographs, path):
    """A quantized variant, and what its file decides of the photographs for comparison."""
    keras.utils.set_random_seed(0)
    model = settled(affordable(SPECS[name]), photographs[:16])
    quantized = quantize_model(model, photographs[:16], CONFIG, verbose=False)
    to_tflite(quantized, path, quantization="int8")
    assert read_tflite(path).inner_floats == ()
    return quantized, TFLiteRunner(path).predict(photographs[16:]).argmax(-1)


@pytest.mark.parametrize("name", SPECS)
def test_the_file_predicts_what_the_model_predicts(name, photographs, tmp_path):
    quantized, of_file = quantized_with_file(name, photographs, tmp_path / "model.tflite")
    of_model = decisions(quantized, photographs[16:])
    assert len(set(of_model)) >= 5, "a network that always says the same agrees with anything"
    assert np.mean(of_file == of_model) >= AGREEMENT
    keras.backend.clear_session()


def test_the_bar_sees_a_kernel_out_of_place(photographs, tmp_path):
    path = tmp_path / "model.tflite"
    quantized, of_file = quantized_with_file("EfficientNetTiny", photographs, path)
    variable = quantized.get_layer("block3a_project_conv").weights[0]
    variable.assign(np.roll(variable, 1, axis=-1))
    assert np.mean(of_file == decisions(quantized, photographs[16:])) < AGREEMENT
