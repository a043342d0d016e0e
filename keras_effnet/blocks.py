"""The building blocks of the family, as functions of Keras tensors.

Each takes a symbolic tensor and returns one; the layers are stock Keras layers, so a saved model
loads anywhere Keras is installed. They follow `keras.config.image_data_format()`.
"""

from __future__ import annotations

from dataclasses import dataclass

import keras
from keras import layers

from .specs import ModelSpec, check_rate, check_se_ratio


def conv_initializer() -> keras.initializers.Initializer:
    """A new initializer of convolution kernels: He normal on fan-out (V1 code)."""
    return keras.initializers.VarianceScaling(
        scale=2.0, mode="fan_out", distribution="truncated_normal"
    )


@dataclass(frozen=True)
class BlockStyle:
    """What all blocks of a network have in common.

    Args:
        activation: Keras name of the activation.
        se_activation: Keras name of the activation inside squeeze-and-excite, None for
            `activation`.
        se_gate: Keras name of the gate of squeeze-and-excite.
        bn_momentum: Of the batch norms.
        bn_epsilon: Of the batch norms.
        padding: Of strided convolutions: `"same"`; `"explicit"` for a `ZeroPadding2D` of equal
            effect before them; `"torch"` for one that pads all sides alike, as PyTorch does.
        depthwise_name: Suffix of the depthwise layers' names.
    """

    activation: str = "swish"
    se_activation: str | None = None
    se_gate: str = "sigmoid"
    bn_momentum: float = 0.99
    bn_epsilon: float = 1e-3
    padding: str = "same"
    depthwise_name: str = "dwconv"

    def __post_init__(self) -> None:
        for field in ("activation", "se_activation", "se_gate"):
            value = getattr(self, field)
            if value is None and field == "se_activation":
                continue
            try:
                keras.activations.get(value)
            except ValueError:
                value = None
            if not isinstance(value, str):
                raise ValueError(
                    f"`{field}` must be the name of a Keras activation, such as 'swish', "
                    f"'hard_swish', 'relu6' or 'relu'. Received: {field}={getattr(self, field)!r}"
                )

    @classmethod
    def of(cls, spec: ModelSpec) -> BlockStyle:
        """The style of a variant."""
        return cls(**{field: getattr(spec, field) for field in cls.__dataclass_fields__})


DEFAULT_STYLE = BlockStyle()
"""EfficientNet's own choices."""


def channel_axis() -> int:
    """Index of the channels in a batch of images, by `keras.config.image_data_format()`."""
    return 1 if keras.config.image_data_format() == "channels_first" else -1


def spatial_shape(x: keras.KerasTensor) -> tuple[int | None, int | None]:
    """Height and width of a batch of images; None where unknown."""
    return tuple(x.shape[2:4] if channel_axis() == 1 else x.shape[1:3])


def swish(x):
    """Swish, also called SiLU: `x * sigmoid(x)`.

    Smooth and not monotonic: it falls to -0.278 at x = -1.278 and goes to 0 below, so small
    negative inputs still pass a gradient. In integer arithmetic it is a LOGISTIC and a MUL.

    Source: Ramachandran et al., "Searching for Activation Functions", arXiv:1710.05941.

    Args:
        x: A tensor of any shape.

    Returns:
        A tensor of the same shape and dtype, values in [-0.278, inf).
    """
    return keras.activations.silu(x)


def batch_norm(x: keras.KerasTensor, name: str, style: BlockStyle) -> keras.KerasTensor:
    """Batch normalization over the channels, with the momentum and epsilon of a style."""
    return layers.BatchNormalization(
        axis=channel_axis(), momentum=style.bn_momentum, epsilon=style.bn_epsilon, name=name
    )(x)


def pad_for_stride(
    x: keras.KerasTensor, kernel_size: int, name: str, symmetric: bool = False
) -> keras.KerasTensor:
    """Zero padding before a stride-2 "valid" convolution.

    By default it equals TensorFlow's "same": on an even side that pads one pixel less at the top
    and left; a side that is unknown is taken for even, as keras.applications does.

    Args:
        x: A batch of images or features.
        kernel_size: Side of the kernel, odd.
        name: Name of the layer.
        symmetric: True for PyTorch's `padding=kernel_size // 2`: every side alike.

    Returns:
        The padded tensor.
    """
    after = kernel_size // 2
    if symmetric:
        return layers.ZeroPadding2D(padding=after, name=name)(x)
    padding = tuple(
        (after - (1 if side is None else 1 - side % 2), after) for side in spatial_shape(x)
    )
    return layers.ZeroPadding2D(padding=padding, name=name)(x)


