"""Compound scaling: from a base network and three coefficients to concrete layer sizes.

EfficientNet scales depth by alpha^phi, width by beta^phi and resolution by gamma^phi under
alpha * beta^2 * gamma^2 ~ 2, so that the multiply-adds grow by about 2^phi (Tan and Le 2019,
arXiv:1905.11946, section 3.3). Scaling one axis alone saturates sooner (section 3.2, figure 3); it
is the special case in which the two other coefficients are 1.

Everything here is a pure function of `specs`: no model is built. `resolve` gives the plan that
the builders follow, and the plan knows its parameters, multiply-adds and int8 bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from .specs import ModelSpec, StageSpec, get_spec


@dataclass(frozen=True)
class CompoundScaling:
    """The three coefficients of compound scaling.

    The defaults are those that the authors found by a grid search on B0 (arXiv:1905.11946,
    section 4, step 1).

    Args:
        alpha: Growth of the depth per unit of phi, at least 1.
        beta: Growth of the width per unit of phi, at least 1.
        gamma: Growth of the resolution per unit of phi, at least 1.
    """

    alpha: float = 1.2
    beta: float = 1.1
    gamma: float = 1.15

    def __post_init__(self) -> None:
        for name in ("alpha", "beta", "gamma"):
            value = getattr(self, name)
            if not value >= 1:
                raise ValueError(
                    f"`{name}` is a growth factor and must be at least 1 (1 leaves its axis "
                    f"alone); shrink a network with a negative phi. Received: {name}={value!r}"
                )

    @property
    def cost(self) -> float:
        """alpha * beta^2 * gamma^2: the growth of the multiply-adds per unit of phi."""
        return self.alpha * self.beta**2 * self.gamma**2

    def coefficients(self, phi: float) -> tuple[float, float, float]:
        """Depth, width and resolution factors `(alpha^phi, beta^phi, gamma^phi)`."""
        return self.alpha**phi, self.beta**phi, self.gamma**phi

    def scale(self, base: ModelSpec, phi: float) -> ModelSpec:
        """Scales a variant.

        The resolution is rounded to a multiple of 8 (at least 32); the dropout rate grows by
        0.05 per unit of phi up to 0.5, which is how it grows from B0 to B7 (section 4).

        Args:
            base: The variant at phi = 0, e.g. B0.
            phi: Any real number: positive grows the network, negative shrinks it.

        Returns:
            A new spec named after the base and phi, without published figures.
        """
        if phi == 0:
            return base
        depth, width, resolution = self.coefficients(phi)
        return replace(
            base,
            name=f"{base.name}-phi{phi:g}",
            depth=base.depth * depth,
            width=base.width * width,
            resolution=max(32, round(base.resolution * resolution / 8) * 8),
            dropout_rate=min(max(base.dropout_rate + 0.05 * phi, 0.0), 0.5),
            published=None,
        )

    def phi_of(self, spec: ModelSpec, base: ModelSpec) -> dict[str, float | None]:
        """The phi to which each axis of a variant corresponds.

        The official coefficients are rounded by hand: B3, for example, has the depth of phi 1.8,
        the width of 1.9 and the resolution of 2.1, and is the paper's phi 2.

        Args:
            spec: A scaled variant, e.g. B3.
            base: What it is a scaling of, e.g. B0.

        Returns:
            `{"depth": …, "width": …, "resolution": …}`; None where the coefficient is 1 and so
            says nothing.
        """
        axes = {
            "depth": (spec.depth / base.depth, self.alpha),
            "width": (spec.width / base.width, self.beta),
            "resolution": (spec.resolution / base.resolution, self.gamma),
        }
        return {
            axis: None if growth == 1 else math.log(factor) / math.log(growth)
            for axis, (factor, growth) in axes.items()
        }


COMPOUND = CompoundScaling()
"""The paper's coefficients (1.2, 1.1, 1.15)."""

# One axis alone, at the same growth of the multiply-adds: alpha * beta^2 * gamma^2 = 2.
DEPTH_ONLY = CompoundScaling(alpha=2.0, beta=1.0, gamma=1.0)
WIDTH_ONLY = CompoundScaling(alpha=1.0, beta=math.sqrt(2), gamma=1.0)
RESOLUTION_ONLY = CompoundScaling(alpha=1.0, beta=1.0, gamma=math.sqrt(2))


