"""The public constructors, and what transfer learning needs.

Every constructor is `create_model` with its name filled in; `create_model` builds the graph
(`builder.build`) and then loads the weights (`weights.load_weights`).
"""

from __future__ import annotations

import inspect
import os
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Concatenate, ParamSpec

import keras

from .builder import FEATURE_LEVELS, build, classifier, deep_graphs, feature_layers
from .conversion import fetch_converted
from .scaling import COMPOUND
from .specs import SPECS, ModelSpec, get_spec
from .weights import (
    check_spec,
    finalize_normalization,
    find_source,
    load_weights,
    locate_weights,
    read_spec,
    weights_names,
)

Weights = str | os.PathLike | None
_P = ParamSpec("_P")

_SE_SUFFIXES = ("_se_reduce", "_se_expand")
_SE_LAYERS = tuple(f"*{suffix}" for suffix in _SE_SUFFIXES)

_ARGUMENTS = """
    Args:
        include_top: Whether pooling, dropout and the classifier follow the last convolution.
        weights: Name of an official training: `"imagenet"`, or such as `"noisy-student"`,
            `"advprop"`, `"autoaugment"` and `"imagenet21k"` (21,843 classes), which `list_weights`
            lists for each variant. The file is fetched once into Keras' cache and verified; a
            checkpoint of the authors is converted there, which needs TensorFlow, and AdvProp's
            bring their own preprocessing. Or the path of a `.h5`, `.weights.h5` or `.keras` file,
            or None for random weights. A file with another number of classes leaves the
            classifier random, with a warning. Files of TensorFlow and PyTorch are converted by
            `convert_weights` first.
        input_tensor: Keras tensor to build upon, or None for a new input.
        input_shape: `(height, width, channels)`, or channels first; by default the variant's
            resolution and 3 channels. Without a top, height and width may be None, and are so
            by default. A pretrained stem is adapted to other numbers of channels.
        pooling: Without a top: `"avg"`, `"max"`, or None for the feature map.
        classes: Outputs of the classifier.
        classifier_activation: Of the classifier; None for logits.
        name: Of the model, by default as in keras.applications.
        include_preprocessing: Whether the model takes pixels in 0..255 and normalizes them
            itself. If not, `keras_effnet.preprocessing.preprocess` makes its input.
        dropout_rate: Before the classifier, in [0, 1); None for the variant's.
        drop_path_rate: Of the last block (it grows linearly from the first), in [0, 1); None for
            the variant's.
        activation: Keras name of the activation throughout, such as `"swish"`, `"hard_swish"`,
            `"relu6"`; None for the variant's.
        se_ratio: Squeeze-and-excite bottleneck as a fraction of a block's input channels in the
            stages that have one, in [0, 1]; 0 for none at all, None for the variant's. With 0 the
            squeeze-and-excite layers of a weights file are left out, with a warning.
        se_activation: Between the two squeeze-and-excite layers; None for `activation`, which is
            EfficientNet's choice (`"relu"` is the original's).
        padding: Of strided convolutions: `"explicit"` or `"same"` (TensorFlow's), or `"torch"`,
            all sides alike, for weights that were trained in PyTorch; None for the variant's.
        se_gate: Gate of squeeze-and-excite; None for the variant's sigmoid. `"hard_sigmoid"` is
            cheaper on phones.
        features_only: True for a model that returns the feature pyramid: a list of the last
            block's output at strides 2, 4, 8, 16 and 32 (levels 1 to 5), without top. Or the
            levels wanted, e.g. `(3, 4, 5)`.

    Returns:
        A Functional `keras.Model`. Input: float32 `(batch, height, width, 3)`, RGB, 0..255.
        Output: float32 `(batch, classes)`, or features.

    Raises:
        ValueError: If an argument is out of its range, or a weights file does not fit; the
            message lists everything that does not.
        OSError: If the official file cannot be fetched.
"""


