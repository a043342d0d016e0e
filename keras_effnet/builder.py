"""From a spec to a Keras model: stem, stages, head.

The graph depends on the arguments alone, never on weights; `models` loads those afterwards.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace

import keras
from keras import layers

from .blocks import BlockStyle, channel_axis, conv_bn_act, fused_mbconv, mbconv
from .preprocessing import preprocess_in_graph
from .scaling import BlockPlan, resolve
from .specs import ModelSpec

_BLOCKS = {"mbconv": mbconv, "fused_mbconv": fused_mbconv}
_POOLING = {
    "avg": layers.GlobalAveragePooling2D,
    "max": layers.GlobalMaxPooling2D,
}

FEATURE_LEVELS = (1, 2, 3, 4, 5)
"""Levels of the feature pyramid; the features of level l have stride 2^l."""


def build(
    spec: ModelSpec,
    *,
    include_top: bool = True,
    input_tensor: keras.KerasTensor | None = None,
    input_shape: Sequence[int | None] | None = None,
    pooling: str | None = None,
    classes: int = 1000,
    classifier_activation: str | None = "softmax",
    include_preprocessing: bool = True,
    name: str | None = None,
) -> keras.Model:
    """Builds a variant with random weights.

    Args:
        spec: The variant.
        include_top: Whether pooling, dropout and the classifier follow the last convolution.
        input_tensor: A Keras tensor to build upon, or None for a new input.
        input_shape: `(height, width, channels)`, or channels first. By default the spec's
            resolution with 3 channels; without a top, height and width are left open.
        pooling: Without a top: `"avg"` or `"max"` over all positions, or None for the feature map.
        classes: Outputs of the classifier.
        classifier_activation: `"softmax"`, another activation, or None for logits.
        include_preprocessing: Whether the model reads pixels in 0..255 and normalizes them
            itself; if not, it reads what `preprocessing.preprocess` returns.
        name: Of the model, the spec's by default.

    Returns:
        A Functional model. With a top its output is `(batch, classes)`; without,
        `(batch, height / 32, width / 32, filters)`, or `(batch, filters)` with pooling.

    Raises:
        ValueError: If an argument is out of its range, or the input too small.
    """
    if pooling is not None and pooling not in _POOLING:
        raise ValueError(f"`pooling` must be None, 'avg' or 'max'. Received: {pooling!r}")
    if include_top and pooling is not None:
        raise ValueError(
            "`pooling` applies to models without a top; with one, average pooling is part of it. "
            f"Received: include_top=True, pooling={pooling!r}"
        )
    if not isinstance(classes, int) or classes < 1:
        raise ValueError(f"`classes` must be a positive integer. Received: {classes!r}")
    style = BlockStyle.of(spec)
    image = _input(spec, include_top, input_tensor, input_shape)
    plan = resolve(spec, channels=image.shape[channel_axis()], classes=classes)

    x = image
    if include_preprocessing:
        x = preprocess_in_graph(x, spec.preprocessing)
    x = conv_bn_act(
        x, plan.stem.output_filters, 3, strides=spec.stem_strides, style=style, prefix="stem_"
    )
    for block in plan.blocks:
        stage = spec.stages[block.stage - 1]
        x = _BLOCKS[block.block](
            x,
            block.output_filters,
            expand_ratio=stage.expand_ratio,
            kernel_size=block.kernel_size,
            strides=block.strides,
            se_ratio=stage.se_ratio,
            drop_path_rate=block.drop_path_rate,
            expanded_filters=block.expanded_filters,
            skip=stage.skip,
            style=replace(style, padding=stage.padding or style.padding),
            name=block.name,
        )
    x = conv_bn_act(x, plan.top.output_filters, 1, style=style, prefix="top_")
    if include_top:
        x = layers.GlobalAveragePooling2D(name="avg_pool")(x)
        x = classifier(x, classes, spec.dropout_rate, classifier_activation)
    elif pooling is not None:
        x = _POOLING[pooling](name=f"{pooling}_pool")(x)

    with deep_graphs():
        inputs = image if input_tensor is None else keras.utils.get_source_inputs(input_tensor)
        return keras.Model(inputs, x, name=name or spec.name)


# Keras walks a graph with one Python frame per layer, and V2-XL and L2 are more than 1000 deep.
_RECURSION_LIMIT = 10_000


@contextlib.contextmanager
def deep_graphs() -> Iterator[None]:
    """Lets Keras make Functional models that are deeper than Python's recursion limit."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(max(limit, _RECURSION_LIMIT))
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)


