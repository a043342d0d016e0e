"""The optional packages of this bridge, imported in one place."""

import importlib
import os
from types import ModuleType

# tfmot sets it while it is imported, to find the Keras that it works with.
_LEGACY = "TF_USE_LEGACY_KERAS"


def import_tfmot() -> tuple[ModuleType, ModuleType]:
    """Imports tf_keras and tensorflow-model-optimization.

    `tf.keras` and the environment stay what they were.

    Returns:
        The modules `tf_keras` and `tensorflow_model_optimization`.

    Raises:
        ImportError: If one of them, or TensorFlow, is not installed.
    """
    tensorflow = _import("tensorflow", "tensorflow")
    tf_keras = _import("tf_keras", "tf_keras")
    before = os.environ.get(_LEGACY)
    # Loads what `tf.keras` stands for now; later it would stand for what tfmot asks for.
    hasattr(tensorflow.keras, "Model")
    try:
        tfmot = _import("tensorflow_model_optimization", "tensorflow-model-optimization")
    finally:
        if before is None:
            os.environ.pop(_LEGACY, None)
        else:
            os.environ[_LEGACY] = before
    return tf_keras, tfmot


def _import(module: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"`{package}` is needed to train with tensorflow-model-optimization ({error}). "
            "Install it with: pip install 'keras-effnet[tfmot]'"
        ) from error
