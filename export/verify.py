"""Comparing an exported file with the model it came from, on images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

Predictor = Callable[[np.ndarray], np.ndarray]

# Share of images on which a file must choose the class that the Keras model chooses; below it the
# export warns. Quantization that is done well agrees on 97 to 98 % (measured for V2-B0 by several
# tools), so a file that differs on more than one image in twenty has lost accuracy for nothing.
# Float files differ by rounding alone, which changes the choice only between classes that are all
# but equal.
MIN_AGREEMENT = {"float32": 0.99, "float16": 0.99, "dynamic": 0.95, "int8": 0.95}


@dataclass(frozen=True)
class Scores:
    """How one model did on a set of images, and how near it came to the reference.

    Args:
        name: Of the model or file.
        images: Number of images.
        top1: Share of labelled images whose class is the first choice, or None without labels.
        top5: Share whose class is among the first five, or None without labels or with no more
            than five classes.
        agreement: Share of images on which the first choice is the reference's.
        mean_abs_difference: Of the outputs to the reference's, over all images and classes.
        max_abs_difference: The largest such difference.
        sqnr_db: Ratio of the power of the reference's outputs to that of the differences, in
            decibels; None if there is no difference.
    """

    name: str
    images: int
    top1: float | None
    top5: float | None
    agreement: float
    mean_abs_difference: float
    max_abs_difference: float
    sqnr_db: float | None


@dataclass(frozen=True)
class Thresholds:
    """What a file must reach; None demands nothing.

    Args:
        min_agreement: Share of images, in 0..1, on which the first choice is the reference's.
        min_sqnr: Signal to noise of the outputs, in decibels.
        min_top1: Share of labelled images whose class is the first choice.
        max_top1_loss: By how much that share may fall below the reference's.

    Raises:
        ValueError: If a share is not in 0..1.
    """

    min_agreement: float | None = None
    min_sqnr: float | None = None
    min_top1: float | None = None
    max_top1_loss: float | None = None

    def __post_init__(self) -> None:
        for name in ("min_agreement", "min_top1", "max_top1_loss"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"`{name}` must be a share in 0..1. Received: {value}")

    @property
    def any(self) -> bool:
        """Whether anything is demanded."""
        return any(value is not None for value in vars(self).values())

    @property
    def needs_labels(self) -> bool:
        """Whether the images must have labels."""
        return self.min_top1 is not None or self.max_top1_loss is not None

    def failures(self, scores: Scores, reference: Scores) -> tuple[str, ...]:
        """What a file does not reach, one sentence each.

        Args:
            scores: Of the file.
            reference: Of the model it came from, on the same images.

        Returns:
            The sentences; none if all is reached.

        Raises:
            ValueError: If labels are needed and there were none.
        """
        if self.needs_labels and (scores.top1 is None or reference.top1 is None):
            raise ValueError("Thresholds on top-1 need labelled images.")
        found = []
        if self.min_agreement is not None and scores.agreement < self.min_agreement:
            found.append(f"agreement {scores.agreement:.2%} is below {self.min_agreement:.2%}")
        # Without any difference there is no noise, and no ratio.
        if self.min_sqnr is not None and scores.sqnr_db is not None:
            if scores.sqnr_db < self.min_sqnr:
                found.append(f"SQNR {scores.sqnr_db:.1f} dB is below {self.min_sqnr:g} dB")
        if self.min_top1 is not None and scores.top1 < self.min_top1:
            found.append(f"top-1 {scores.top1:.2%} is below {self.min_top1:.2%}")
        if self.max_top1_loss is not None:
            loss = reference.top1 - scores.top1
            # Shares of the same number of images: their difference is exact but for rounding.
            if loss > self.max_top1_loss + 1e-9:
                found.append(f"top-1 is {loss:.2%} lower, more than {self.max_top1_loss:.2%}")
        return tuple(found)


@dataclass(frozen=True)
class WorstImage:
    """An image on which a file is far from its reference.

    Args:
        index: Place of the image in the set.
        distance: Square root of the summed squares of the differences of the outputs.
        label: Class index, or None.
        expected: Class that the reference chooses.
        expected_score: Its output there.
        found: Class that the file chooses.
        found_score: Its output there.
    """

    index: int
    distance: float
    label: int | None
    expected: int
    expected_score: float
    found: int
    found_score: float


def worst_images(
    outputs: np.ndarray, reference: np.ndarray, labels: np.ndarray | None, number: int
) -> tuple[WorstImage, ...]:
    """The images on which a file is farthest from its reference.

    Args:
        outputs: Of the file, shape `(images, classes)`.
        reference: Of the reference, same shape.
        labels: Class indices, shape `(images,)`, or None.
        number: How many.

    Returns:
        First those with another first choice, then the others, each by distance. Images without
        any difference are left out.
    """
    distance = np.linalg.norm(outputs.astype(np.float64) - reference, axis=1)
    expected, found = reference.argmax(axis=1), outputs.argmax(axis=1)
    order = np.lexsort((-distance, expected == found))[:number]
    return tuple(
        WorstImage(
            index=int(index),
            distance=float(distance[index]),
            label=None if labels is None else int(labels[index]),
            expected=int(expected[index]),
            expected_score=float(reference[index, expected[index]]),
            found=int(found[index]),
            found_score=float(outputs[index, found[index]]),
        )
        for index in order
        if distance[index] > 0
    )


@dataclass(frozen=True, eq=False)
class Outputs:
    """What several models gave for the same images.

    Args:
        arrays: By the name of the model: float32 of shape `(images, classes)`.
        labels: Class indices, shape `(images,)`, or None.
    """

    arrays: dict[str, np.ndarray]
    labels: np.ndarray | None

    def scores(self) -> list[Scores]:
        """Each model compared with the first, in order; see `compare`."""
        reference = next(iter(self.arrays.values()))
        return [score(name, array, reference, self.labels) for name, array in self.arrays.items()]


def compare(
    predictors: Mapping[str, Predictor],
    batches: Iterable[tuple[np.ndarray, np.ndarray | None]],
) -> list[Scores]:
    """Runs several models on the same images and compares them with the first.

    Args:
        predictors: By name, functions from images of shape `(n, height, width, channels)`, in the
            scale of the model's input, to outputs of shape `(n, classes)`. The first is the
            reference, usually the Keras model's `predict_on_batch`, and another one
            `TFLiteRunner(path).predict`.
        batches: Pairs of images and their class indices (int, shape `(n,)`), or None for labels.
            Read once.

    Returns:
        The scores, in the order of `predictors`. Ties between classes go to the lower index.

    Raises:
        ValueError: If there is no predictor or no image, if some batches are labelled and others
            not, if outputs do not have the shape `(n, classes)` or differ in it, if they hold
            values that are not finite, or if a label is no class.
    """
    return predict_all(predictors, batches).scores()


def predict_all(
    predictors: Mapping[str, Predictor],
    batches: Iterable[tuple[np.ndarray, np.ndarray | None]],
) -> Outputs:
    """Runs several models on the same images.

    Args:
        predictors: As `compare`.
        batches: As `compare`.

    Returns:
        Their outputs.

    Raises:
        ValueError: As `compare`.
    """
    if not predictors:
        raise ValueError("`predictors` must hold at least one model. Received: none")
    outputs: dict[str, list[np.ndarray]] = {name: [] for name in predictors}
    labels: list[np.ndarray | None] = []
    for images, batch_labels in batches:
        for name, predict in predictors.items():
            outputs[name].append(_checked(name, np.asarray(predict(images)), len(images)))
        labels.append(batch_labels)
    if not labels:
        raise ValueError("There are no images to compare on.")
    if any((batch is None) != (labels[0] is None) for batch in labels):
        raise ValueError("Either every batch has labels or none.")
    all_labels = None if labels[0] is None else np.concatenate(labels)
    arrays = {name: np.concatenate(parts) for name, parts in outputs.items()}
    return Outputs(arrays, all_labels)


def score(
    name: str, outputs: np.ndarray, reference: np.ndarray, labels: np.ndarray | None = None
) -> Scores:
    """Compares the outputs of a model with those of a reference.

    Args:
        name: Of the model.
        outputs: Shape `(images, classes)`, probabilities or logits.
        reference: The reference's outputs, same shape and kind.
        labels: Class indices, shape `(images,)`, or None.

    Returns:
        The scores.

    Raises:
        ValueError: If the shapes differ or a label is no class.
    """
    if outputs.shape != reference.shape:
        raise ValueError(
            f"The outputs of {name!r} must have the shape of the reference's, {reference.shape}. "
            f"Received: {outputs.shape}"
        )
    images, classes = outputs.shape
    if labels is not None and (labels.min() < 0 or labels.max() >= classes):
        raise ValueError(
            f"Labels must be class indices in 0..{classes - 1}. "
            f"Received: labels in {labels.min()}..{labels.max()}"
        )
    outputs, reference = outputs.astype(np.float64), reference.astype(np.float64)
    difference = np.abs(outputs - reference)
    noise = np.square(difference).sum()
    signal = np.square(reference).sum()
    ranks = None if labels is None else _ranks(outputs, labels)
    return Scores(
        name=name,
        images=images,
        top1=None if ranks is None else float(np.mean(ranks < 1)),
        top5=None if ranks is None or classes <= 5 else float(np.mean(ranks < 5)),
        agreement=float(np.mean(outputs.argmax(axis=1) == reference.argmax(axis=1))),
        mean_abs_difference=float(difference.mean()),
        max_abs_difference=float(difference.max()),
        sqnr_db=float(10 * np.log10(signal / noise)) if noise > 0 and signal > 0 else None,
    )


def _ranks(outputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """How many classes come before the labelled one: larger outputs, and equal ones before it.

    Integer outputs hold many ties, so they must be broken the way `argmax` does.
    """
    of_label = outputs[np.arange(len(labels)), labels][:, None]
    before = np.arange(outputs.shape[1]) < labels[:, None]
    return ((outputs > of_label) | ((outputs == of_label) & before)).sum(axis=1)


def _checked(name: str, outputs: np.ndarray, count: int) -> np.ndarray:
    if outputs.ndim != 2 or len(outputs) != count:
        raise ValueError(
            f"{name!r} must give outputs of the shape ({count}, classes) for {count} images. "
            f"Received: {outputs.shape}"
        )
    if not np.isfinite(outputs).all():
        raise ValueError(f"{name!r} gives outputs that are not finite (NaN or infinity).")
    return outputs