def classifier(
    x: keras.KerasTensor, classes: int, dropout_rate: float, activation: str | None
) -> keras.KerasTensor:
    """Dropout and the dense classifier on pooled features.

    Args:
        x: `(batch, filters)`.
        classes: Outputs.
        dropout_rate: In [0, 1); 0 adds no layer.
        activation: `"softmax"`, another one, or None for logits.

    Returns:
        `(batch, classes)`; in float32 under mixed precision, too, because a softmax of 1000
        classes loses its small probabilities in float16.
    """
    if dropout_rate:
        x = layers.Dropout(dropout_rate, name="top_dropout")(x)
    mixed = keras.config.dtype_policy().compute_dtype in ("float16", "bfloat16")
    return layers.Dense(
        classes,
        activation=activation,
        kernel_initializer=keras.initializers.VarianceScaling(
            scale=1 / 3, mode="fan_out", distribution="uniform"
        ),
        dtype="float32" if mixed else None,
        name="predictions",
    )(x)


def feature_layers(spec: ModelSpec) -> dict[int, str]:
    """Names of the layers that end each level of the feature pyramid.

    Args:
        spec: The variant.

    Returns:
        Level to layer name: level l is the last block output of stride 2^l. Variants whose stem
        keeps the resolution start at level 0.
    """
    stride = spec.stem_strides
    names: dict[int, str] = {}
    for block in resolve(spec).blocks:
        stride *= block.strides
        names[int(math.log2(stride))] = _output_layer(block)
    return names


def _output_layer(block: BlockPlan) -> str:
    if block.has_skip:
        return f"{block.name}add"
    if block.block == "fused_mbconv" and not block.expands:
        return f"{block.name}project_activation"
    return f"{block.name}project_bn"


def _input(
    spec: ModelSpec,
    include_top: bool,
    input_tensor: keras.KerasTensor | None,
    input_shape: Sequence[int | None] | None,
) -> keras.KerasTensor:
    """The image tensor, checked."""
    channels_first = channel_axis() == 1
    if input_tensor is not None:
        if not isinstance(input_tensor, keras.KerasTensor):
            raise TypeError(
                "`input_tensor` must be a Keras tensor, such as the output of `keras.Input(…)` "
                f"or of a layer. Received: {type(input_tensor).__name__}"
            )
        shape = tuple(input_tensor.shape[1:])
        if input_shape is not None and tuple(input_shape) != shape:
            raise ValueError(
                "`input_shape` and the shape of `input_tensor` differ; give one of them. "
                f"Received: input_shape={tuple(input_shape)}, input_tensor of shape {shape}"
            )
    elif input_shape is not None:
        shape = tuple(input_shape)
    else:
        side = spec.resolution if include_top else None
        shape = (3, side, side) if channels_first else (side, side, 3)
    layout = "(channels, height, width)" if channels_first else "(height, width, channels)"
    if len(shape) != 3 or shape[0 if channels_first else 2] is None:
        raise ValueError(
            f"The input must be {layout} with a known number of channels. Received: {shape}"
        )
    # Smaller inputs would leave less than one pixel of the last feature map to real content.
    smallest = spec.stem_strides * math.prod(stage.strides for stage in spec.stages)
    for side in shape[1:] if channels_first else shape[:2]:
        if side is not None and side < smallest:
            raise ValueError(
                f"{spec.constructor} reduces its input {smallest} times, so height and width must "
                f"be at least {smallest}. Received: {layout} = {shape}"
            )
    return keras.Input(shape=shape) if input_tensor is None else input_tensor
