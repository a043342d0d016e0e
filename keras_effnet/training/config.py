"""What a training run is told, as data that validate themselves."""

from __future__ import annotations

import dataclasses
import math

from keras_effnet.quantization.checks import check_values

MIXED_PRECISION = ("float16", "bfloat16")
CLASS_WEIGHTS = ("none", "balanced")
BEST_BY = ("accuracy", "cross_entropy")
# Magnitudes of RandAugment, as in its paper.
LARGEST_MAGNITUDE = 10


@dataclasses.dataclass(frozen=True)
class AugmentationConfig:
    """How training images are varied.

    Args:
        min_area: Smallest share of the photograph that a random crop keeps, in (0, 1]; 1 crops
            as in evaluation (Szegedy et al., 2015, section 6, https://arxiv.org/abs/1409.4842).
        flip: Whether every other image is mirrored.
        rand_augment: Random operations on each image, at least 0; 2 is usual (Cubuk et al., 2019,
            https://arxiv.org/abs/1909.13719).
        magnitude: Their strength, in 0..10.
        mixup: Alpha of MixUp's beta distribution, at least 0; 0 for none, 0.2 is usual (Zhang et
            al., 2017, https://arxiv.org/abs/1710.09412).
        cutmix: The same of CutMix, 1 is usual (Yun et al., 2019,
            https://arxiv.org/abs/1905.04899). With both, each batch is given one of them.

    Raises:
        ValueError: If a value is not allowed.
    """

    min_area: float = 0.35
    flip: bool = True
    rand_augment: int = 0
    magnitude: float = 9.0
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        check_values(
            self,
            min_area=(0 < self.min_area <= 1, "above 0 and at most 1"),
            rand_augment=(self.rand_augment >= 0, "at least 0"),
            magnitude=(0 <= self.magnitude <= LARGEST_MAGNITUDE, "in 0..10"),
            mixup=(0 <= self.mixup < math.inf, "at least 0"),
            cutmix=(0 <= self.cutmix < math.inf, "at least 0"),
        )


@dataclasses.dataclass(frozen=True)
class Phase:
    """A part of a training with one schedule: a warm-up, then a cosine down to zero.

    Args:
        name: What is shown of it, and the name under which it is logged.
        epochs: Passes over the training images, at least 1.
        learning_rate: The largest one, positive.
        frozen: What is not trained: "all" but the classifier, the number of the last stage that
            is frozen (0: the stem alone), or None for nothing.
        freeze_batch_norms: Whether batch norms keep their statistics, scales and offsets.

    Raises:
        ValueError: If a value is not allowed.
    """

    name: str
    epochs: int
    learning_rate: float
    frozen: int | str | None = None
    freeze_batch_norms: bool = False

    def __post_init__(self) -> None:
        right = self.frozen is None or self.frozen == "all" or isinstance(self.frozen, int)
        check_values(
            self,
            epochs=(self.epochs >= 1, "at least 1"),
            learning_rate=(0 < self.learning_rate < math.inf, "positive"),
            frozen=(right, "'all', the number of a stage, or None"),
        )


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """How a model is trained.

    Args:
        phases: One after the other; each begins with a new optimizer.
        batch_size: Images of one step, over all devices together, at least 1.
        warm_up: Share of a phase's steps in which the learning rate rises from 0, in [0, 1).
        weight_decay: Of AdamW, on kernels alone (Loshchilov and Hutter, 2017,
            https://arxiv.org/abs/1711.05101), at least 0.
        label_smoothing: Share of the target given to all classes alike, in [0, 1) (Szegedy et
            al., 2016, section 7, https://arxiv.org/abs/1512.00567).
        teacher_weight: Share of the loss that the divergence from a teacher takes, in [0, 1]; the
            cross-entropy with the labels keeps the rest (Hinton et al., 2015, section 2,
            https://arxiv.org/abs/1503.02531).
        teacher_temperature: Divides the logits of both in that divergence, positive.
        ema: Momentum of a moving average of the weights, in [0, 1); 0 for none. With it, the
            average is what is evaluated and saved.
        best_by: What tells the best state: "accuracy" on the validation images, of equal ones the
            lower cross-entropy; or "cross_entropy" alone, which tells more where the accuracy
            hardly moves. With a teacher it is the loss, without label smoothing.
        class_weights: "balanced" weighs each image by how rare its class is; or "none".
        augmentation: Of the training images.
        mixed_precision: "float16" or "bfloat16" for the arithmetic, or None for float32.
        checkpoint_steps: A checkpoint is written after so many steps, beside those at the end of
            every epoch; at least 1.
        seed: Of everything random: the order of the images, augmentation, dropout, the head.
        strict: Whether an image that cannot be read ends the training.

    Raises:
        ValueError: If a value is not allowed.
    """

    phases: tuple[Phase, ...]
    batch_size: int = 32
    warm_up: float = 0.1
    weight_decay: float = 1e-5
    label_smoothing: float = 0.1
    teacher_weight: float = 0.0
    teacher_temperature: float = 1.0
    ema: float = 0.0
    best_by: str = "accuracy"
    class_weights: str = "none"
    augmentation: AugmentationConfig = AugmentationConfig()
    mixed_precision: str | None = None
    checkpoint_steps: int = 500
    seed: int = 0
    strict: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "phases", tuple(self.phases))
        names = [phase.name for phase in self.phases]
        check_values(
            self,
            phases=(
                bool(names) and len(set(names)) == len(names),
                "one or more phases, each with a name of its own",
            ),
            batch_size=(self.batch_size >= 1, "at least 1"),
            warm_up=(0 <= self.warm_up < 1, "at least 0 and below 1"),
            weight_decay=(0 <= self.weight_decay < math.inf, "at least 0"),
            label_smoothing=(0 <= self.label_smoothing < 1, "at least 0 and below 1"),
            teacher_weight=(0 <= self.teacher_weight <= 1, "in 0..1"),
            teacher_temperature=(0 < self.teacher_temperature < math.inf, "positive"),
            ema=(0 <= self.ema < 1, "at least 0 and below 1"),
            best_by=(self.best_by in BEST_BY, f"one of {BEST_BY}"),
            class_weights=(self.class_weights in CLASS_WEIGHTS, f"one of {CLASS_WEIGHTS}"),
            mixed_precision=(
                self.mixed_precision in (None, *MIXED_PRECISION),
                f"None or one of {MIXED_PRECISION}",
            ),
            checkpoint_steps=(self.checkpoint_steps >= 1, "at least 1"),
            seed=(self.seed >= 0, "at least 0"),
        )
