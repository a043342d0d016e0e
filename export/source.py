"""What every exporter demands of a Keras model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import keras

_LISTED = 5


def check_ends(model: keras.Model) -> None:
    """Raises ValueError unless a model has one input and one output, of known sizes."""
    # A subclassed model has no symbolic inputs, and raises or returns None depending on its state.
    inputs = getattr(model, "inputs", None)
    if not inputs:
        raise ValueError(
            "Only Functional models, and Sequential models that know their input, can be "
            f"exported. Received: {type(model).__name__} {model.name!r}"
        )
    if len(inputs) != 1 or len(model.outputs) != 1:
        raise ValueError(
            f"The model must have one input and one output. Received: {model.name!r} with "
            f"{len(inputs)} inputs and {len(model.outputs)} outputs"
        )
    if None in inputs[0].shape[1:]:
        raise ValueError(
            "Exported files have fixed sizes. Build the model with a full `input_shape`, e.g. "
            f"(224, 224, 3). Received: input shape {inputs[0].shape} of {model.name!r}"
        )


def check_convertible(model: keras.Model, kind: str) -> None:
    """Raises an error unless TensorFlow can convert a float model.

    Args:
        model: The model.
        kind: Kind of the file, for the message.

    Raises:
        RuntimeError: If Keras runs on another backend.
        ValueError: If the model computes in half precision.
    """
    import keras

    backend = keras.backend.backend()
    if backend != "tensorflow":
        raise RuntimeError(
            f"Float {kind} files are converted from TensorFlow graphs, and Keras runs on another "
            "backend. Save the model with `model.save('model.keras')`, load it in a process "
            "started with KERAS_BACKEND=tensorflow, and export it there. Received: backend "
            f"{backend!r}"
        )
    halves = [
        layer.name
        for layer in model._flatten_layers(include_self=False)
        if layer.compute_dtype in ("float16", "bfloat16")
    ]
    if halves:
        raise ValueError(
            "The model computes in half precision. Build it again under "
            "keras.config.set_dtype_policy('float32') and load its weights; a small TFLite file "
            f"needs quantization='float16'. Received: half-precision layers {listing(halves)}"
        )


def listing(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