def create_model(
    model: str | ModelSpec | float,
    include_top: bool = True,
    weights: Weights = "imagenet",
    input_tensor: keras.KerasTensor | None = None,
    input_shape: Sequence[int | None] | None = None,
    pooling: str | None = None,
    classes: int = 1000,
    classifier_activation: str | None = "softmax",
    *,
    name: str | None = None,
    include_preprocessing: bool = True,
    dropout_rate: float | None = None,
    drop_path_rate: float | None = None,
    activation: str | None = None,
    se_ratio: float | None = None,
    se_activation: str | None = None,
    se_gate: str | None = None,
    padding: str | None = None,
    features_only: bool | Sequence[int] = False,
) -> keras.Model:
    spec = _spec(model)
    changes = {
        "dropout_rate": dropout_rate,
        "drop_path_rate": drop_path_rate,
        "activation": activation,
        "se_activation": se_activation,
        "se_gate": se_gate,
        "padding": padding,
    }
    spec = replace(spec, **{key: value for key, value in changes.items() if value is not None})
    if se_ratio is not None:
        spec = spec.with_se_ratio(se_ratio)
    levels = _feature_levels(spec, features_only)
    if levels:
        if pooling is not None:
            raise ValueError(
                f"`features_only` returns feature maps; drop `pooling`. Received: {pooling!r}"
            )
        include_top = False
    # Found, or fetched, before the model is built, so that a wrong path costs no time.
    spec, path = locate(spec, weights, include_top)
    if path is not None:
        check_spec(spec, path, include_preprocessing)
    result = build(
        spec,
        include_top=include_top,
        input_tensor=input_tensor,
        input_shape=input_shape,
        pooling=pooling,
        classes=classes,
        classifier_activation=classifier_activation,
        include_preprocessing=include_preprocessing,
        name=name,
    )
    if path is not None:
        report = load_weights(result, path, ignore=_SE_LAYERS if se_ratio == 0 else ())
        left_out = [name for name in report.ignored if name.endswith(_SE_SUFFIXES)]
        if left_out:
            warnings.warn(
                f"se_ratio=0: {len(left_out)} squeeze-and-excite layers of {str(path)!r} are left "
                f"out ({left_out[0]}, …, {left_out[-1]}). The rest was loaded, but was trained "
                "with them: train the network further before it is used.",
                UserWarning,
                stacklevel=2,
            )
    if levels:
        ends = feature_layers(spec)
        outputs = [result.get_layer(ends[level]).output for level in levels]
        with deep_graphs():
            result = keras.Model(result.inputs, outputs, name=result.name)
    return result


create_model.__doc__ = """Builds a variant by its name, by a spec, or by phi.

    `create_model("EfficientNetB0", …)` equals `EfficientNetB0(…)`. A number is phi, the compound
    scaling of B0: 0 is B0, 1.5 lies between the official B2 and B3, and -3 is a network for small
    boards (see `scaling.CompoundScaling.scale`; `scaling.largest_model` finds the phi for a
    budget). Only official variants have official weights: pass `weights=None` for the others.
""" + _ARGUMENTS.replace(
    "    Args:\n",
    "    Args:\n        model: Name of a variant (see `list_models()`), a `ModelSpec`, or phi.\n",
)

EfficientNet = create_model
"""The same under the name that users of keras.applications look for."""


def locate(
    spec: ModelSpec, weights: Weights, include_top: bool = True
) -> tuple[ModelSpec, Path | None]:
    """What the argument `weights` of a constructor means.

    Args:
        spec: The variant.
        weights: Name of an official training, which is fetched and, if need be, converted; the
            path of a file; or None.
        include_top: Of the official file.

    Returns:
        The spec with the preprocessing that official weights need, and an existing file or None.

    Raises:
        ValueError: If `weights` is none of these.
        WeightsDownloadError: If the official file cannot be fetched.
    """
    if weights is None:
        return spec, None
    official = isinstance(weights, str) and weights in weights_names()
    if official and find_source(spec, weights, include_top).is_checkpoint:
        path = fetch_converted(spec, weights)
        return replace(spec, preprocessing=read_spec(path).preprocessing), path
    return spec, locate_weights(spec, weights, include_top)