def conv_bn_act(
    x: keras.KerasTensor,
    filters: int,
    kernel_size: int,
    *,
    strides: int = 1,
    activate: bool = True,
    style: BlockStyle = DEFAULT_STYLE,
    prefix: str,
) -> keras.KerasTensor:
    """Convolution without bias, batch norm, activation.

    Args:
        x: `(batch, height, width, channels)`, or channels first.
        filters: Channels out.
        kernel_size: Side of the kernel.
        strides: 1 or 2.
        activate: False leaves the activation out (projections are linear: MobileNetV2,
            arXiv:1801.04381, section 3.2).
        style: Activation, batch norm, padding.
        prefix: The layers are called `{prefix}conv_pad` (where padded explicitly),
            `{prefix}conv`, `{prefix}bn` and `{prefix}activation`.

    Returns:
        A tensor of height and width `ceil(side / strides)`.
    """
    explicit = strides == 2 and style.padding != "same"
    if explicit:
        x = pad_for_stride(x, kernel_size, f"{prefix}conv_pad", style.padding == "torch")
    x = layers.Conv2D(
        filters,
        kernel_size,
        strides=strides,
        padding="valid" if explicit else "same",
        use_bias=False,
        kernel_initializer=conv_initializer(),
        name=f"{prefix}conv",
    )(x)
    x = batch_norm(x, f"{prefix}bn", style)
    return layers.Activation(style.activation, name=f"{prefix}activation")(x) if activate else x


def squeeze_and_excite(
    x: keras.KerasTensor,
    bottleneck: int,
    *,
    style: BlockStyle = DEFAULT_STYLE,
    prefix: str = "",
) -> keras.KerasTensor:
    """Squeeze-and-excite: weighs every channel by a gate computed from all channels.

    Squeeze: global average pooling gives one value per channel. Excite: two 1x1 convolutions
    (fully connected layers over channels), an activation between them and a sigmoid after them,
    give a weight in (0, 1) per channel. Scale: the input is multiplied by it.

    The original puts ReLU between the two layers, EfficientNet its own activation:
    `BlockStyle(se_activation="relu")` gives the former.

    Source: Hu et al., "Squeeze-and-Excitation Networks", arXiv:1709.01507, section 3.

    Args:
        x: `(batch, height, width, channels)`, or channels first.
        bottleneck: Channels between the two layers, at least 1; channels / reduction ratio in the
            original, a quarter of the *block's input* channels in EfficientNet.
        style: Its activation and gate.
        prefix: The layers are called `{prefix}se_squeeze`, `se_reduce`, `se_expand`, `se_excite`.

    Returns:
        A tensor of the same shape.
    """
    channels = x.shape[channel_axis()]
    gate = layers.GlobalAveragePooling2D(keepdims=True, name=f"{prefix}se_squeeze")(x)
    gate = layers.Conv2D(
        bottleneck,
        1,
        padding="same",
        activation=style.se_activation or style.activation,
        kernel_initializer=conv_initializer(),
        name=f"{prefix}se_reduce",
    )(gate)
    gate = layers.Conv2D(
        channels,
        1,
        padding="same",
        activation=style.se_gate,
        kernel_initializer=conv_initializer(),
        name=f"{prefix}se_expand",
    )(gate)
    return layers.Multiply(name=f"{prefix}se_excite")([x, gate])


def drop_path(x: keras.KerasTensor, rate: float, name: str) -> keras.KerasTensor:
    """Drop path (stochastic depth): in training, zeroes the whole of `x` for some images.

    What is left is scaled by `1 / (1 - rate)`; at inference nothing happens. Put on the residual
    branch before the addition, it trains a random shallower network at each step.

    Source: Huang et al., "Deep Networks with Stochastic Depth", arXiv:1603.09382.

    Args:
        x: A batch of images or features.
        rate: Probability of dropping the branch for an image, in [0, 1); 0 adds no layer.
        name: Name of the layer.

    Returns:
        A tensor of the same shape.
    """
    check_rate("drop_path_rate", rate)
    return layers.Dropout(rate, noise_shape=(None, 1, 1, 1), name=name)(x) if rate else x


def _finish_block(
    x: keras.KerasTensor,
    inputs: keras.KerasTensor,
    strides: int,
    skip: bool,
    drop_path_rate: float,
    name: str,
) -> keras.KerasTensor:
    """The residual connection, where input and output have the same shape."""
    if not skip or strides != 1 or inputs.shape[channel_axis()] != x.shape[channel_axis()]:
        return x
    x = drop_path(x, drop_path_rate, f"{name}drop")
    return layers.Add(name=f"{name}add")([x, inputs])


def _se_filters(input_filters: int, se_ratio: float) -> int:
    check_se_ratio(se_ratio)
    return max(1, int(input_filters * se_ratio)) if se_ratio else 0


