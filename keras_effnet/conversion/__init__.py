"""Weights of other projects as Keras models: TensorFlow checkpoints, PyTorch files, Keras files.

`read_checkpoint` builds the model that a file belongs to and fills it, `convert_weights` writes it
as one `.keras` file that also holds its spec; `fetch_converted` does so for an official checkpoint.
"""

from .convert import PREPROCESSINGS, Conversion, convert_weights, fetch_converted, read_checkpoint
from .layouts import LAYOUTS

__all__ = [
    "LAYOUTS",
    "PREPROCESSINGS",
    "Conversion",
    "convert_weights",
    "fetch_converted",
    "read_checkpoint",
]
