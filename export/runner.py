"""Running a TFLite file in LiteRT, with floats at both ends."""

from __future__ import annotations

import os

import numpy as np

from ._console import native_logs_muted
from ._optional import import_litert
from .tflite_file import TensorInfo, describe, load_bytes, read_tflite


class TFLiteRunner:
    """A TFLite file of one input and one output, ready to run.

    Floats go in and come out whatever the file's own types are: integer inputs are quantized
    with the scale and zero point of the file, integer outputs dequantized.

    Args:
        source: Path, or the bytes of the file.
        threads: Number of threads, or None for LiteRT's own choice.

    Attributes:
        file: The content of the file, see `TFLiteFile`.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If LiteRT is not installed.
        ValueError: If it is no TFLite file, LiteRT cannot load it, it has more than one input or
            output, or `threads` is not positive.
    """

    def __init__(self, source: str | os.PathLike | bytes, *, threads: int | None = None) -> None:
        if threads is not None and threads < 1:
            raise ValueError(f"`threads` must be at least 1, or None. Received: threads={threads}")
        litert = import_litert()
        data = load_bytes(source)
        self.file = read_tflite(data)
        if len(self.file.inputs) != 1 or len(self.file.outputs) != 1:
            raise ValueError(
                "Only files with one input and one output can be run. Received: "
                f"{len(self.file.inputs)} inputs and {len(self.file.outputs)} outputs"
            )
        self._input, self._output = self.file.inputs[0], self.file.outputs[0]
        try:
            with native_logs_muted():
                self._interpreter = litert.Interpreter(model_content=data, num_threads=threads)
                self._interpreter.allocate_tensors()
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"LiteRT cannot load {describe(source)}: {error}") from error
        self._input_index = self._interpreter.get_input_details()[0]["index"]
        self._output_index = self._interpreter.get_output_details()[0]["index"]

    def predict(self, images: np.ndarray) -> np.ndarray:
        """Runs the file on a batch, one image after the other.

        Args:
            images: Floats in the scale of the model's input, shape `(n, *shape)`, where
                `(1, *shape)` is the shape of the file's input.

        Returns:
            float32 of shape `(n, …)`: the outputs, dequantized.

        Raises:
            ValueError: If the shape is another one.
        """
        images = np.asarray(images, np.float32)
        if images.ndim != len(self._input.shape) or images.shape[1:] != self._input.shape[1:]:
            raise ValueError(
                f"The file reads images of shape (n, {', '.join(map(str, self._input.shape[1:]))})."
                f" Received: shape {images.shape}"
            )
        values = quantize(images, self._input)
        outputs = []
        for index in range(len(values)):
            self._interpreter.set_tensor(self._input_index, values[index : index + 1])
            self._interpreter.invoke()
            outputs.append(self._interpreter.get_tensor(self._output_index))
        if not outputs:
            return np.empty((0, *self._output.shape[1:]), np.float32)
        return dequantize(np.concatenate(outputs), self._output)


def quantize(values: np.ndarray, tensor: TensorInfo) -> np.ndarray:
    """Brings floats to the type of a tensor: `round(value / scale) + zero_point`, clipped.

    Args:
        values: Floats of any shape.
        tensor: A per-tensor quantized or a float tensor.

    Returns:
        An array of the tensor's type.
    """
    dtype = np.dtype(tensor.dtype)
    if dtype.kind == "f":
        return values.astype(dtype)
    scale, zero_point = _parameters(tensor)
    limits = np.iinfo(dtype)
    return np.clip(np.round(values / scale) + zero_point, limits.min, limits.max).astype(dtype)


def dequantize(values: np.ndarray, tensor: TensorInfo) -> np.ndarray:
    """Brings a tensor's values to float32: `(value - zero_point) * scale`.

    Args:
        values: Of the tensor's type, any shape.
        tensor: A per-tensor quantized or a float tensor.

    Returns:
        float32 of the same shape.
    """
    if np.dtype(tensor.dtype).kind == "f":
        return values.astype(np.float32)
    scale, zero_point = _parameters(tensor)
    return (values.astype(np.float32) - zero_point) * np.float32(scale)


def _parameters(tensor: TensorInfo) -> tuple[float, int]:
    if len(tensor.scale) != 1:
        raise ValueError(
            f"The tensor {tensor.name!r} of type {tensor.dtype} must have one scale. "
            f"Received: {len(tensor.scale)}"
        )
    return tensor.scale[0], tensor.zero_point[0]
