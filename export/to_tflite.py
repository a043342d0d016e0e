"""A Keras model as a TFLite file of batch 1: float, float16, dynamic-range or integer-only."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import targets
from ._console import native_logs_muted
from ._optional import import_tensorflow
from .check import NOT_MAPPED, TargetReport, check_file
from .files import check_target, write_whole
from .metadata import ModelMetadata, add_metadata
from .source import check_convertible, check_ends, listing
from .tflite_file import TFLiteFile, read_tflite

if TYPE_CHECKING:
    import keras

QUANTIZATIONS = ("float32", "float16", "dynamic", "int8")
IO_DTYPES = ("float32", "uint8", "int8")

# A model that rescales its input by less than this reads pixels in 0..255 (1/255, 1/127.5 and
# 1/128 are in use).
_PIXEL_SCALE = 0.01
# No set of photographs in 0..255 is this dark; values scaled to 0..1, -1..1 or standardized are.
_DARKEST_MAXIMUM = 16


@dataclass(frozen=True)
class TFLiteExport:
    """What `to_tflite` wrote.

    Args:
        path: The file.
        quantization: As asked for.
        io_dtype: Type of input and output.
        file: Size, inputs, outputs, operators and tensors, read back from the file.
        verdict: What the target makes of the file, or None if it was not asked.
    """

    path: Path
    quantization: str
    io_dtype: str
    file: TFLiteFile
    verdict: TargetReport | None = None


def to_tflite(
    model: keras.Model,
    path: str | os.PathLike,
    *,
    quantization: str = "float32",
    calibration_data: Iterable[np.ndarray] | None = None,
    io_dtype: str = "float32",
    target: str = targets.GENERIC,
    metadata: ModelMetadata | None = None,
    overwrite: bool = False,
) -> TFLiteExport:
    """Writes a Keras model as a TFLite file whose batch size is 1.

    The file holds TFLite's own operators alone and has one signature, `serving_default`, with
    the input `images` and the output `outputs`. It is written whole or not at all.

    Args:
        model: A Functional or Sequential model with one input and one output, all sizes but the
            batch known, computing in float32; of this package, of `keras.applications` or any
            other; or one from `keras_effnet.quantization.quantize_model`. It is not changed.
        path: File to write, usually `*.tflite`.
        quantization: One of

            - `"float32"`: nothing is quantized;
            - `"float16"`: the weights are stored as float16, half the size; computed in float32;
            - `"dynamic"`: the weights are stored as int8, a quarter of the size; activations are
              quantized while the file runs, on processors only;
            - `"int8"`: everything is int8, with int32 biases; there is no float tensor between
              input and output, which is checked. A model from `quantize_model` is written with
              its own integers; layers that it keeps in float stay so.
        calibration_data: For `"int8"` files of float models, and only there: typical inputs, from
            which TensorFlow's converter takes the ranges of the activations. Batches of floats,
            each of the model's input shape and in the scale of its input; an iterable that can
            be iterated more than once (a list, not a generator). 100 to 200 images are usual.
        io_dtype: Type of input and output: `"float32"`, or for `"int8"` also `"uint8"` (a camera's
            pixels as they are, if the model reads 0..255) or `"int8"`. With `"float32"` an int8
            file begins with a QUANTIZE and ends with a DEQUANTIZE operator.
        target: The device: `"generic"`, `"android"` or `"coral"` (see `targets`). For `"coral"`
            the file is int8 with `io_dtype` `"uint8"` or `"int8"`, and a model from
            `quantize_model` is written with the Edge TPU's operators alone; quantize it with
            `QuantizationConfig(per_channel_head=False)`. A file that the target does not take is
            not written.
        metadata: What the file tells of itself, with the names of the classes, for MediaPipe and
            Android's tools; see `ModelMetadata`. None leaves it out.
        overwrite: Whether an existing file may be replaced.

    Returns:
        What was written.

    Raises:
        ImportError: If TensorFlow or LiteRT is not installed.
        OSError: If the file exists and `overwrite` is False, cannot be written, or the disk is
            full.
        RuntimeError: If a float model is to be converted while Keras runs on another backend than
            TensorFlow, or an int8 file came out with float tensors.
        TypeError: If `model` is no Keras model or `calibration_data` can be iterated only once.
        ValueError: If the arguments do not fit each other, the model has unknown sizes, several
            inputs or outputs or computes in half precision, TFLite has no operator for a layer,
            the target does not take the file, the metadata do not fit the model, or the
            calibration data are empty, of another shape or scale, or not finite.
    """
    check_options(quantization, io_dtype, target)
    quantized = _holds_ranges(model)
    _check_calibration(quantization, calibration_data is not None, quantized)
    check_target(path, overwrite=overwrite)
    check_ends(model)
    if quantized:
        # Loads Keras, which importing this room does not.
        from .int8_tflite import convert_quantized

        data = convert_quantized(model, io_dtype, target)
    else:
        check_convertible(model, "TFLite")
        samples = None
        if calibration_data is not None:
            samples = _Samples(calibration_data, model)
            samples.check_first()
        data = _convert(model, quantization, samples, io_dtype)
    file = read_tflite(data)
    if not quantized:
        _check_file(file, quantization)
    verdict = check_file(data, target)
    if not verdict.fits:
        raise ValueError(_refusal(verdict, model.name))
    if metadata is not None:
        data = add_metadata(data, metadata)
        file = read_tflite(data)
    path = write_whole(path, data, overwrite=overwrite)
    return TFLiteExport(path, quantization, io_dtype, file, verdict)


def _refusal(verdict: TargetReport, model_name: str) -> str:
    failed = [
        f"{item.op} {item.output!r}: {item.reasons[0]}"
        for item in verdict.operators
        if item.status == NOT_MAPPED
    ]
    parts = [*verdict.problems]
    if failed:
        parts.append(f"{len(failed)} operators are not mapped: {listing(failed)}.")
    return (
        f"The target {verdict.target!r} does not take {model_name!r}. "
        f"{' '.join(parts)} {' '.join(verdict.advice)}".strip()
    )


def check_options(quantization: str, io_dtype: str, target: str = targets.GENERIC) -> None:
    """Raises ValueError unless all are known and fit each other."""
    for name, value, allowed in (
        ("quantization", quantization, QUANTIZATIONS),
        ("io_dtype", io_dtype, IO_DTYPES),
    ):
        if value not in allowed:
            raise ValueError(f"`{name}` must be one of {allowed}. Received: {name}={value!r}")
    if io_dtype != "float32" and quantization != "int8":
        raise ValueError(
            f"io_dtype={io_dtype!r} needs quantization='int8'; other files read and write "
            f"float32. Received: quantization={quantization!r}"
        )
    allowed = targets.get_target(target).io_dtypes
    if allowed and (quantization != "int8" or io_dtype not in allowed):
        raise ValueError(
            f"target={target!r} needs quantization='int8' and an io_dtype out of {allowed}. "
            f"Received: quantization={quantization!r}, io_dtype={io_dtype!r}"
        )


def reads_pixels(model: keras.Model) -> bool:
    """Whether a model transforms pixels in 0..255 itself.

    Its first layer rescales them, or, if the model is quantized, holds a range of such values.
    """
    import keras

    from keras_effnet.quantization.fake_quant import FakeQuant

    first = next(
        (layer for layer in model.layers if not isinstance(layer, keras.layers.InputLayer)), None
    )
    if isinstance(first, FakeQuant):  # The rescaling of a quantized model is folded away.
        return first.params.max > _DARKEST_MAXIMUM
    return (
        isinstance(first, keras.layers.Rescaling)
        and float(np.max(np.abs(first.scale))) < _PIXEL_SCALE
    )


def _holds_ranges(model: Any) -> bool:
    import keras

    from keras_effnet.quantization import is_quantized

    if not isinstance(model, keras.Model):
        raise TypeError(f"`model` must be a Keras model. Received: {type(model).__name__}")
    return is_quantized(model)


def _check_calibration(quantization: str, given: bool, quantized: bool) -> None:
    if quantized and quantization != "int8":
        raise ValueError(
            "A quantized model is exported with quantization='int8'; for other files export the "
            f"float model it was made of. Received: quantization={quantization!r}"
        )
    if quantized and given:
        raise ValueError(
            "A quantized model holds its ranges already. Drop `calibration_data`, or export the "
            "float model it was made of."
        )
    if quantization == "int8" and not quantized and not given:
        raise ValueError(
            "quantization='int8' needs `calibration_data`: batches of typical inputs, from which "
            "the ranges of the activations are taken."
        )
    if quantization != "int8" and given:
        raise ValueError(
            "`calibration_data` are used by quantization='int8' alone. "
            f"Received: quantization={quantization!r}"
        )


class _Samples:
    """Calibration batches as the single samples that the converter reads, checked on the way."""

    def __init__(self, batches: Iterable[np.ndarray], model: keras.Model) -> None:
        if iter(batches) is batches:
            raise TypeError(
                "`calibration_data` must be an iterable that can be iterated more than once, such "
                f"as a list of batches. Received: {type(batches).__name__}, which is used up by "
                "the first pass"
            )
        self._batches = batches
        self._shape = tuple(model.inputs[0].shape[1:])
        self._pixels = reads_pixels(model)

    def __call__(self) -> Iterator[list[np.ndarray]]:
        highest = -np.inf
        for batch in self._batches:
            batch = self._check(batch)
            highest = max(highest, batch.max())
            for index in range(len(batch)):
                yield [batch[index : index + 1]]
        if self._pixels and highest <= _DARKEST_MAXIMUM:
            raise ValueError(
                "The model rescales its input, so calibration data must hold pixels in 0..255. "
                f"Received: nothing above {highest:g}. Undo the scaling of the images"
            )

    def check_first(self) -> None:
        first = next(iter(self._batches), None)
        if first is None:
            raise ValueError("`calibration_data` hold no batch.")
        self._check(first)

    def _check(self, batch: Any) -> np.ndarray:
        batch = np.asarray(batch)
        if batch.dtype.kind not in "uif":
            raise TypeError(f"Calibration data hold numbers. Received: dtype {batch.dtype}")
        if batch.shape[1:] != self._shape or not len(batch):
            raise ValueError(
                f"Calibration batches must have the shape (n, {', '.join(map(str, self._shape))}) "
                f"of the model's input. Received: {batch.shape}"
            )
        batch = batch.astype(np.float32)
        if not np.isfinite(batch).all():
            raise ValueError("Calibration data hold values that are not finite (NaN or infinity).")
        return batch


def _convert(
    model: keras.Model, quantization: str, samples: _Samples | None, io_dtype: str
) -> bytes:
    tf = import_tensorflow()
    converter_error = _converter_error()
    with tempfile.TemporaryDirectory(prefix="keras-effnet-") as folder, native_logs_muted():
        _save_graph(tf, model, folder)
        converter = tf.lite.TFLiteConverter.from_saved_model(folder)
        if quantization != "float32":
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
        if quantization == "float16":
            converter.target_spec.supported_types = [tf.float16]
        if quantization == "int8":
            converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
            converter.representative_dataset = samples
            converter.inference_input_type = tf.as_dtype(io_dtype)
            converter.inference_output_type = tf.as_dtype(io_dtype)
        try:
            with warnings.catch_warnings():
                # Said of every int8 conversion that calibrates: the ranges come afterwards.
                warnings.filterwarnings("ignore", message="Statistics for quantized inputs")
                return converter.convert()
        except (converter_error, RuntimeError) as error:
            raise ValueError(_explain(str(error), model.name)) from error


def _save_graph(tf: Any, model: keras.Model, folder: str) -> None:
    """Saves the inference graph for batch 1.

    With the batch fixed before tracing every shape is a constant; a graph traced with an unknown
    batch keeps operators that compute shapes.
    """
    spec = tf.TensorSpec((1, *model.inputs[0].shape[1:]), tf.float32, name="images")

    @tf.function(input_signature=[spec])
    def serve(images):
        return {"outputs": model(images, training=False)}

    module = tf.Module()
    # The variables must hang on the saved object to be frozen; the model itself would bring its
    # own functions, traced with an unknown batch.
    module.variables_of_model = [variable.value for variable in model.variables]
    module.serve = serve
    tf.saved_model.save(module, folder, signatures=serve.get_concrete_function())


def _converter_error() -> type[Exception]:
    from tensorflow.lite.python.convert import ConverterError

    return ConverterError


def _explain(message: str, model_name: str) -> str:
    """The converter's pages of text as one sentence."""
    for line in message.splitlines():
        kind, _, names = line.strip().partition(" ops: ")
        if kind in ("TF Select", "Custom"):
            return (
                f"TFLite has no operator for {names} in {model_name!r}. Replace the layers that "
                "use it by others of the same function."
            )
    lines = [line.strip() for line in message.splitlines() if "error:" in line]
    reason = (lines or message.strip().splitlines() or ["no reason given"])[0]
    return f"The TFLite converter refuses {model_name!r}: {reason}"


def _check_file(file: TFLiteFile, quantization: str) -> None:
    """Checks what the format promises, on the file itself."""
    unknown = [tensor for tensor in (*file.inputs, *file.outputs) if -1 in tensor.shape]
    if unknown or "SHAPE" in file.ops:
        raise RuntimeError(
            "The converter left shapes to be computed while the file runs. Replace layers that "
            f"ask for the shape of their input. Received: operators {file.ops}"
        )
    if quantization == "int8" and file.inner_floats:
        raise RuntimeError(
            "The converter left float tensors between input and output: "
            + listing([f"{tensor.name} ({tensor.dtype})" for tensor in file.inner_floats])
            + ". Use layers for which TFLite has integer kernels, or another quantization."
        )