def _spec(model: str | ModelSpec | float) -> ModelSpec:
    if isinstance(model, ModelSpec):
        return model
    if isinstance(model, int | float) and not isinstance(model, bool):
        return COMPOUND.scale(SPECS["EfficientNetB0"], model)
    return get_spec(model)


def _feature_levels(spec: ModelSpec, features_only: bool | Sequence[int]) -> tuple[int, ...]:
    if features_only is False:
        return ()
    available = feature_layers(spec)
    if features_only is True:
        return tuple(level for level in FEATURE_LEVELS if level in available)
    levels = tuple(features_only)
    if not levels or not set(levels) <= set(available):
        raise ValueError(
            f"`features_only` takes True or levels among {tuple(available)} (level l has stride "
            f"2^l). Received: {features_only!r}"
        )
    return levels


def _constructor(
    create: Callable[Concatenate[str, _P], keras.Model], variant: str
) -> Callable[_P, keras.Model]:
    """`create` with its first argument filled in, as a function with a signature and help."""

    def construct(*args: _P.args, **kwargs: _P.kwargs) -> keras.Model:
        return create(variant, *args, **kwargs)

    signature = inspect.signature(create)
    construct.__signature__ = signature.replace(parameters=list(signature.parameters.values())[1:])
    spec = SPECS[variant]
    summary = f"{variant}: {spec.resolution} x {spec.resolution} pixels"
    if spec.published:
        summary += (
            f", {spec.published.parameters:g} M parameters, {spec.published.top1:g} % top-1 on "
            f"ImageNet\n    ({spec.published.source})"
        )
    construct.__doc__ = f"{summary}.\n{_ARGUMENTS}"
    construct.__name__ = construct.__qualname__ = variant
    return construct


EfficientNetB0 = _constructor(create_model, "EfficientNetB0")
EfficientNetB1 = _constructor(create_model, "EfficientNetB1")
EfficientNetB2 = _constructor(create_model, "EfficientNetB2")
EfficientNetB3 = _constructor(create_model, "EfficientNetB3")
EfficientNetB4 = _constructor(create_model, "EfficientNetB4")
EfficientNetB5 = _constructor(create_model, "EfficientNetB5")
EfficientNetB6 = _constructor(create_model, "EfficientNetB6")
EfficientNetB7 = _constructor(create_model, "EfficientNetB7")
EfficientNetB8 = _constructor(create_model, "EfficientNetB8")
EfficientNetL2 = _constructor(create_model, "EfficientNetL2")
EfficientNetV2B0 = _constructor(create_model, "EfficientNetV2B0")
EfficientNetV2B1 = _constructor(create_model, "EfficientNetV2B1")
EfficientNetV2B2 = _constructor(create_model, "EfficientNetV2B2")
EfficientNetV2B3 = _constructor(create_model, "EfficientNetV2B3")
EfficientNetV2S = _constructor(create_model, "EfficientNetV2S")
EfficientNetV2M = _constructor(create_model, "EfficientNetV2M")
EfficientNetV2L = _constructor(create_model, "EfficientNetV2L")
EfficientNetV2XL = _constructor(create_model, "EfficientNetV2XL")
EfficientNetLite0 = _constructor(create_model, "EfficientNetLite0")
EfficientNetLite1 = _constructor(create_model, "EfficientNetLite1")
EfficientNetLite2 = _constructor(create_model, "EfficientNetLite2")
EfficientNetLite3 = _constructor(create_model, "EfficientNetLite3")
EfficientNetLite4 = _constructor(create_model, "EfficientNetLite4")
EfficientNetEdgeTPUS = _constructor(create_model, "EfficientNetEdgeTPUS")
EfficientNetEdgeTPUM = _constructor(create_model, "EfficientNetEdgeTPUM")
EfficientNetEdgeTPUL = _constructor(create_model, "EfficientNetEdgeTPUL")
EfficientNetTiny = _constructor(create_model, "EfficientNetTiny")