def mbconv(
    x: keras.KerasTensor,
    output_filters: int,
    *,
    expand_ratio: int = 6,
    kernel_size: int = 3,
    strides: int = 1,
    se_ratio: float = 0.25,
    drop_path_rate: float = 0.0,
    expanded_filters: int | None = None,
    skip: bool = True,
    style: BlockStyle = DEFAULT_STYLE,
    name: str = "",
) -> keras.KerasTensor:
    """MBConv: the inverted residual block with squeeze-and-excite.

    A residual block narrows, convolves and widens again. An *inverted* one widens first: a 1x1
    convolution expands the channels, a depthwise convolution works in the wide space at one
    kernel per channel, squeeze-and-excite weighs the channels, and a linear 1x1 convolution
    projects back to a narrow output, where the input is added if the shapes agree.

    Sources: MobileNetV2, arXiv:1801.04381, section 3.3; MnasNet, arXiv:1807.11626, figure 7;
    EfficientNet, arXiv:1905.11946, section 4.

    Args:
        x: `(batch, height, width, channels)`, or channels first.
        output_filters: Channels out.
        expand_ratio: Inner width as a multiple of the input's; 1 skips the expansion.
        kernel_size: Side of the depthwise kernel, odd.
        strides: Of the depthwise convolution, 1 or 2.
        se_ratio: Squeeze-and-excite bottleneck as a fraction of the block's input channels, in
            [0, 1]; 0 for none.
        drop_path_rate: In [0, 1).
        expanded_filters: Inner width, where it is not `expand_ratio` times the input's.
        skip: Whether the input is added to the output where their shapes agree.
        style: Activation, batch norm, padding.
        name: Prefix of the layers' names, e.g. `"block2a_"`.

    Returns:
        A tensor of `output_filters` channels, height and width `ceil(side / strides)`.

    Raises:
        ValueError: If a ratio or rate is out of its range.
    """
    inputs, input_filters = x, x.shape[channel_axis()]
    se_filters = _se_filters(input_filters, se_ratio)
    if expand_ratio != 1:
        inner = expanded_filters or input_filters * expand_ratio
        x = conv_bn_act(x, inner, 1, style=style, prefix=f"{name}expand_")
    explicit = strides == 2 and style.padding != "same"
    if explicit:
        pad_name = f"{name}{style.depthwise_name}_pad"
        x = pad_for_stride(x, kernel_size, pad_name, style.padding == "torch")
    x = layers.DepthwiseConv2D(
        kernel_size,
        strides=strides,
        padding="valid" if explicit else "same",
        use_bias=False,
        depthwise_initializer=conv_initializer(),
        name=f"{name}{style.depthwise_name}",
    )(x)
    x = batch_norm(x, f"{name}bn", style)
    x = layers.Activation(style.activation, name=f"{name}activation")(x)
    if se_filters:
        x = squeeze_and_excite(x, se_filters, style=style, prefix=name)
    x = conv_bn_act(x, output_filters, 1, activate=False, style=style, prefix=f"{name}project_")
    return _finish_block(x, inputs, strides, skip, drop_path_rate, name)


def fused_mbconv(
    x: keras.KerasTensor,
    output_filters: int,
    *,
    expand_ratio: int = 4,
    kernel_size: int = 3,
    strides: int = 1,
    se_ratio: float = 0.0,
    drop_path_rate: float = 0.0,
    expanded_filters: int | None = None,
    skip: bool = True,
    style: BlockStyle = DEFAULT_STYLE,
    name: str = "",
) -> keras.KerasTensor:
    """Fused MBConv: expansion and depthwise convolution as one full convolution.

    In the early, high-resolution stages a full 3x3 convolution uses accelerators better than a
    1x1 and a depthwise one, in spite of more multiply-adds. With `expand_ratio=1` the whole block
    is one convolution with its activation.

    Source: EfficientNetV2, arXiv:2104.00298, section 3.2 and figure 2.

    Args:
        x: `(batch, height, width, channels)`, or channels first.
        output_filters: Channels out.
        expand_ratio: Inner width as a multiple of the input's.
        kernel_size: Side of the kernel, odd.
        strides: 1 or 2.
        se_ratio: As in `mbconv`; 0 in the published models.
        drop_path_rate: In [0, 1).
        expanded_filters: Inner width, where it is not `expand_ratio` times the input's.
        skip: Whether the input is added to the output where their shapes agree.
        style: Activation, batch norm, padding.
        name: Prefix of the layers' names.

    Returns:
        A tensor of `output_filters` channels, height and width `ceil(side / strides)`.

    Raises:
        ValueError: If a ratio or rate is out of its range.
    """
    inputs, input_filters = x, x.shape[channel_axis()]
    se_filters = _se_filters(input_filters, se_ratio)
    if expand_ratio != 1:
        x = conv_bn_act(
            x,
            expanded_filters or input_filters * expand_ratio,
            kernel_size,
            strides=strides,
            style=style,
            prefix=f"{name}expand_",
        )
    if se_filters:
        x = squeeze_and_excite(x, se_filters, style=style, prefix=name)
    x = conv_bn_act(
        x,
        output_filters,
        1 if expand_ratio != 1 else kernel_size,
        strides=1 if expand_ratio != 1 else strides,
        activate=expand_ratio == 1,
        style=style,
        prefix=f"{name}project_",
    )
    return _finish_block(x, inputs, strides, skip, drop_path_rate, name)
