"""Training through tensorflow-model-optimization (tfmot), the second engine.

tfmot works on models of tf_keras, the former Keras, and its 8-bit scheme does not know all layers
of EfficientNet. This bridge builds the tf_keras twin of a Keras 3 model and brings the scheme of
this package along, so that tfmot pipelines (training, pruning, clustering) can use the family:

    twin = to_tf_keras(model)                          # float, the same names and weights
    trained = quantize_model(model, photographs)       # quantized: compile and fit it
    data = convert(trained)                            # the bytes of an integer-only TFLite file
    quantized = from_tf_keras(trained)                 # a quantized Keras 3 model

Needs the packages of the extra `tfmot`, which are imported when a function is called.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import keras
import numpy as np

from .. import quantize
from ..fake_quant import LEARNED
from ..quantize import TRAINED, QuantizationConfig
from ..ranges_file import TensorRange
from ._packages import import_tfmot

if TYPE_CHECKING:
    import tf_keras

    from .quantizers import EfficientNetScheme

__all__ = ["convert", "from_tf_keras", "quantize_model", "scheme", "to_tf_keras"]


def to_tf_keras(model: keras.Model) -> tf_keras.Model:
    """Returns the tf_keras twin of a Keras 3 model.

    Args:
        model: A Functional or Sequential model of image layers, float or from `quantize_model`;
            of this package, of `keras.applications` or any other. It is not changed.

    Returns:
        A Functional tf_keras model with the same layer names and weights, in float32; nested
        models are inlined. Layers of a quantized model are wrapped by tfmot's
        `QuantizeWrapperV2`, named `quant_...`, and hold the same ranges.

    Raises:
        ImportError: If tf_keras or tensorflow-model-optimization is not installed.
        TypeError: If the model is none of Keras 3 or not Functional, or a layer has no twin.
        ValueError: If a layer has a regularizer or a constraint, or if a quantized model keeps
            layers in float, learns its ranges, splits swishes or has dense layers with one scale
            for each unit.
    """
    import_tfmot()
    from .twin import to_twin

    return to_twin(model)


def from_tf_keras(model: tf_keras.Model, quantized: bool = True) -> keras.Model:
    """Returns the Keras 3 model of a tf_keras twin, with its present weights.

    Args:
        model: A tf_keras model of the layers that `to_tf_keras` makes: float, or quantized by
            `quantize_model` or `scheme`, trained or not. Models that were pruned or clustered
            must be stripped of their wrappers first. It is not changed.
        quantized: Whether the ranges of a quantized model come along; otherwise its trained
            weights alone, in a float model whose batch norms are folded.

    Returns:
        A Functional Keras 3 model. A quantized one is as if `quantize_model` had made it: it can
        be trained further, saved and exported to TFLite and ONNX.

    Raises:
        ImportError: If tf_keras or tensorflow-model-optimization is not installed.
        TypeError: If the model is none of tf_keras or not Functional, or a layer has no twin.
        ValueError: If the model was quantized by another scheme, layers were added after it was
            quantized, or a layer has a regularizer or a constraint.
    """
    import_tfmot()
    from .twin import from_twin

    return from_twin(model, quantized)


# Corrections after which zeros of a kernel may differ from zero.
_MOVING_ZEROS = ("learned_rounding", "kernel_reconstruction")


def quantize_model(
    model: keras.Model,
    calibration_data: Iterable | np.ndarray | None,
    config: QuantizationConfig | None = None,
    verbose: bool = True,
    ranges: Mapping[str, TensorRange] | None = None,
    *,
    preserve_sparsity: bool = False,
) -> tf_keras.Model:
    """Quantizes a Keras 3 model as `quantization.quantize_model` does, for training with tfmot.

    Args:
        model: See `quantization.quantize_model`.
        calibration_data: Likewise.
        config: Likewise, with `per_channel_head=False`, which is the default here: TensorFlow's
            converter takes one scale for a dense kernel. `keep_float` must be empty, and
            "swish_splitting" is left out: tfmot has one kernel for each call of a layer.
            `training_ranges` is "fixed", or "moving_average", by which the ranges of tensors
            follow their extremes in training, as tfmot's own quantizers do.
        verbose: Whether to show the progress of calibration.
        ranges: See `quantization.quantize_model`.
        preserve_sparsity: Whether weights that are zero stay zero in training, for models that
            were pruned. The configuration must leave "learned_rounding" and
            "kernel_reconstruction" out, which move zeros.

    Returns:
        A tf_keras model to compile and fit. Before training it predicts what the quantized Keras
        3 model of the same configuration predicts; its kernel limits follow the kernels in
        training.

    Raises:
        ImportError: If tf_keras or tensorflow-model-optimization is not installed.
        TypeError: See `quantization.quantize_model`.
        ValueError: Likewise, and if the configuration asks for what this engine cannot do.
    """
    import_tfmot()
    from .twin import to_twin

    if config is None:
        config = QuantizationConfig(per_channel_head=False)
        if preserve_sparsity:
            kept = tuple(name for name in config.corrections if name not in _MOVING_ZEROS)
            config = dataclasses.replace(config, corrections=kept)
    _check(config, preserve_sparsity)
    kept = tuple(name for name in config.corrections if name != "swish_splitting")
    config = dataclasses.replace(config, corrections=kept)
    quantized = quantize.quantize_model(model, calibration_data, config, verbose, ranges)
    return to_twin(quantized, preserve_sparsity)


def _check(config: QuantizationConfig, preserve_sparsity: bool) -> None:
    if config.per_channel_head:
        raise ValueError(
            "TensorFlow's converter takes one scale for the kernel of a dense layer from a tfmot "
            "model: use QuantizationConfig(per_channel_head=False). Received: True"
        )
    if config.keep_float:
        raise ValueError(
            "The engine 'tfmot' quantizes all layers: use `keep_float=()`, or the native engine. "
            f"Received: {config.keep_float}"
        )
    if config.training_ranges == LEARNED:
        raise ValueError(
            "The engine 'tfmot' does not learn ranges by gradient: use training_ranges=\"fixed\" "
            f'or "moving_average". Received: {config.training_ranges!r}'
        )
    if config.batch_norm == TRAINED:
        raise ValueError(
            "The engine 'tfmot' trains with folded batch norms: use batch_norm=\"folded\", or the "
            f"native engine. Received: {config.batch_norm!r}"
        )
    if preserve_sparsity and set(_MOVING_ZEROS) & set(config.corrections):
        raise ValueError(
            f"The corrections {_MOVING_ZEROS} make zeros of a kernel differ from zero: leave them "
            f"out of `corrections` with `preserve_sparsity`. Received: {config.corrections}"
        )


def scheme(preserve_sparsity: bool = False) -> EfficientNetScheme:
    """Returns the scheme of the family for `tfmot.quantization.keras.quantize_apply`.

    For pipelines that call tfmot themselves: annotate the whole twin with
    `quantize_annotate_model` and apply this scheme. It folds batch norms and the normalization of
    the image, splits swish into sigmoid and product, and gives every tensor its quantizer. Nothing
    is calibrated: ranges begin at tfmot's [-6, 6] and follow the batches, for which they need some
    thousand steps; `quantize_model` spares them.

    Args:
        preserve_sparsity: See `quantize_model`.

    Raises:
        ImportError: If tf_keras or tensorflow-model-optimization is not installed.
    """
    import_tfmot()
    from .quantizers import EfficientNetScheme
    from .twin import fold_and_wrap

    return EfficientNetScheme(lambda model: fold_and_wrap(model, preserve_sparsity))


def convert(model: tf_keras.Model) -> bytes:
    """Converts a quantized tf_keras model to an integer-only TFLite file with TensorFlow.

    Args:
        model: A model from `quantize_model` or `scheme`, trained or not, with one input.

    Returns:
        The bytes of the file: batch 1, input and outputs in uint8, no float tensor, and one
        signature "serving_default" with the input "images" and the output "outputs"
        ("outputs_0", "outputs_1", ... if there are several).

    Raises:
        ImportError: If tf_keras or tensorflow-model-optimization is not installed.
        TypeError: If the model is none of tf_keras or not Functional.
        ValueError: If the model is not quantized or has several inputs, if the converter refuses
            it, or if the file would compute in float somewhere.
    """
    import_tfmot()
    from .tflite import convert_model

    return convert_model(model)