def replace_head(
    model: keras.Model,
    classes: int,
    *,
    classifier_activation: str | None = "softmax",
    dropout_rate: float = 0.2,
) -> keras.Model:
    """Puts a new classifier on a trained network, for transfer learning.

    Args:
        model: A model of this family, with or without a top. It stays as it is: the new model
            has its own copy of the weights.
        classes: Outputs of the new classifier.
        classifier_activation: Of the new classifier; None for logits.
        dropout_rate: Before it, in [0, 1).

    Returns:
        A new model: everything up to the last activation as in `model`, then average pooling,
        dropout, and a classifier with random weights.

    Raises:
        ValueError: If the model has no layer `top_activation`, or `classes` is not positive.
    """
    if "top_activation" not in (layer.name for layer in model.layers):
        raise ValueError(
            "Expected a model of this family, which has a layer 'top_activation'. Received: "
            f"{model.name!r}, with layers up to {[layer.name for layer in model.layers[-3:]]}"
        )
    if classes < 1:
        raise ValueError(f"`classes` must be a positive integer. Received: {classes!r}")
    with deep_graphs():
        backbone = keras.Model(model.inputs, model.get_layer("top_activation").output)
        copy = keras.models.clone_model(backbone)
    copy.set_weights(backbone.get_weights())
    finalize_normalization(copy)
    x = keras.layers.GlobalAveragePooling2D(name="avg_pool")(copy.output)
    x = classifier(x, classes, dropout_rate, classifier_activation)
    with deep_graphs():
        return keras.Model(copy.inputs, x, name=model.name)


def freeze(model: keras.Model, through_stage: int | None = None) -> keras.Model:
    """Freezes the lower part of a network, for transfer learning; the rest becomes trainable.

    Train the head first with everything else frozen (`freeze(model)`), then the upper stages as
    well (`freeze(model, 4)`), with a small learning rate. A frozen batch norm also keeps its
    moving statistics: Keras runs it in inference mode. Compile the model again afterwards.

    Args:
        model: A model of this family; changed in place.
        through_stage: Freezes the stem and stages 1 to this one; 0 freezes the stem alone. None
            freezes all but the classifier.

    Returns:
        The same model.

    Raises:
        ValueError: If the network has no such stage.
    """
    stages = {layer.name: _stage(layer.name) for layer in model.layers}
    last = max((stage for stage in stages.values() if stage is not None), default=None)
    if last is None or (through_stage is not None and not 0 <= through_stage <= last):
        raise ValueError(
            f"`through_stage` must be None or among 0 (the stem) to {last} (the last stage of "
            f"{model.name!r}). Received: {through_stage!r}"
        )
    # The last convolution comes after the last stage, the head after everything.
    for layer in model.layers:
        stage = stages[layer.name]
        if through_stage is None:
            layer.trainable = layer.name == "predictions"
        else:
            layer.trainable = stage is None or stage > through_stage
    return model


def _stage(layer_name: str) -> int | None:
    """Stage of a layer: 0 for stem and preprocessing, None for what follows the last stage."""
    if layer_name.startswith(("stem_", "rescaling", "normalization")):
        return 0
    match = re.match(r"block(\d+)[a-z]+_", layer_name)
    return int(match[1]) if match else None


def freeze_batch_norms(model: keras.Model) -> keras.Model:
    """Freezes every batch norm: its scale and offset are not trained, its statistics kept.

    Advisable when fine-tuning with small batches or few images, whose statistics are poor.
    Compile the model again afterwards.

    Args:
        model: Any Keras model; changed in place, models inside it included.

    Returns:
        The same model.
    """
    for layer in model._flatten_layers():
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.trainable = False
    return model
