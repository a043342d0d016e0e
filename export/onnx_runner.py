"""Running an ONNX file in onnxruntime, with floats at both ends."""

from __future__ import annotations

import os

import numpy as np

from .onnx_file import LAYOUT_KEY, open_session, read_onnx
from .runner import dequantize, quantize


class ONNXRunner:
    """An ONNX file of one input and one output, ready to run.

    Floats go in and come out whatever the file's own types are: integer inputs are quantized and
    integer outputs dequantized, with the scales and zero points of the file's metadata. Images
    come with their channels last, whatever the file's own layout is.

    Args:
        source: Path, or the bytes of the file.
        threads: Number of threads, or None for onnxruntime's own choice.

    Attributes:
        file: The content of the file, see `ONNXFile`.
        channels_first: Whether the file's own layout has the channels first.

    Raises:
        FileNotFoundError: If there is no such file, or external data are missing beside it.
        ImportError: If onnx or onnxruntime is not installed.
        ValueError: If it is no ONNX file, onnxruntime cannot load it, it has more than one input
            or output, or `threads` is not positive.
    """

    def __init__(self, source: str | os.PathLike | bytes, *, threads: int | None = None) -> None:
        if threads is not None and threads < 1:
            raise ValueError(f"`threads` must be at least 1, or None. Received: threads={threads}")
        self.file = read_onnx(source)
        if len(self.file.inputs) != 1 or len(self.file.outputs) != 1:
            raise ValueError(
                "Only files with one input and one output can be run. Received: inputs "
                f"{[tensor.name for tensor in self.file.inputs]} and outputs "
                f"{[tensor.name for tensor in self.file.outputs]}"
            )
        self._input, self._output = self.file.inputs[0], self.file.outputs[0]
        shape = self._input.shape
        # Files of other makers do not tell: one or three channels stand where they stand.
        self.channels_first = len(shape) == 4 and (
            self.file.metadata.get(LAYOUT_KEY) == "nchw"
            or (LAYOUT_KEY not in self.file.metadata and shape[1] in (1, 3))
        )
        self._session = open_session(source, threads=threads)

    def predict(self, images: np.ndarray) -> np.ndarray:
        """Runs the file on a batch: as a whole where its batch size is open, else one by one.

        Args:
            images: Floats in the scale of the model's input, shape `(n, height, width, channels)`,
                or, if the file reads no images, `(n, *shape)` with its input's `(1, *shape)`.

        Returns:
            float32 of shape `(n, …)`: the outputs, dequantized.

        Raises:
            ValueError: If the shape is another one.
        """
        images = np.asarray(images, np.float32)
        shape = self._input.shape
        expected = (*shape[2:], shape[1]) if self.channels_first else shape[1:]
        if images.ndim != len(shape) or images.shape[1:] != expected:
            raise ValueError(
                f"The file reads images of shape (n, {', '.join(map(str, expected))})."
                f" Received: shape {images.shape}"
            )
        if not len(images):
            return np.empty((0, *self._output.shape[1:]), np.float32)
        values = quantize(images, self._input)
        if self.channels_first:
            values = np.ascontiguousarray(values.transpose(0, 3, 1, 2))
        step = len(values) if shape[0] < 0 else shape[0]
        outputs = [self._run(values[i : i + step]) for i in range(0, len(values), step)]
        return dequantize(np.concatenate(outputs), self._output)

    def _run(self, values: np.ndarray) -> np.ndarray:
        [outputs] = self._session.run(None, {self._input.name: values})
        return outputs
