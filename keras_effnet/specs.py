"""The table of variants: every model of the family as plain, immutable data.

A variant is a `ModelSpec`: the stages of its base network, the factors by which they are scaled,
and the choices in which the families differ. Nothing here builds anything; `scaling.resolve`
turns a spec into concrete layer sizes and `builder.build` turns those into a Keras model.

Sources, cited in the rows below:

- V1: Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks",
  ICML 2019 (arXiv:1905.11946). Table 1: stages of B0. Table 2: accuracy, parameters, FLOPs.
- V1 code: tensorflow/tpu, models/official/efficientnet/efficientnet_builder.py, which holds the
  coefficients of B0 to B8 and L2.
- V2: Tan and Le, "EfficientNetV2: Smaller Models and Faster Training", ICML 2021
  (arXiv:2104.00298). Table 4: stages of S. Table 7: accuracy, parameters, FLOPs.
- V2 code: google/automl, efficientnetv2/effnetv2_configs.py and README.md (B0 to B3, M, L, XL).
- Lite: tensorflow/tpu, models/official/efficientnet/lite/efficientnet_lite_builder.py and README.md
  (parameters, multiply-adds, float accuracy).
- EdgeTPU: tensorflow/tpu, models/official/efficientnet/edgetpu/efficientnet_edgetpu_builder.py and
  README.md (float accuracy), efficientnet_model.py (`MBConvBlockWithoutDepthwise`); timm's model
  cards (parameters, multiply-adds).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

BLOCK_TYPES = ("mbconv", "fused_mbconv")
ROUNDINGS = ("keep_90_percent", "nearest")
PADDINGS = ("explicit", "same", "torch")
INTERPOLATIONS = ("bilinear", "bicubic")

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def _require_choice(field: str, value: object, allowed: tuple[str | None, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"`{field}` must be one of {allowed}. Received: {field}={value!r}")


def _require_positive(owner: object, *fields: str) -> None:
    for field in fields:
        value = getattr(owner, field)
        if not value > 0:
            raise ValueError(
                f"`{field}` of {type(owner).__name__} must be positive. Received: {field}={value!r}"
            )


@dataclass(frozen=True)
class StageSpec:
    """A run of equal blocks of the base network, before any scaling.

    Args:
        block: `"mbconv"` (expand, depthwise, squeeze-and-excite, project; V1 section 4) or
            `"fused_mbconv"` (expand and depthwise in one convolution; V2 section 3.2).
        repeats: Number of blocks, at least 1.
        kernel_size: Side of the depthwise (mbconv) or expanding (fused) kernel, odd.
        strides: Stride of the first block of the stage, 1 or 2.
        input_filters: Channels entering the first block, of which its inner width is a multiple.
            The channels that do enter it may be others, where the stem's width is not this one.
        output_filters: Channels leaving every block.
        expand_ratio: Factor of the inner, expanded width to the input width; 1 expands nothing.
        se_ratio: Width of the squeeze-and-excite bottleneck as a fraction of the block's
            *input* channels, in [0, 1]; 0 leaves squeeze-and-excite out.
        skip: Whether blocks whose input and output agree in shape add the former to the latter.
        padding: Of the stage's strided convolutions, or None for the model's.
    """

    block: str
    repeats: int
    kernel_size: int
    strides: int
    input_filters: int
    output_filters: int
    expand_ratio: int
    se_ratio: float
    skip: bool = True
    padding: str | None = None

    def __post_init__(self) -> None:
        _require_choice("block", self.block, BLOCK_TYPES)
        _require_choice("padding", self.padding, (None, *PADDINGS))
        _require_positive(
            self, "repeats", "kernel_size", "input_filters", "output_filters", "expand_ratio"
        )
        if self.kernel_size % 2 == 0:
            raise ValueError(f"`kernel_size` must be odd. Received: {self.kernel_size}")
        if self.strides not in (1, 2):
            raise ValueError(f"`strides` must be 1 or 2. Received: {self.strides}")
        check_se_ratio(self.se_ratio)


def check_se_ratio(se_ratio: float) -> None:
    """Raises ValueError unless `se_ratio` is a fraction in [0, 1]."""
    if not 0 <= se_ratio <= 1:
        raise ValueError(
            "`se_ratio` is a fraction of a block's input channels in [0, 1], 0 for none. "
            f"Received: se_ratio={se_ratio!r}"
        )


@dataclass(frozen=True)
class PreprocessingSpec:
    """The input transform of a model, from pixels in 0..255 to what its stem reads.

    `x -> (x * scale + offset - mean) / std`, channel by channel in RGB order.

    Args:
        scale: Factor of the pixel values.
        offset: Added after the scaling.
        mean: Per channel (3 values), or None to skip the standardization.
        std: Per channel (3 positive values), or None together with `mean`.
        crop_padding: The published evaluation crops the central square of side
            `min(height, width) * size / (size + crop_padding)` and resizes it to `size`; 32 for
            V1 and V2-B, 0 (the whole short side) for V2-S and up.
        interpolation: `"bicubic"` or `"bilinear"`, of that resize.
        stored_in_weights: Whether mean and variance are weights of the model's `Normalization`
            layer (as in keras.applications' V1), or constants of its configuration (as in V2).
    """

    scale: float = 1 / 255
    offset: float = 0.0
    mean: tuple[float, ...] | None = IMAGENET_MEAN
    std: tuple[float, ...] | None = IMAGENET_STD
    crop_padding: int = 32
    interpolation: str = "bicubic"
    stored_in_weights: bool = True

    def __post_init__(self) -> None:
        _require_choice("interpolation", self.interpolation, INTERPOLATIONS)
        if (self.mean is None) != (self.std is None):
            raise ValueError(
                "`mean` and `std` are given together or not at all. "
                f"Received: mean={self.mean}, std={self.std}"
            )
        if self.mean is not None and (len(self.mean) != 3 or len(self.std) != 3):
            raise ValueError(
                f"`mean` and `std` hold one value per RGB channel. "
                f"Received: mean={self.mean}, std={self.std}"
            )
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"`std` must be positive. Received: std={self.std}")
        if self.crop_padding < 0:
            raise ValueError(f"`crop_padding` must be >= 0. Received: {self.crop_padding}")


ADVPROP = PreprocessingSpec(scale=1 / 127.5, offset=-1.0, mean=None, std=None)
"""Inception's transform, x / 127.5 - 1, which the weights trained with AdvProp need (V1 code)."""


@dataclass(frozen=True)
class Published:
    """What the authors report of a variant, for ImageNet.

    Args:
        top1: Top-1 accuracy in percent on the validation set, or None.
        parameters: In millions.
        multiply_adds: In billions, at the variant's own resolution (the papers' "FLOPs"), or None.
        source: Where the figures stand.
    """

    top1: float | None
    parameters: float
    multiply_adds: float | None
    source: str


@dataclass(frozen=True)
class ModelSpec:
    """One variant of the family.

    Args:
        name: Name of the built model, as in keras.applications, e.g. `"efficientnetb0"`.
        constructor: Name of its public constructor, e.g. `"EfficientNetB0"`.
        stages: Base network, before scaling.
        width: Width coefficient: factor of all channel counts (beta^phi).
        depth: Depth coefficient: factor of all repeats (alpha^phi).
        resolution: Default side of the square input in pixels (224 * gamma^phi).
        dropout_rate: Before the classifier, in [0, 1).
        drop_path_rate: Of the last block; grows linearly from 0 at the first one, in [0, 1).
        activation: Keras name of the activation after every convolution but the projections.
        stem_filters: Channels of the stem convolution before scaling.
        stem_strides: Stride of the stem, 2; 1 for variants of small images.
        top_filters: Channels of the last 1x1 convolution before scaling.
        depth_divisor: Channel counts are rounded to multiples of it.
        rounding: `"keep_90_percent"` (V1: never fall below 90 % of the scaled width) or
            `"nearest"` (V2).
        padding: How stride-2 convolutions are padded: `"explicit"` (a `ZeroPadding2D` layer and a
            valid convolution, as keras.applications builds V1) or `"same"` (V2), equal in
            effect wherever the input side is known: on an even side TensorFlow pads one pixel
            less at the top and left. `"torch"` pads all sides alike, as PyTorch does
            (`padding=kernel_size // 2`), by a layer of the same name as `"explicit"`'s: weights
            that were trained in PyTorch need it.
        bn_momentum: Of every batch norm, the share of the old value.
        bn_epsilon: Of every batch norm.
        preprocessing: The input transform.
        depthwise_name: Suffix of the depthwise layers' names: `"dwconv"` (V1), `"dwconv2"` (V2).
        se_activation: Keras name of the activation between the two squeeze-and-excite layers, or
            None for `activation`, which is EfficientNet's choice. `"relu"` is that of the
            squeeze-and-excitation paper (arXiv:1709.01507, section 3.2).
        se_gate: Keras name of the gate of squeeze-and-excite, `"sigmoid"` in both papers.
        fixed_ends: Whether the widths of the stem and of the last convolution, and the depths of
            the first and last stage, are left as they are when the network is scaled (Lite).
        published: The authors' figures, or None.
    """

    name: str
    constructor: str
    stages: tuple[StageSpec, ...]
    width: float
    depth: float
    resolution: int
    dropout_rate: float
    drop_path_rate: float
    activation: str
    stem_filters: int
    top_filters: int
    rounding: str
    padding: str
    bn_momentum: float
    preprocessing: PreprocessingSpec
    depthwise_name: str
    stem_strides: int = 2
    depth_divisor: int = 8
    bn_epsilon: float = 1e-3
    se_activation: str | None = None
    se_gate: str = "sigmoid"
    fixed_ends: bool = False
    published: Published | None = None

    def __post_init__(self) -> None:
        _require_choice("rounding", self.rounding, ROUNDINGS)
        _require_choice("padding", self.padding, PADDINGS)
        _require_positive(
            self,
            "width",
            "depth",
            "resolution",
            "stem_filters",
            "top_filters",
            "depth_divisor",
            "bn_epsilon",
        )
        if not self.stages:
            raise ValueError("`stages` must hold at least one StageSpec. Received: none")
        if self.stem_strides not in (1, 2):
            raise ValueError(f"`stem_strides` must be 1 or 2. Received: {self.stem_strides}")
        for field in ("dropout_rate", "drop_path_rate"):
            check_rate(field, getattr(self, field))

    def with_se_ratio(self, se_ratio: float) -> ModelSpec:
        """This variant with another squeeze-and-excite ratio in every stage that has one.

        Args:
            se_ratio: In [0, 1]; 0 removes squeeze-and-excite from the whole network. Stages
                without it (V2's fused ones) stay without.

        Returns:
            A new spec without published figures, which no longer apply.
        """
        check_se_ratio(se_ratio)
        stages = tuple(
            replace(stage, se_ratio=se_ratio) if stage.se_ratio else stage for stage in self.stages
        )
        return self if stages == self.stages else replace(self, stages=stages, published=None)

    def to_dict(self) -> dict[str, Any]:
        """The spec as plain values for JSON, without the published figures."""
        values = asdict(self)
        del values["published"]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelSpec:
        """The spec that `to_dict` gave.

        Raises:
            ValueError: If a field is missing, unknown or out of its range.
        """
        try:
            preprocessing = dict(values["preprocessing"])
            for field in ("mean", "std"):
                if preprocessing[field] is not None:
                    preprocessing[field] = tuple(preprocessing[field])
            stages = tuple(StageSpec(**stage) for stage in values["stages"])
            changes = {"stages": stages, "preprocessing": PreprocessingSpec(**preprocessing)}
            return cls(**{**values, **changes})
        except (KeyError, TypeError) as error:
            raise ValueError(f"These are no values of a ModelSpec: {error!r}") from None


def check_rate(field: str, value: float) -> None:
    """Raises ValueError unless `value` is a drop rate in [0, 1)."""
    if not 0 <= value < 1:
        raise ValueError(f"`{field}` must be in [0, 1). Received: {field}={value!r}")


def _stages(block_rows: str) -> tuple[StageSpec, ...]:
    """Reads rows `block repeats kernel strides input output expand se`, as the papers print them.

    Rows of one table stand under each other, so that they can be compared with the paper.
    """
    rows = []
    for row in block_rows.strip().splitlines():
        block, *numbers, se_ratio = row.split()
        rows.append(StageSpec(block, *map(int, numbers), float(se_ratio)))
    return tuple(rows)


# V1 paper, Table 1.
B0_STAGES = _stages("""
    mbconv 1 3 1  32  16 1 0.25
    mbconv 2 3 2  16  24 6 0.25
    mbconv 2 5 2  24  40 6 0.25
    mbconv 3 3 2  40  80 6 0.25
    mbconv 3 5 1  80 112 6 0.25
    mbconv 4 5 2 112 192 6 0.25
    mbconv 1 3 1 192 320 6 0.25
""")

# V2 code, v2_base_block.
V2_BASE_STAGES = _stages("""
    fused_mbconv 1 3 1  32  16 1 0
    fused_mbconv 2 3 2  16  32 4 0
    fused_mbconv 2 3 2  32  48 4 0
    mbconv       3 3 2  48  96 4 0.25
    mbconv       5 3 1  96 112 6 0.25
    mbconv       8 3 2 112 192 6 0.25
""")

# V2 paper, Table 4; V2 code, v2_s_block.
V2_S_STAGES = _stages("""
    fused_mbconv  2 3 1  24  24 1 0
    fused_mbconv  4 3 2  24  48 4 0
    fused_mbconv  4 3 2  48  64 4 0
    mbconv        6 3 2  64 128 4 0.25
    mbconv        9 3 1 128 160 6 0.25
    mbconv       15 3 2 160 256 6 0.25
""")

# V2 code, v2_m_block.
V2_M_STAGES = _stages("""
    fused_mbconv  3 3 1  24  24 1 0
    fused_mbconv  5 3 2  24  48 4 0
    fused_mbconv  5 3 2  48  80 4 0
    mbconv        7 3 2  80 160 4 0.25
    mbconv       14 3 1 160 176 6 0.25
    mbconv       18 3 2 176 304 6 0.25
    mbconv        5 3 1 304 512 6 0.25
""")

# V2 code, v2_l_block.
V2_L_STAGES = _stages("""
    fused_mbconv  4 3 1  32  32 1 0
    fused_mbconv  7 3 2  32  64 4 0
    fused_mbconv  7 3 2  64  96 4 0
    mbconv       10 3 2  96 192 4 0.25
    mbconv       19 3 1 192 224 6 0.25
    mbconv       25 3 2 224 384 6 0.25
    mbconv        7 3 1 384 640 6 0.25
""")

# V2 code, v2_xl_block.
V2_XL_STAGES = _stages("""
    fused_mbconv  4 3 1  32  32 1 0
    fused_mbconv  8 3 2  32  64 4 0
    fused_mbconv  8 3 2  64  96 4 0
    mbconv       16 3 2  96 192 4 0.25
    mbconv       24 3 1 192 256 6 0.25
    mbconv       32 3 2 256 512 6 0.25
    mbconv        8 3 1 512 640 6 0.25
""")

# Lite code: B0 without squeeze-and-excite.
LITE_STAGES = tuple(replace(stage, se_ratio=0.0) for stage in B0_STAGES)


def _edgetpu_stages() -> tuple[StageSpec, ...]:
    """EdgeTPU code.

    Its fused blocks have their stride on the 1x1 projection, whose samples lie at even positions.
    The same 3x3 convolution with the stride on itself and symmetric padding computes exactly those
    samples and none that are thrown away, with a quarter less multiply-adds in all
    (tensorflow/tpu issue 660). No block of the first stage has a skip, and its inner width counts
    from 24 channels though 32 enter.
    """
    stages = _stages("""
        fused_mbconv 1 3 1  24  24 4 0
        fused_mbconv 2 3 2  24  32 8 0
        fused_mbconv 4 3 2  32  48 8 0
        mbconv       5 5 2  48  96 8 0
        mbconv       4 5 1  96 144 8 0
        mbconv       2 5 2 144 192 8 0
    """)
    return (
        replace(stages[0], skip=False),
        *(replace(stage, padding="torch") for stage in stages[1:3]),
        *stages[3:],
    )


EDGETPU_STAGES = _edgetpu_stages()

_B0 = ModelSpec(
    name="efficientnetb0",
    constructor="EfficientNetB0",
    stages=B0_STAGES,
    width=1.0,
    depth=1.0,
    resolution=224,
    dropout_rate=0.2,
    drop_path_rate=0.2,
    activation="swish",
    stem_filters=32,
    top_filters=1280,
    rounding="keep_90_percent",
    padding="explicit",
    bn_momentum=0.99,
    preprocessing=PreprocessingSpec(),
    depthwise_name="dwconv",
)

_V2_B0 = replace(
    _B0,
    name="efficientnetv2-b0",
    constructor="EfficientNetV2B0",
    stages=V2_BASE_STAGES,
    rounding="nearest",
    padding="same",
    bn_momentum=0.9,
    preprocessing=PreprocessingSpec(stored_in_weights=False),
    depthwise_name="dwconv2",
)

# V2 code: S and up read pixels in [-1, 1] and are evaluated on the whole short side.
_V2_S = replace(
    _V2_B0,
    name="efficientnetv2-s",
    constructor="EfficientNetV2S",
    stages=V2_S_STAGES,
    resolution=384,
    stem_filters=24,
    preprocessing=PreprocessingSpec(
        scale=1 / 128, offset=-1.0, mean=None, std=None, crop_padding=0, stored_in_weights=False
    ),
)

# Lite code and EdgeTPU code: pixels become (x - 127) / 128, and 1 / 128 is exact.
_CENTERED = PreprocessingSpec(scale=1 / 128, offset=-127 / 128, mean=None, std=None)

_LITE0 = replace(
    _B0, stages=LITE_STAGES, activation="relu6", fixed_ends=True, preprocessing=_CENTERED
)
_EDGETPU_S = replace(_B0, stages=EDGETPU_STAGES, activation="relu", preprocessing=_CENTERED)

_V1_TABLE_2 = "arXiv:1905.11946, Table 2"
_ADVPROP = "AdvProp, arXiv:1911.09665, Table 3"
_NOISY_STUDENT = "Noisy Student, arXiv:1911.04252, Table 2"
_V2_TABLE_7 = "arXiv:2104.00298, Table 7"
_V2_README = "google/automl, efficientnetv2/README.md"
_LITE_README = "tensorflow/tpu, efficientnet/lite/README.md"
_EDGETPU_README = "tensorflow/tpu, efficientnet/edgetpu/README.md"


def _v1(suffix, width, depth, resolution, dropout_rate, published):
    return replace(
        _B0,
        name=f"efficientnet{suffix.lower()}",
        constructor=f"EfficientNet{suffix}",
        width=width,
        depth=depth,
        resolution=resolution,
        dropout_rate=dropout_rate,
        published=published,
    )


def _mobile(base, family, suffix, width, depth, resolution, dropout_rate, published):
    return replace(
        base,
        name=f"efficientnet-{family}{suffix}".lower(),
        constructor=f"EfficientNet{family.rstrip('-')}{suffix}",
        width=width,
        depth=depth,
        resolution=resolution,
        dropout_rate=dropout_rate,
        published=published,
    )


def _v2(base, suffix, width, depth, resolution, dropout_rate, published, **changes):
    return replace(
        base,
        name=f"efficientnetv2-{suffix.lower()}",
        constructor=f"EfficientNetV2{suffix}",
        width=width,
        depth=depth,
        resolution=resolution,
        dropout_rate=dropout_rate,
        published=published,
        **changes,
    )


_TABLE = (
    # V1 code: width, depth, resolution, dropout.
    _v1("B0", 1.0, 1.0, 224, 0.2, Published(77.1, 5.3, 0.39, _V1_TABLE_2)),
    _v1("B1", 1.0, 1.1, 240, 0.2, Published(79.1, 7.8, 0.70, _V1_TABLE_2)),
    _v1("B2", 1.1, 1.2, 260, 0.3, Published(80.1, 9.2, 1.0, _V1_TABLE_2)),
    _v1("B3", 1.2, 1.4, 300, 0.3, Published(81.6, 12.0, 1.8, _V1_TABLE_2)),
    _v1("B4", 1.4, 1.8, 380, 0.4, Published(82.9, 19.0, 4.2, _V1_TABLE_2)),
    _v1("B5", 1.6, 2.2, 456, 0.4, Published(83.6, 30.0, 9.9, _V1_TABLE_2)),
    _v1("B6", 1.8, 2.6, 528, 0.5, Published(84.0, 43.0, 19.0, _V1_TABLE_2)),
    _v1("B7", 2.0, 3.1, 600, 0.5, Published(84.3, 66.0, 37.0, _V1_TABLE_2)),
    _v1("B8", 2.2, 3.6, 672, 0.5, Published(85.5, 88.0, None, _ADVPROP)),
    _v1("L2", 4.3, 5.3, 800, 0.5, Published(88.4, 480.0, None, _NOISY_STUDENT)),
    # V2 code. Resolutions are those of the evaluation.
    _v2(_V2_B0, "B0", 1.0, 1.0, 224, 0.2, Published(78.7, 7.1, 0.72, _V2_README)),
    _v2(_V2_B0, "B1", 1.0, 1.1, 240, 0.2, Published(79.8, 8.1, 1.2, _V2_README)),
    _v2(_V2_B0, "B2", 1.1, 1.2, 260, 0.3, Published(80.5, 10.1, 1.7, _V2_README)),
    _v2(_V2_B0, "B3", 1.2, 1.4, 300, 0.3, Published(82.1, 14.4, 3.0, _V2_README)),
    _v2(_V2_S, "S", 1.0, 1.0, 384, 0.2, Published(83.9, 22.0, 8.8, _V2_TABLE_7)),
    _v2(
        _V2_S, "M", 1.0, 1.0, 480, 0.3, Published(85.1, 54.0, 24.0, _V2_TABLE_7), stages=V2_M_STAGES
    ),
    _v2(
        _V2_S,
        "L",
        1.0,
        1.0,
        480,
        0.4,
        Published(85.7, 120.0, 53.0, _V2_TABLE_7),
        stages=V2_L_STAGES,
        stem_filters=32,
    ),
    _v2(
        _V2_S,
        "XL",
        1.0,
        1.0,
        512,
        0.4,
        Published(87.3, 208.0, 94.0, _V2_TABLE_7 + " (pretrained on ImageNet-21k)"),
        stages=V2_XL_STAGES,
        stem_filters=32,
    ),
    # Lite code: width, depth, resolution, dropout.
    _mobile(_LITE0, "Lite", "0", 1.0, 1.0, 224, 0.2, Published(75.1, 4.7, 0.407, _LITE_README)),
    _mobile(_LITE0, "Lite", "1", 1.0, 1.1, 240, 0.2, Published(76.7, 5.4, 0.631, _LITE_README)),
    _mobile(_LITE0, "Lite", "2", 1.1, 1.2, 260, 0.3, Published(77.6, 6.1, 0.899, _LITE_README)),
    _mobile(_LITE0, "Lite", "3", 1.2, 1.4, 280, 0.3, Published(79.8, 8.2, 1.44, _LITE_README)),
    _mobile(_LITE0, "Lite", "4", 1.4, 1.8, 300, 0.3, Published(81.5, 13.0, 2.64, _LITE_README)),
    # EdgeTPU code. Parameters and multiply-adds: timm's model cards of the same networks.
    _mobile(
        _EDGETPU_S, "EdgeTPU-", "S", 1.0, 1.0, 224, 0.2, Published(77.2, 5.4, 1.8, _EDGETPU_README)
    ),
    _mobile(
        _EDGETPU_S, "EdgeTPU-", "M", 1.0, 1.1, 240, 0.2, Published(78.7, 6.9, 3.0, _EDGETPU_README)
    ),
    _mobile(
        _EDGETPU_S, "EdgeTPU-", "L", 1.2, 1.4, 300, 0.3, Published(80.6, 10.6, 8.0, _EDGETPU_README)
    ),
    # Ours: B0's stages, narrow and shallow, for images of 32 x 32 (digits, CIFAR, tests). The
    # stem keeps the resolution, as is usual for such images.
    replace(
        _B0,
        name="efficientnet-tiny",
        constructor="EfficientNetTiny",
        width=0.375,
        depth=0.5,
        resolution=32,
        stem_strides=1,
        dropout_rate=0.1,
        drop_path_rate=0.0,
        # A moving average over 100 steps would not settle in the few epochs of a small data set.
        bn_momentum=0.9,
        preprocessing=PreprocessingSpec(crop_padding=0),
    ),
)

SPECS: dict[str, ModelSpec] = {spec.constructor: spec for spec in _TABLE}
"""Every variant by the name of its constructor, in the order of the papers."""


def list_models(pattern: str = "*") -> list[str]:
    """Names of the variants, in the order of the table.

    Args:
        pattern: Shell-style pattern (`*`, `?`, `[…]`), matched regardless of case.

    Returns:
        Constructor names, e.g. `["EfficientNetV2S", "EfficientNetV2M"]`; empty if none match.
    """
    return [name for name in SPECS if fnmatchcase(name.lower(), pattern.lower())]


def get_spec(name: str) -> ModelSpec:
    """The spec of a variant.

    Args:
        name: A constructor name (`"EfficientNetB0"`) or a model name (`"efficientnetv2-b0"`),
            regardless of case, hyphens and underscores.

    Returns:
        The row of the table.

    Raises:
        ValueError: If there is no such variant; the message names the closest ones.
    """
    if not isinstance(name, str):
        raise ValueError(f"A model name is a string. Received: {name!r} ({type(name).__name__})")

    def normalize(text: str) -> str:
        return text.lower().replace("-", "").replace("_", "")

    by_name = {normalize(constructor): constructor for constructor in SPECS}
    found = by_name.get(normalize(name))
    if found is None:
        close = difflib.get_close_matches(normalize(name), by_name, n=3, cutoff=0.5)
        hint = ", ".join(by_name[match] for match in close) or "none is similar"
        raise ValueError(
            f"Unknown model {name!r}. Closest: {hint}. "
            f"All models: {', '.join(SPECS)} (see `keras_effnet.list_models()`)."
        )
    return SPECS[found]
