"""Batches of images, each a function of the seed, the epoch and the step alone.

So a training can begin at any step of any epoch, and several processes can each make their own
rows of the same batches.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from keras_effnet.data import ImageDataset, read_image
from keras_effnet.preprocessing import crop_and_resize, preprocess
from keras_effnet.specs import PreprocessingSpec
from keras_effnet.training.augmentation import Mix, vary
from keras_effnet.training.config import TrainingConfig

# Pillow decodes outside Python's global lock; more threads than this wait for the disk.
_THREADS = min(8, os.cpu_count() or 1)
# Each kind of random decision has a stream of its own.
_ORDER, _IMAGE, _MIX, _SPLIT = range(4)


class Batch(NamedTuple):
    """What one step is given.

    Attributes:
        images: float32 of shape `(n, height, width, 3)`, in the scale of the model's input.
        targets: Share of each class, float32 of shape `(n, classes)`; a row sums to 1.
        weights: Of the images in the loss, float32 of shape `(n,)`; 0 for one that is not used.
    """

    images: np.ndarray
    targets: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True, eq=False)
class Images:
    """Labelled images that can be read in any order.

    Args:
        dataset: From `open_images`, labelled, with pixels in 0..255.
        classes: Number of classes.
        preprocessing: How they are cropped.
        transform: What makes the model's input of pixels, or None if the model does it.
        crop: `"published"`, `"center"` or `"stretch"`, where an image is not varied.
        indices: Those of the dataset's images that are meant, int64; None for all.
    """

    dataset: ImageDataset
    classes: int
    preprocessing: PreprocessingSpec
    transform: PreprocessingSpec | None = None
    crop: str = "published"
    indices: np.ndarray | None = None
    _pixels: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.dataset.labels is None:
            raise ValueError(
                "Training needs labelled images: a folder for each class, a .csv list with "
                "labels, or arrays with labels. Received: images without labels"
            )
        if self.indices is None:
            object.__setattr__(self, "indices", np.arange(len(self.dataset)))
        if self.dataset.paths is None and self._pixels is None:
            # Of arrays and datasets only whole passes can be had.
            pixels = np.stack([np.asarray(image) for image in self.dataset.stream()])
            pixels = np.clip(np.round(pixels), 0, 255).astype(np.uint8)
            object.__setattr__(self, "_pixels", pixels)

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def labels(self) -> np.ndarray:
        """Class indices, int64 of shape `(len,)`."""
        return self.dataset.labels[self.indices]

    @property
    def size(self) -> tuple[int, int]:
        """`(height, width)` in pixels."""
        return self.dataset.size

    @property
    def paths(self) -> list[Path]:
        """Files of the images; none if they come from an array."""
        paths = self.dataset.paths
        return [] if paths is None else [paths[index] for index in self.indices]

    def name(self, number: int) -> str:
        """Path of an image, or its number in the array it comes from."""
        index = int(self.indices[number])
        return f"image {index}" if self.dataset.paths is None else str(self.dataset.paths[index])

    def read(self, number: int):
        """Decodes an image: a Pillow image of any mode."""
        from PIL import Image

        index = int(self.indices[number])
        if self.dataset.paths is None:
            return Image.fromarray(self._pixels[index])
        return read_image(self.dataset.paths[index])

    def split(self, share: float, seed: int) -> tuple[Images, Images]:
        """Divides the images, every class in the same proportion.

        Args:
            share: Of the second part, in (0, 1).
            seed: Of the choice.

        Returns:
            Both parts. Each class with two images or more has at least one in each.

        Raises:
            ValueError: If the share is out of its range, or no class has two images.
        """
        if not 0 < share < 1:
            raise ValueError(f"`share` must be between 0 and 1. Received: {share!r}")
        random = np.random.default_rng((seed, _SPLIT))
        second = np.zeros(len(self), bool)
        for label in np.unique(self.labels):
            members = random.permutation(np.flatnonzero(self.labels == label))
            number = min(len(members) - 1, max(1, round(share * len(members))))
            second[members[:number]] = True
        if not second.any():
            raise ValueError(
                "No class has two images, so none can be held back for validation. Pass "
                "validation images of their own."
            )
        return self._part(~second), self._part(second)

    def _part(self, mask: np.ndarray) -> Images:
        return Images(
            self.dataset,
            self.classes,
            self.preprocessing,
            self.transform,
            self.crop,
            self.indices[mask],
            self._pixels,
        )


def balanced_weights(images: Images) -> np.ndarray:
    """Weight of each class, inverse to its number of images; 1 on the mean of the images.

    Returns:
        float32 of shape `(classes,)`; 0 for a class without images.
    """
    counts = np.bincount(images.labels, minlength=images.classes)
    present = counts > 0
    weights = np.zeros(images.classes, np.float32)
    weights[present] = len(images) / (present.sum() * counts[present])
    return weights


class _Reader:
    """Reads images in threads, and makes batches one step ahead of their use.

    Attributes:
        error: What was raised while a batch was made, or None.
    """

    def __init__(self, images: Images) -> None:
        self.images = images
        self.error: Exception | None = None

    def _ahead(self, make: Callable[[int], Batch], steps: range) -> Iterator[Batch]:
        with ThreadPoolExecutor(1) as maker:
            try:
                pending = maker.submit(make, steps[0]) if len(steps) else None
                for step in steps:
                    batch = pending.result()
                    if step + 1 < steps.stop:
                        pending = maker.submit(make, step + 1)
                    yield batch
            except Exception as error:
                # What feeds the devices may hide it behind an error of its own.
                self.error = error
                raise

    def _map(self, read: Callable[[int], object], numbers: np.ndarray) -> list:
        with ThreadPoolExecutor(_THREADS) as pool:
            return list(pool.map(read, numbers.tolist()))

    def _finished(self, images: np.ndarray) -> np.ndarray:
        transform = self.images.transform
        return images if transform is None else preprocess(images, transform)


class TrainingBatches(_Reader):
    """The batches of a training.

    Every epoch has its own order of the images; what does not fill a last batch is left out of
    it. An image that cannot be read is replaced by another one of its batch, with weight 0.

    Args:
        images: The training images.
        config: Batch size, augmentation, class weights, seed.
        unreadable: Collects images that cannot be read, by name, and why.
        report: Called with the name and the reason when one is met first.

    Raises:
        ValueError: If there are fewer images than a batch holds.
    """

    def __init__(
        self,
        images: Images,
        config: TrainingConfig,
        unreadable: dict[str, str],
        report: Callable[[str, str], None] = lambda name, reason: None,
    ) -> None:
        super().__init__(images)
        if len(images) < config.batch_size:
            raise ValueError(
                f"A batch holds {config.batch_size} images, but there are only {len(images)} for "
                "training. Choose a smaller batch size."
            )
        self.config, self.unreadable, self.report = config, unreadable, report
        self.steps = len(images) // config.batch_size
        self._class_weights = (
            balanced_weights(images)
            if config.class_weights == "balanced"
            else np.ones(images.classes, np.float32)
        )

    def epoch(
        self, phase: int, epoch: int, rows: slice = slice(None), first_step: int = 0
    ) -> Iterator[Batch]:
        """Starts an epoch, or goes on with it.

        Args:
            phase: Index of the phase.
            epoch: Index of the epoch in it.
            rows: Those of every batch that are wanted.
            first_step: Index of the first batch that is wanted.

        Yields:
            The batches.

        Raises:
            ValueError: If an image cannot be read and the config is strict, or no image of a
                batch can be read.
        """
        order = self._random(_ORDER, phase, epoch).permutation(len(self.images))
        make = lambda step: self._batch(phase, epoch, step, order, rows)  # noqa: E731
        yield from self._ahead(make, range(first_step, self.steps))

    def _batch(self, phase: int, epoch: int, step: int, order: np.ndarray, rows: slice) -> Batch:
        config, size = self.config, self.images.size
        members = order[step * config.batch_size : (step + 1) * config.batch_size]
        mix = Mix(config.augmentation, size, len(members), self._random(_MIX, phase, epoch, step))
        wanted = np.arange(len(members))[rows]
        own = self._read(phase, epoch, members[wanted])
        if mix.partners is None:
            images, targets, weights = own
        else:
            partners = mix.partners[wanted]
            # Only a process that makes a part of the batch must read partners from outside it.
            other = (
                tuple(part[partners] for part in own)
                if len(wanted) == len(members)
                else self._read(phase, epoch, members[partners])
            )
            images = mix.images(own[0], other[0])
            targets, weights = (
                mix.targets(mine, theirs) for mine, theirs in zip(own[1:], other[1:], strict=True)
            )
        return Batch(self._finished(images), targets, weights)

    def _read(
        self, phase: int, epoch: int, numbers: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        def read(number: int) -> np.ndarray | None:
            random = self._random(_IMAGE, phase, epoch, number)
            try:
                image = self.images.read(number)
                return vary(
                    image,
                    self.images.size,
                    self.images.preprocessing,
                    self.config.augmentation,
                    random,
                    self.images.crop,
                )
            except Exception as error:  # A broken file can fail anywhere inside a decoder.
                self._note(self.images.name(number), error)
                return None

        found = self._map(read, numbers)
        usable = [index for index, image in enumerate(found) if image is not None]
        if not usable:
            raise ValueError(
                f"None of the {len(numbers)} images of a batch can be read, e.g. "
                f"{self.images.name(int(numbers[0]))!r}. Is their disk still there?"
            )
        chosen = np.array(
            [i if found[i] is not None else usable[i % len(usable)] for i in range(len(found))]
        )
        labels = self.images.labels[numbers][chosen]
        weights = self._class_weights[labels]
        weights[[image is None for image in found]] = 0
        images = np.stack([found[index] for index in chosen]).astype(np.float32)
        return images, np.eye(self.images.classes, dtype=np.float32)[labels], weights

    def _note(self, name: str, error: Exception) -> None:
        reason = str(error) or type(error).__name__
        if self.config.strict:
            raise ValueError(
                f"{name!r} cannot be read: {reason}. Repair or remove it, or do without `strict`."
            ) from error
        if name not in self.unreadable:
            self.unreadable[name] = reason
            self.report(name, reason)

    def _random(self, *key: int) -> np.random.Generator:
        return np.random.default_rng((self.config.seed, *key))


class EvaluationBatches(_Reader):
    """All images once, in order, not varied; the last batch is filled up with weight 0.

    Args:
        images: The images.
        batch_size: Images of a batch.
    """

    def __init__(self, images: Images, batch_size: int) -> None:
        super().__init__(images)
        self.batch_size = batch_size
        self.steps = -(-len(images) // batch_size)

    def batches(self, rows: slice = slice(None)) -> Iterator[Batch]:
        """Starts a pass.

        Args:
            rows: Those of every batch that are wanted.

        Yields:
            The batches.

        Raises:
            ValueError: If an image cannot be read, though it could when it was opened: figures
                over other images than before could not be compared.
        """
        yield from self._ahead(lambda step: self._batch(step, rows), range(self.steps))

    def _batch(self, step: int, rows: slice) -> Batch:
        numbers = np.arange(step * self.batch_size, (step + 1) * self.batch_size)[rows]
        used = numbers < len(self.images)
        numbers = np.minimum(numbers, len(self.images) - 1)
        images = np.stack(self._map(self._read, numbers)).astype(np.float32)
        targets = np.eye(self.images.classes, dtype=np.float32)[self.images.labels[numbers]]
        return Batch(self._finished(images), targets, used.astype(np.float32))

    def _read(self, number: int) -> np.ndarray:
        images = self.images
        try:
            return crop_and_resize(
                images.read(number), images.size, images.preprocessing, images.crop
            )
        except Exception as error:
            raise ValueError(
                f"The validation image {images.name(number)!r} could be read when it was opened, "
                f"and cannot be any more: {error}"
            ) from error