def round_filters(filters: float, divisor: int, rounding: str) -> int:
    """Rounds a scaled channel count to a multiple of `divisor`.

    Args:
        filters: Channels after multiplication by the width coefficient.
        divisor: 8 in all families, for the sake of vector units.
        rounding: `"keep_90_percent"` (V1) goes up where rounding to the nearest would lose more
            than 10 %; `"nearest"` (V2) does not.

    Returns:
        A positive multiple of `divisor`.
    """
    rounded = max(divisor, int(filters + divisor / 2) // divisor * divisor)
    if rounding == "keep_90_percent" and rounded < 0.9 * filters:
        rounded += divisor
    return rounded


def round_repeats(repeats: int, depth: float) -> int:
    """Blocks of a stage after scaling: `ceil(depth * repeats)`.

    A relative 1e-9 is forgiven, so that a depth computed as a power does not gain a block from
    floating point (1.1 * 10 is 11.000000000000002).
    """
    return math.ceil(depth * repeats * (1 - 1e-9))


@dataclass(frozen=True)
class ConvPlan:
    """One convolution, or the classifier, as far as counting needs it.

    Args:
        name: Layer name.
        kernel_size: Side of the kernel.
        input_filters: Channels in.
        output_filters: Channels out.
        output_pixels: Height times width of the output.
        depthwise: Whether every channel has its own kernel.
        batch_norm: Whether a batch norm follows; if not, the layer has a bias.
    """

    name: str
    kernel_size: int
    input_filters: int
    output_filters: int
    output_pixels: int
    depthwise: bool = False
    batch_norm: bool = True

    @property
    def kernel_parameters(self) -> int:
        fan_in = 1 if self.depthwise else self.input_filters
        return self.kernel_size**2 * fan_in * self.output_filters

    @property
    def multiply_adds(self) -> int:
        return self.kernel_parameters * self.output_pixels


@dataclass(frozen=True)
class BlockPlan:
    """One block with concrete sizes.

    Args:
        name: Prefix of its layers' names, e.g. `"block2a_"`.
        block: `"mbconv"` or `"fused_mbconv"`.
        stage: Number of its stage, from 1.
        kernel_size: Side of the depthwise or fused kernel.
        strides: 1 or 2.
        input_filters: Channels in.
        expanded_filters: Channels inside.
        output_filters: Channels out.
        se_filters: Width of the squeeze-and-excite bottleneck; 0 for none.
        drop_path_rate: Probability of skipping the block in training.
        input_size: Height and width in.
        output_size: Height and width out.
        expands: Whether a convolution widens the input first.
        has_skip: Whether the input is added to the output: only where their shapes agree.
        depthwise_name: Suffix of the depthwise layer's name.
    """

    name: str
    block: str
    stage: int
    kernel_size: int
    strides: int
    input_filters: int
    expanded_filters: int
    output_filters: int
    se_filters: int
    drop_path_rate: float
    input_size: tuple[int, int]
    output_size: tuple[int, int]
    expands: bool
    has_skip: bool
    depthwise_name: str

    @property
    def convolutions(self) -> tuple[ConvPlan, ...]:
        """Every convolution of the block, in the order of the graph."""
        pixels_in, pixels_out = math.prod(self.input_size), math.prod(self.output_size)
        inner, kernel = self.expanded_filters, self.kernel_size
        convs = []
        if self.block == "mbconv":
            if self.expands:
                expand = ConvPlan(
                    f"{self.name}expand_conv", 1, self.input_filters, inner, pixels_in
                )
                convs.append(expand)
            depthwise = f"{self.name}{self.depthwise_name}"
            convs.append(ConvPlan(depthwise, kernel, inner, inner, pixels_out, depthwise=True))
            project_kernel = 1
        elif self.expands:
            expand = f"{self.name}expand_conv"
            convs.append(ConvPlan(expand, kernel, self.input_filters, inner, pixels_out))
            project_kernel = 1
        else:  # A fused block that expands nothing is one convolution.
            project_kernel = kernel
        if self.se_filters:
            reduce, expand = f"{self.name}se_reduce", f"{self.name}se_expand"
            convs.append(ConvPlan(reduce, 1, inner, self.se_filters, 1, batch_norm=False))
            convs.append(ConvPlan(expand, 1, self.se_filters, inner, 1, batch_norm=False))
        project = f"{self.name}project_conv"
        convs.append(ConvPlan(project, project_kernel, inner, self.output_filters, pixels_out))
        return tuple(convs)


@dataclass(frozen=True)
class ModelPlan:
    """A variant with every size resolved: what the builder builds and what the counts count.

    Args:
        spec: The variant.
        input_size: Height and width of the input in pixels.
        channels: Channels of the input.
        stem: The stem convolution.
        blocks: All blocks in order.
        top: The last 1x1 convolution.
        classes: Outputs of the classifier; None without one.
        include_preprocessing: Whether the normalization is part of the model.
    """

    spec: ModelSpec
    input_size: tuple[int, int]
    channels: int
    stem: ConvPlan
    blocks: tuple[BlockPlan, ...]
    top: ConvPlan
    classes: int | None
    include_preprocessing: bool

    @property
    def convolutions(self) -> tuple[ConvPlan, ...]:
        """Every convolution and the classifier, in the order of the graph."""
        inner = [conv for block in self.blocks for conv in block.convolutions]
        convs = [self.stem, *inner, self.top]
        if self.classes is not None:
            top = self.top.output_filters
            convs.append(ConvPlan("predictions", 1, top, self.classes, 1, batch_norm=False))
        return tuple(convs)

    @property
    def parameters(self) -> int:
        """All parameters, those that training does not change included."""
        # Moving mean and variance of every batch norm.
        moving = sum(2 * conv.output_filters for conv in self.convolutions if conv.batch_norm)
        # Mean and variance per channel, and the count, of a Normalization layer with weights.
        pre = self.spec.preprocessing
        stored = self.include_preprocessing and pre.stored_in_weights and pre.mean is not None
        return self.trainable_parameters + moving + (2 * self.channels + 1 if stored else 0)

    @property
    def trainable_parameters(self) -> int:
        """Kernels, biases, and the scales and offsets of the batch norms."""
        return sum(
            conv.kernel_parameters + conv.output_filters * (2 if conv.batch_norm else 1)
            for conv in self.convolutions
        )

    @property
    def multiply_adds(self) -> int:
        """Of the convolutions and the classifier for one image: what the papers call FLOPs."""
        return sum(conv.multiply_adds for conv in self.convolutions)

    @property
    def int8_bytes(self) -> int:
        """Bytes of the parameters in full-integer form.

        Batch norms are folded away; a kernel value takes one byte, and every convolution has an
        int32 bias (TFLite 8-bit quantization specification).
        """
        return sum(conv.kernel_parameters + 4 * conv.output_filters for conv in self.convolutions)


def resolve(
    spec: ModelSpec | str,
    *,
    input_size: int | tuple[int, int] | None = None,
    channels: int = 3,
    classes: int | None = 1000,
    include_preprocessing: bool = True,
) -> ModelPlan:
    """Turns a variant into concrete layer sizes.

    Args:
        spec: A variant or its name.
        input_size: Side of the square input, or (height, width), in pixels; the variant's
            resolution by default. Only multiply-adds and feature sizes depend on it.
        channels: Channels of the input.
        classes: Outputs of the classifier; None for a network without one.
        include_preprocessing: Whether the normalization belongs to the model.

    Returns:
        The plan.

    Raises:
        ValueError: For an unknown name, or sizes that are not positive.
    """
    spec = get_spec(spec) if isinstance(spec, str) else spec
    size = spec.resolution if input_size is None else input_size
    size = (size, size) if isinstance(size, int) else tuple(size)
    for name, value in (
        ("input_size", min(size)),
        ("channels", channels),
        ("classes", 1 if classes is None else classes),
    ):
        if value < 1:
            raise ValueError(f"`{name}` must be positive. Received: {name}={value}")

    def filters(base: int, end: bool = False) -> int:
        if end and spec.fixed_ends:
            return base
        return round_filters(base * spec.width, spec.depth_divisor, spec.rounding)

    def strided(size: tuple[int, int], strides: int) -> tuple[int, int]:
        return tuple(math.ceil(side / strides) for side in size)

    feature_size = strided(size, spec.stem_strides)
    stem_filters = filters(spec.stem_filters, end=True)
    stem = ConvPlan("stem_conv", 3, channels, stem_filters, math.prod(feature_size))
    blocks: list[BlockPlan] = []
    repeats = stage_repeats(spec)
    for number, stage in enumerate(spec.stages, start=1):
        for index in range(repeats[number - 1]):
            block = _resolve_block(
                spec,
                stage,
                name=f"block{number}{_letters(index)}_",
                number=number,
                first=index == 0,
                input_filters=blocks[-1].output_filters if blocks else stem.output_filters,
                base_filters=filters(stage.input_filters if index == 0 else stage.output_filters),
                output_filters=filters(stage.output_filters),
                drop_path_rate=spec.drop_path_rate * len(blocks) / sum(repeats),
                input_size=feature_size,
            )
            feature_size = block.output_size
            blocks.append(block)
    top = ConvPlan(
        "top_conv",
        1,
        blocks[-1].output_filters,
        filters(spec.top_filters, end=True),
        math.prod(feature_size),
    )
    return ModelPlan(spec, size, channels, stem, tuple(blocks), top, classes, include_preprocessing)


def stage_repeats(spec: ModelSpec) -> list[int]:
    """Blocks of every stage after scaling."""
    repeats = [round_repeats(stage.repeats, spec.depth) for stage in spec.stages]
    if spec.fixed_ends:
        repeats[0], repeats[-1] = spec.stages[0].repeats, spec.stages[-1].repeats
    return repeats


def _letters(index: int) -> str:
    """Name of the index-th block of a stage: a, b, …, z, then as keras.applications: chr(123) …

    keras.applications names blocks by `chr(97 + index)`, which leaves the alphabet after 26
    blocks (V2-XL has 32 in one stage; nobody else has files of it). Those go on as aa, ab, ….
    """
    letter = chr(ord("a") + index % 26)
    return letter if index < 26 else _letters(index // 26 - 1) + letter


def _resolve_block(
    spec: ModelSpec,
    stage: StageSpec,
    *,
    name: str,
    number: int,
    first: bool,
    input_filters: int,
    base_filters: int,
    output_filters: int,
    drop_path_rate: float,
    input_size: tuple[int, int],
) -> BlockPlan:
    strides = stage.strides if first else 1
    expands = stage.expand_ratio != 1
    # The bottleneck is a fraction of the block's input, not of its expanded width (V1 code).
    se_filters = max(1, int(input_filters * stage.se_ratio)) if stage.se_ratio else 0
    return BlockPlan(
        name=name,
        block=stage.block,
        stage=number,
        kernel_size=stage.kernel_size,
        strides=strides,
        input_filters=input_filters,
        expanded_filters=base_filters * stage.expand_ratio if expands else input_filters,
        output_filters=output_filters,
        se_filters=se_filters,
        drop_path_rate=drop_path_rate,
        input_size=input_size,
        output_size=tuple(math.ceil(side / strides) for side in input_size),
        expands=expands,
        has_skip=stage.skip and strides == 1 and input_filters == output_filters,
        depthwise_name=spec.depthwise_name,
    )


@dataclass(frozen=True)
class Budget:
    """Upper limits of a model; at least one is given.

    Args:
        multiply_adds: Of one image.
        parameters: All parameters.
        int8_bytes: Bytes of the parameters in full-integer form.
    """

    multiply_adds: float | None = None
    parameters: float | None = None
    int8_bytes: float | None = None

    def __post_init__(self) -> None:
        limits = self._limits()
        if not limits or min(limits.values()) <= 0:
            raise ValueError(
                "A budget names at least one positive limit among `multiply_adds`, `parameters` "
                f"and `int8_bytes`. Received: {self}"
            )

    def _limits(self) -> dict[str, float]:
        return {name: limit for name, limit in vars(self).items() if limit is not None}

    def usage(self, plan: ModelPlan) -> dict[str, float]:
        """Share of every limit that a plan uses; above 1 it does not fit."""
        return {name: getattr(plan, name) / limit for name, limit in self._limits().items()}

    def fits(self, plan: ModelPlan) -> bool:
        """Whether a plan keeps every limit."""
        return max(self.usage(plan).values()) <= 1


@dataclass(frozen=True)
class ScaledModel:
    """A result of the search: a scaled variant, its plan, and how it was scaled."""

    spec: ModelSpec
    plan: ModelPlan
    scaling: CompoundScaling
    phi: float


# phi is searched on a grid this fine: rounding makes the network change far less often.
_PHI_STEP = 0.01
# At -32 every axis has reached its smallest size; at 32 a budget that still holds limits nothing
# (compound scaling would be at 10^9 times the base).
_PHI_LIMIT = 32.0


def largest_model(
    base: ModelSpec | str,
    budget: Budget,
    scaling: CompoundScaling = COMPOUND,
    *,
    classes: int = 1000,
) -> ScaledModel:
    """The largest scaling of a variant that fits a budget.

    Every size grows with phi, so the largest phi (to 0.01) that fits is found by bisection.

    Args:
        base: A variant, or its name, at phi = 0.
        budget: The limits.
        scaling: The coefficients.
        classes: Outputs of the classifier, which counts in small models.

    Returns:
        The scaled variant with its plan and phi.

    Raises:
        ValueError: If not even the smallest scaling fits, or the budget never binds (it limits
            nothing that the scaled axes change, as a parameter limit on resolution alone).
    """
    base = get_spec(base) if isinstance(base, str) else base

    def at(step: int) -> ScaledModel:
        phi = round(step * _PHI_STEP, 2)
        spec = scaling.scale(base, phi)
        return ScaledModel(spec, resolve(spec, classes=classes), scaling, phi)

    # Bracket the answer by doubling from 0, so that no plan far beyond the budget is ever made.
    limit = round(_PHI_LIMIT / _PHI_STEP)
    low, high = 0, 1
    while low > -limit and not budget.fits(at(low).plan):
        low, high = max(-limit, 2 * low - 1), low
    while high < limit and low >= 0 and budget.fits(at(high).plan):
        low, high = high, min(limit, 2 * high)
    if not budget.fits(at(low).plan):
        smallest = at(low).plan
        raise ValueError(
            f"No scaling of {base.constructor} by {scaling} fits the budget: already the smallest "
            f"has {smallest.multiply_adds:,} multiply-adds, {smallest.parameters:,} parameters "
            f"and {smallest.int8_bytes:,} int8 bytes. Received: {budget}"
        )
    if high == limit and budget.fits(at(high).plan):
        raise ValueError(
            f"The budget does not limit {scaling}: add a limit that the scaled axes change "
            f"(resolution changes multiply-adds alone). Received: {budget}"
        )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if budget.fits(at(middle).plan) else (low, middle)
    return at(low)


def coefficient_candidates(
    *, cost: float = 2.0, tolerance: float = 0.1, step: float = 0.05
) -> Iterator[CompoundScaling]:
    """The grid of the paper's step 1: all (alpha, beta, gamma) whose cost is near 2.

    Args:
        cost: Wanted alpha * beta^2 * gamma^2.
        tolerance: Largest distance from it.
        step: Of the grid, in each coefficient.

    Yields:
        Coefficients from 1 up in steps of `step`, alpha fastest-growing last.
    """
    if step <= 0 or tolerance < 0 or cost < 1:
        raise ValueError(
            "`step` must be positive, `tolerance` at least 0 and `cost` at least 1. "
            f"Received: step={step}, tolerance={tolerance}, cost={cost}"
        )

    def grid(limit: float) -> list[float]:
        return [round(1 + i * step, 6) for i in range(int((limit - 1) / step + 1e-9) + 1)]

    for alpha in grid(cost + tolerance):
        for beta in grid(math.sqrt(cost + tolerance)):
            for gamma in grid(math.sqrt(cost + tolerance)):
                candidate = CompoundScaling(alpha, beta, gamma)
                if abs(candidate.cost - cost) <= tolerance + 1e-9:
                    yield candidate


def search_scaling(
    base: ModelSpec | str,
    budget: Budget,
    *,
    candidates: Iterator[CompoundScaling] | list[CompoundScaling] | None = None,
    objective: Callable[[ScaledModel], float] | None = None,
    classes: int = 1000,
) -> list[ScaledModel]:
    """Searches alpha, beta and gamma for the best model within a budget.

    Each candidate is grown to the largest model that fits; the models are ranked. Which of two
    equally large models classifies better only training can tell: pass an `objective` that
    trains (the paper's step 1) or predicts accuracy. Without one, models rank by how fully they
    use the budget (geometric mean of the shares of all limits), and among those that do so within
    2 % of each other by how near their coefficients are to the paper's.

    Args:
        base: A variant, or its name, at phi = 0.
        budget: The limits.
        candidates: Coefficients to try; `coefficient_candidates()` by default.
        objective: A score, higher is better.
        classes: Outputs of the classifier.

    Returns:
        Models that fit, best first.

    Raises:
        ValueError: If nothing fits.
    """
    models = []
    for scaling in coefficient_candidates() if candidates is None else candidates:
        try:
            models.append(largest_model(base, budget, scaling, classes=classes))
        except ValueError:
            continue  # This candidate cannot meet or never reaches the budget; others may.
    if not models:
        raise ValueError(f"No candidate has a scaling that fits the budget. Received: {budget}")
    if objective is not None:
        return sorted(models, key=objective, reverse=True)

    def default_rank(model: ScaledModel) -> tuple[int, float]:
        shares = list(budget.usage(model.plan).values())
        usage = math.prod(shares) ** (1 / len(shares))
        distance = math.dist(
            (model.scaling.alpha, model.scaling.beta, model.scaling.gamma),
            (COMPOUND.alpha, COMPOUND.beta, COMPOUND.gamma),
        )
        return -round(usage / 0.02), distance

    return sorted(models, key=default_rank)
