import numpy as np
import pytest
from small_model import SIZE, build_model

from keras_effnet.export import to_tflite


@pytest.fixture(scope="session")
def model():
    return build_model()


@pytest.fixture(scope="session")
def images():
    """Coloured blotches in 0..255: unlike noise, their averages differ."""
    random = np.random.default_rng(1)
    colours = random.uniform(0, 255, (48, 2, 2, 3))
    blotches = colours.repeat(SIZE // 2, axis=1).repeat(SIZE // 2, axis=2)
    noise = random.normal(0, 20, blotches.shape)
    return np.clip(blotches + noise, 0, 255).astype(np.float32)


@pytest.fixture(scope="session")
def float_export(model, tmp_path_factory):
    return to_tflite(model, tmp_path_factory.mktemp("float") / "m.tflite")


@pytest.fixture(scope="session")
def int8_export(model, images, tmp_path_factory):
    return to_tflite(
        model,
        tmp_path_factory.mktemp("int8") / "m.tflite",
        quantization="int8",
        calibration_data=[images[:20], images[20:]],
        io_dtype="uint8",
    )


@pytest.fixture(scope="session")
def float_bytes(float_export):
    return float_export.path.read_bytes()


@pytest.fixture(scope="session")
def int8_bytes(int8_export):
    return int8_export.path.read_bytes()
