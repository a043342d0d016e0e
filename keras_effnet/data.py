"""Images as calibration and evaluation data.

`open_images` turns a folder, a CSV list, a `.npz` file, NumPy arrays or a `tf.data.Dataset` into
an `ImageDataset`: a fixed, ordered set of images that can be iterated any number of times, each
pass giving the same batches. Everything that can be wrong with the source is found when it is
opened, before long work starts.
"""

from __future__ import annotations

import csv
import difflib
import os
import sys
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from keras_effnet.preprocessing import check_crop, crop_and_resize, crop_box, preprocess
from keras_effnet.specs import PreprocessingSpec

if TYPE_CHECKING:
    from PIL import Image

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp")

# What Pillow may find inside such a file. JPEG includes MPO, which many phones write as .jpg.
_FORMATS = ("JPEG", "PNG", "BMP", "WEBP")
# Pillow decodes outside Python's global lock; more threads than this wait for the disk.
_THREADS = min(4, os.cpu_count() or 1)
# Images decoded ahead of the reader, to bound the memory.
_DECODED_AHEAD = 4 * _THREADS
# Floats may leave 0..255 a little: bicubic resizing overshoots by less than a quarter.
_OVERSHOOT = 64
# No set of photographs is this dark; values scaled to 0..1, -1..1 or standardized all are.
_DARKEST_MAXIMUM = 16
# An error lists so many of its causes and counts the others.
_LISTED = 5


@dataclass(frozen=True)
class Labels:
    """The classes of a model, in the order of its outputs.

    Args:
        names: Readable name of every class. May repeat only if there are ids (ImageNet has two
            classes named "crane").
        ids: Unique identifier of every class, e.g. a WordNet id, or None.
    """

    names: tuple[str, ...]
    ids: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not self.names:
            raise ValueError("A model has at least one class. Received: no names")
        if self.ids is not None and len(self.ids) != len(self.names):
            raise ValueError(
                "`ids` and `names` hold one entry per class. "
                f"Received: {len(self.ids)} ids and {len(self.names)} names"
            )
        kind, keys = ("name", self.names) if self.ids is None else ("id", self.ids)
        repeated = [key for key, count in Counter(keys).items() if count > 1]
        if repeated:
            raise ValueError(
                f"Every class needs its own {kind}. Received more than once: {_listing(repeated)}"
            )

    def __len__(self) -> int:
        return len(self.names)

    def find(self, label: str) -> int | None:
        """Index of the class with this id or name.

        Args:
            label: An id, or a name; of names, case, spaces, hyphens and underscores are ignored.

        Returns:
            The index, or None if there is no such class.

        Raises:
            ValueError: If several classes have this name.
        """
        if self.ids is not None and label in self._index_of_id:
            return self._index_of_id[label]
        indices = self._indices_of_name.get(_normalize(label), ())
        if len(indices) > 1:
            raise ValueError(
                f"{label!r} is the name of the classes {_listing(indices)}. Use the class id"
                + ("." if self.ids is None else f": {_listing(self.ids[i] for i in indices)}.")
            )
        return indices[0] if indices else None

    def closest(self, label: str) -> list[str]:
        """Up to three ids or names similar to `label`, the most similar first."""
        known = {_normalize(name): name for name in (*self.names, *(self.ids or ()))}
        matches = difflib.get_close_matches(_normalize(label), known, n=3)
        return [known[match] for match in matches]

    @cached_property
    def _index_of_id(self) -> dict[str, int]:
        return {id_: index for index, id_ in enumerate(self.ids or ())}

    @cached_property
    def _indices_of_name(self) -> dict[str, list[int]]:
        indices: dict[str, list[int]] = {}
        for index, name in enumerate(self.names):
            indices.setdefault(_normalize(name), []).append(index)
        return indices


class Skipped(NamedTuple):
    """An image file that could not be used, and why."""

    path: Path
    reason: str


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """A fixed, ordered set of images of one size; made by `open_images`.

    Args:
        size: `(height, width)` of every image in pixels.
        paths: Of the images, in order, or None if they do not come from files.
        labels: Class index of every image, int64 of shape `(len,)`, or None.
        skipped: Files that could not be read, in the order of their paths.
        count: Number of images.
        stream: Starts a pass: yields every image, numbers of shape `(height, width, channels)`.
        transform: Applied to every batch, or None.
    """

    size: tuple[int, int]
    paths: tuple[Path, ...] | None
    labels: np.ndarray | None
    skipped: tuple[Skipped, ...]
    count: int
    stream: Callable[[], Iterator[np.ndarray]]
    transform: PreprocessingSpec | None

    def __len__(self) -> int:
        return self.count

    def batches(self, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """Starts a pass over the images; every pass gives the same batches.

        Args:
            batch_size: Images in a batch; the last batch may hold fewer.

        Returns:
            Iterator of `(images, labels)`: images float32 of shape `(n, height, width,
            channels)` in the scale of the model's input, labels int64 of shape `(n,)` or None.

        Raises:
            ValueError: If `batch_size` is not a positive integer; during the pass, if the source
                changed since it was opened.
        """
        _check_positive("batch_size", batch_size)
        return self._batches(batch_size)

    def _batches(self, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        start, images = 0, []
        for image in self.stream():
            images.append(image)
            if len(images) == batch_size or start + len(images) == self.count:
                stop = start + len(images)
                batch = np.stack(images).astype(np.float32)
                if self.transform is not None:
                    batch = preprocess(batch, self.transform)
                yield batch, None if self.labels is None else self.labels[start:stop]
                start, images = stop, []


def read_labels(path: str | os.PathLike) -> Labels:
    """Reads the class names of a model.

    Args:
        path: Either a `.csv` file with the header `index,id,name` (in any order; `wnid` means
            `id`, which may be missing), one row per class in any order; or a text file with one
            name per line, in the order of the model's outputs. UTF-8.

    Returns:
        The classes, ordered by index.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not UTF-8 text, is empty, misses a column, repeats an index,
            id or name, or leaves an index out.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no labels file {str(path)!r}.")
    try:
        if path.suffix.lower() == ".csv":
            return _labels_of_table(*_read_csv(path))
        lines = [line.strip() for line in _read_text(path).rstrip().splitlines()]
        if "" in lines:
            raise ValueError(f"Line {lines.index('') + 1} is empty: a class without a name.")
        return Labels(tuple(lines))
    except ValueError as error:
        raise ValueError(f"Labels file {str(path)!r}: {error}") from error


def open_images(
    source: Any,
    size: tuple[int, int],
    *,
    preprocessing: PreprocessingSpec | None = None,
    in_graph_preprocessing: bool = True,
    labels: Labels | None = None,
    classes: int | None = None,
    crop: str = "published",
    samples: int | None = None,
    seed: int = 0,
    strict: bool = False,
    exclude: Collection[str | os.PathLike] = (),
) -> ImageDataset:
    """Opens a set of images for calibration or evaluation.

    Files are JPEG, PNG, BMP or WebP of any colour mode (see `preprocessing.to_rgb`); their EXIF
    orientation is applied; hidden files and other files are ignored. Each is decoded once when
    it is opened, to find the broken ones, and again in every pass, in a few threads: the set is
    never held in memory. Arrays and datasets must have the right size already.

    Args:
        source: One of

            - a folder with one sub-folder per class. With `labels` a sub-folder is named by the
              id or name of its class, and classes may be missing; without, the sub-folders in
              alphabetical order are the classes;
            - a folder of images, unlabelled, or the path of one image;
            - a `.csv` file with the header `path` or `path,label`: paths are relative to the
              file's own folder, labels are class indices or, with `labels`, ids or names;
            - a `.npz` file with `images` and, optionally, `labels`;
            - an array of images `(n, height, width, channels)`, or a tuple `(images, labels)`
              with integer labels of shape `(n,)`;
            - a finite `tf.data.Dataset` of images or `(image, label)`, batched or not, which
              must give the same elements in every pass (no shuffling, no augmentation). It is
              read once when it is opened.
        size: `(height, width)` of the model's input in pixels.
        preprocessing: The model's input transform, for its crop and its arithmetic. Sources then
            hold pixels in 0..255, which is checked. None only for arrays and datasets, whose
            values are then handed on as they are.
        in_graph_preprocessing: Whether the model transforms its input itself. True: the batches
            hold pixels in 0..255. False: they are transformed by `preprocess`.
        labels: The model's classes, from `read_labels`.
        classes: The model's number of classes, to check the labels against.
        crop: `"published"`, `"center"` or `"stretch"`, of files; see `crop_and_resize`.
        samples: Take at most this many images: a random choice, balanced over the classes if the
            images are labelled. They keep the order of the source. None takes all.
        seed: Of that choice.
        strict: Whether a file that cannot be read is an error. Otherwise it is left out and
            stands in `skipped`; another one is drawn in its place.
        exclude: Files that are left out, before any is drawn, whatever path leads to them. Of
            arrays and datasets nothing is.

    Returns:
        The images, in the alphabetical order of their folders and files, or in the order of the
        list, array or dataset.

    Raises:
        FileNotFoundError: If `source` is a path to nothing.
        TypeError: If `source` is of another kind, or holds no numbers.
        ValueError: If the source holds no images, or none but those excluded; if folders or labels
            do not belong to the model's classes; if arrays have another size, range or number of
            labels; if no file (with `strict`: not every file) can be read; or if an argument is out
            of its range.
    """
    check_crop(size, crop)
    size = tuple(int(side) for side in size)
    for name, value in (("classes", classes), ("samples", samples)):
        if value is not None:
            _check_positive(name, value)
    if labels is not None:
        if classes is not None and len(labels) != classes:
            raise ValueError(
                f"The labels name {len(labels)} classes, but the model has {classes}. Use the "
                "labels file that belongs to the model."
            )
        classes = len(labels)
    if preprocessing is None and not in_graph_preprocessing:
        raise ValueError(
            "`in_graph_preprocessing=False` needs the transform to apply. Pass `preprocessing`, "
            "e.g. `get_spec(name).preprocessing`. Received: preprocessing=None"
        )

    if isinstance(source, (str, os.PathLike)) and Path(source).suffix.lower() != ".npz":
        opened = _open_files(Path(source), size, preprocessing, crop, labels, classes)
    elif _is_tensorflow_dataset(source):
        opened = _open_dataset(source, size, preprocessing)
    else:
        opened = _open_arrays(source, size, preprocessing)
    class_indices = _check_labels(opened.labels, opened.count, classes)

    order = _draw_order(opened.count, class_indices, samples, seed)
    if exclude and opened.paths is not None:
        excluded = {Path(path).resolve() for path in exclude}
        order = order[[opened.paths[index].resolve() not in excluded for index in order]]
        if not len(order):
            raise ValueError(
                f"All {opened.count} images of {str(source)!r} are excluded. Add others."
            )
    chosen, problems = _first_usable(order, samples or len(order), opened.problem)
    skipped = tuple(sorted(Skipped(opened.paths[i], reason) for i, reason in problems.items()))
    if skipped and (strict or not len(chosen)):
        raise ValueError(
            f"{len(skipped)} of {len(skipped) + len(chosen)} image files cannot be read. Repair "
            "or remove them"
            + (", or do without `strict`. " if strict else ". ")
            + "Received: "
            + _listing(f"{str(path)!r}: {reason}" for path, reason in skipped)
        )
    return ImageDataset(
        size=size,
        paths=None if opened.paths is None else tuple(opened.paths[index] for index in chosen),
        labels=None if class_indices is None else class_indices[chosen],
        skipped=skipped,
        count=len(chosen),
        stream=lambda: opened.stream(chosen),
        transform=None if in_graph_preprocessing else preprocessing,
    )


# Sources


@dataclass(frozen=True, eq=False)
class _Source:
    """What every kind of source is reduced to: numbered images, of which some are chosen."""

    count: int
    labels: Any
    stream: Callable[[np.ndarray], Iterator[np.ndarray]]
    # Why an image file cannot be used, or None; arrays and datasets are checked as a whole.
    problem: Callable[[int], str | None] | None = None
    paths: list[Path] | None = None


def _open_files(
    path: Path,
    size: tuple[int, int],
    preprocessing: PreprocessingSpec | None,
    crop: str,
    labels: Labels | None,
    classes: int | None,
) -> _Source:
    if preprocessing is None:
        raise ValueError(
            "Image files are cropped as the model's `preprocessing` says. Pass it, e.g. "
            "`get_spec(name).preprocessing`. Received: preprocessing=None"
        )
    paths, class_indices = _list_files(path, labels, classes)

    def read(index: int) -> np.ndarray:
        try:
            return crop_and_resize(read_image(paths[index]), size, preprocessing, crop)
        except Exception as error:
            raise ValueError(
                f"{str(paths[index])!r} could be read when the source was opened, and cannot be "
                f"any more: {error}"
            ) from error

    def problem(index: int) -> str | None:
        try:
            image = read_image(paths[index])
            crop_box((image.height, image.width), size, preprocessing, crop)
        except Exception as error:  # A broken file can fail anywhere inside a decoder.
            return str(error) or type(error).__name__
        return None

    return _Source(
        len(paths), class_indices, lambda chosen: _in_threads(read, chosen), problem, paths
    )


def _open_arrays(
    source: Any, size: tuple[int, int], preprocessing: PreprocessingSpec | None
) -> _Source:
    images, labels = _as_arrays(source)
    _check_image_shape(images.shape[1:] if images.ndim == 4 else images.shape, size)
    if not len(images):
        raise ValueError("The source holds no images. Received: an array of length 0")
    _check_range(images.min(), images.max(), preprocessing)
    return _Source(len(images), labels, lambda chosen: (images[index] for index in chosen))


def _open_dataset(
    source: Any, size: tuple[int, int], preprocessing: PreprocessingSpec | None
) -> _Source:
    elements = _dataset_elements(source)
    labels, lows, highs = [], [], []
    for image, label in elements():
        _check_image_shape(image.shape, size)
        labels.append(label)
        lows.append(image.min())
        highs.append(image.max())
    if not labels:
        raise ValueError("The source holds no images. Received: an empty dataset")
    _check_range(np.min(lows), np.max(highs), preprocessing)

    def stream(chosen: np.ndarray) -> Iterator[np.ndarray]:
        wanted = set(chosen.tolist())
        seen = 0
        for index, (image, label) in enumerate(elements()):
            seen += 1
            if seen > len(labels) or not np.array_equal(label, labels[index]):
                break
            if index in wanted:
                yield image
        else:
            if seen == len(labels):
                return
        raise ValueError(
            "The dataset gives other images, or another order, than when it was opened. Build it "
            "without shuffling and random augmentation."
        )

    return _Source(len(labels), None if labels[0] is None else labels, stream)


def _list_files(
    source: Path, labels: Labels | None, classes: int | None
) -> tuple[list[Path], np.ndarray | None]:
    """Image files and their class indices (None if unlabelled), unread."""
    if not source.exists():
        raise FileNotFoundError(f"There is no image source {str(source)!r}.")
    if source.is_dir():
        return _list_folder(source, labels, classes)
    suffix = source.suffix.lower()
    if suffix == ".csv":
        try:
            return _list_csv(source, labels)
        except ValueError as error:
            raise ValueError(f"Image list {str(source)!r}: {error}") from error
    if suffix in EXTENSIONS:
        return [source], None
    raise ValueError(
        f"An image source is a folder, a .csv list, a .npz file or an image "
        f"({', '.join(EXTENSIONS)}). Received: {str(source)!r}"
    )


def _list_folder(
    root: Path, labels: Labels | None, classes: int | None
) -> tuple[list[Path], np.ndarray | None]:
    folders = [entry for entry in _visible(root) if entry.is_dir()]
    direct = _images_of(root)
    images = {folder: _images_of(folder) for folder in folders}
    if not any(images.values()):
        if direct:
            return direct, None
        deeper = [folder.name for folder in folders if any(_folders_of(folder))]
        raise ValueError(
            f"The folder {str(root)!r} holds no images ({', '.join(EXTENSIONS)}), neither itself "
            "nor in its sub-folders."
            + (f" There are more folders inside {_listing(deeper)}." if deeper else "")
        )
    if direct:
        raise ValueError(
            f"The folder {str(root)!r} holds images ({_listing(path.name for path in direct)}) "
            "beside class folders. Move all images into class folders, or none."
        )
    nested = [str(inner.relative_to(root)) for folder in folders for inner in _folders_of(folder)]
    if nested:
        raise ValueError(
            f"The class folders in {str(root)!r} hold folders themselves. Point to the folder "
            f"whose sub-folders are the classes. Received: {_listing(nested)}"
        )
    if labels is not None:
        # An empty folder names no image's class, so that its name does not matter.
        folders = [folder for folder in folders if images[folder]]
        indices = _find_all([folder.name for folder in folders], labels, "Class folders")
    elif classes is not None and len(folders) != classes:
        raise ValueError(
            f"The folder {str(root)!r} has {len(folders)} sub-folders, but the model has "
            f"{classes} classes. If it holds only some of them, pass the model's labels file. "
            f"Received: {_listing(folder.name for folder in folders)}"
        )
    else:
        indices = range(len(folders))
    paths = [path for folder in folders for path in images[folder]]
    repeats = [len(images[folder]) for folder in folders]
    return paths, np.repeat(np.asarray(indices, np.int64), repeats)


def _list_csv(path: Path, labels: Labels | None) -> tuple[list[Path], np.ndarray | None]:
    header, rows = _read_csv(path)
    if "path" not in header:
        raise ValueError(
            f"The first line must be the header `path` or `path,label`. Received: {header}"
        )
    if not rows:
        raise ValueError("The list holds no images, only a header.")
    unnamed = [line for line, row in rows.items() if not row["path"]]
    if unnamed:
        raise ValueError(f"Lines without a path: {_listing(unnamed)}")
    paths = [path.parent / row["path"] for row in rows.values()]
    if "label" not in header:
        return paths, None
    unlabelled = [line for line, row in rows.items() if not row["label"]]
    if unlabelled:
        raise ValueError(
            f"Every image needs a label, or none. Lines without a label: {_listing(unlabelled)}"
        )
    texts = [row["label"] for row in rows.values()]
    if all(text.isdecimal() and (labels is None or labels.find(text) is None) for text in texts):
        indices = [int(text) for text in texts]
    elif labels is None:
        named = [text for text in dict.fromkeys(texts) if not text.isdecimal()]
        raise ValueError(
            "Labels that are no class indices need the model's labels file. "
            f"Received: {_listing(named)}"
        )
    else:
        indices = _find_all(texts, labels, "Labels")
    return paths, np.asarray(indices)


def _find_all(names: list[str], labels: Labels, what: str) -> list[int]:
    """Index of every name, or one error that lists all unknown names with the closest known."""
    unique = list(dict.fromkeys(names))
    found = {name: labels.find(name) for name in unique}
    unknown = [name for name in unique if found[name] is None]
    if unknown:
        hints = (
            f"{name!r} (closest: {', '.join(labels.closest(name)) or 'none'})" for name in unknown
        )
        raise ValueError(
            f"{what} that are no id or name of a class in the labels file: {_listing(hints)}"
        )
    if what == "Class folders" and len(set(found.values())) < len(unique):
        twice = [name for name in unique if list(found.values()).count(found[name]) > 1]
        raise ValueError(f"{what} that name the same class: {_listing(twice)}. Merge them.")
    return [found[name] for name in names]


def _as_arrays(source: Any) -> tuple[np.ndarray, np.ndarray | None]:
    """Images and labels of a `.npz` file, an array or a tuple."""
    if isinstance(source, (str, os.PathLike)):
        if not Path(source).is_file():
            raise FileNotFoundError(f"There is no image source {str(source)!r}.")
        try:
            with np.load(source, allow_pickle=False) as file:
                if "images" not in file:
                    raise ValueError(f"no `images` among its arrays {list(file)}")
                source = file["images"], file["labels"] if "labels" in file else None
        except Exception as error:  # A broken archive can fail anywhere inside zipfile or zlib.
            raise ValueError(
                f"{str(source)!r} is no .npz file with `images` and, optionally, `labels`: {error}"
            ) from error
    if isinstance(source, np.ndarray):
        source = source, None
    if not isinstance(source, tuple) or len(source) != 2 or not isinstance(source[0], np.ndarray):
        raise TypeError(
            "An image source is a path, an array of images, a tuple (images, labels) of arrays or "
            f"a tf.data.Dataset. Received: {type(source).__name__}"
        )
    images, labels = source
    if images.dtype.kind not in "uif":
        raise TypeError(f"Images hold integers or floats. Received: dtype {images.dtype}")
    return images, None if labels is None else np.asarray(labels)


def _is_tensorflow_dataset(source: Any) -> bool:
    # Such an object exists only if TensorFlow is loaded.
    tensorflow = sys.modules.get("tensorflow")
    return tensorflow is not None and isinstance(source, tensorflow.data.Dataset)


def _dataset_elements(
    dataset: Any,
) -> Callable[[], Iterator[tuple[np.ndarray, np.ndarray | None]]]:
    """What starts a pass over the single `(image, label or None)` of a `tf.data.Dataset`."""
    spec = dataset.element_spec
    labelled = isinstance(spec, tuple) and len(spec) == 2
    image_spec = spec[0] if labelled else spec
    rank = getattr(getattr(image_spec, "shape", None), "rank", None)
    if rank not in (3, 4):
        raise ValueError(
            "A dataset gives images or (image, label), batched or not, of known rank. "
            f"Received: {spec}"
        )
    if not (image_spec.dtype.is_integer or image_spec.dtype.is_floating):
        raise TypeError(f"Images hold integers or floats. Received: {spec}")
    if int(dataset.cardinality()) == sys.modules["tensorflow"].data.INFINITE_CARDINALITY:
        raise ValueError("The dataset repeats without end. Limit it with `.take(n)`.")

    def elements() -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        for element in dataset.as_numpy_iterator():
            image, label = element if labelled else (element, None)
            if rank == 3:
                yield image, label
            elif labelled:
                yield from zip(image, label, strict=True)
            else:
                yield from ((each, None) for each in image)

    return elements


# Checks


def _check_positive(name: str, value: Any) -> None:
    if not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"`{name}` must be a positive integer. Received: {name}={value!r}")


def _check_image_shape(shape: tuple[int, ...], size: tuple[int, int]) -> None:
    if len(shape) != 3 or tuple(shape[:2]) != size:
        raise ValueError(
            f"The model reads images of shape {(*size, 'channels')}. Arrays and datasets are not "
            f"resized: crop or resize them first. Received: images of shape {tuple(shape)}"
        )


def _check_range(low: np.number, high: np.number, preprocessing: PreprocessingSpec | None) -> None:
    """Refuses what is not finite and, where the model's transform is still to come, no pixels."""
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError("Images must be finite. Received: images with NaN or infinite values")
    if preprocessing is None:
        return
    overshoot = _OVERSHOOT if low.dtype.kind == "f" else 0
    low, high = float(low), float(high)
    if low < -overshoot or high > 255 + overshoot or high <= _DARKEST_MAXIMUM:
        raise ValueError(
            "The images must hold pixels in 0..255: `preprocessing` was given, so the transform "
            "of the model is still to come. Undo the scaling of the images; or, if they are in "
            "the scale of the model's input already, pass preprocessing=None. "
            f"Received: values in {low:g}..{high:g}"
        )


def _check_labels(labels: Any, count: int, classes: int | None) -> np.ndarray | None:
    if labels is None:
        return None
    labels = np.asarray(labels)
    if labels.shape != (count,) or labels.dtype.kind not in "ui":
        raise ValueError(
            f"Labels are integer class indices, one per image: shape ({count},). One-hot labels: "
            f"take the argmax. Received: shape {labels.shape}, dtype {labels.dtype}"
        )
    if labels.min() < 0 or (classes is not None and labels.max() >= classes):
        allowed = "at least 0" if classes is None else f"in 0..{classes - 1}"
        raise ValueError(
            f"Labels must be {allowed}. Received: labels in {labels.min()}..{labels.max()}"
        )
    return labels.astype(np.int64)


# Reading files


def read_image(path: Path) -> Image.Image:
    """Decodes a file and applies its EXIF orientation; any mode."""
    from PIL import Image, ImageOps

    with Image.open(path, formats=_FORMATS) as image:
        limit = Image.MAX_IMAGE_PIXELS
        if limit is not None and image.width * image.height > limit:
            raise ValueError(
                f"{image.width} x {image.height} pixels are more than Pillow's guard against "
                f"decompression bombs allows ({limit}). If the file can be trusted, raise "
                "`PIL.Image.MAX_IMAGE_PIXELS`."
            )
        return ImageOps.exif_transpose(image)


def _in_threads(read: Callable[[int], np.ndarray], indices: np.ndarray) -> Iterator[np.ndarray]:
    """`map(read, indices)` in a few threads, which work ahead by a bounded number of images."""
    with ThreadPoolExecutor(_THREADS) as pool:
        pending = deque()
        for index in indices:
            pending.append(pool.submit(read, index))
            if len(pending) > _DECODED_AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _first_usable(
    order: np.ndarray, wanted: int, problem: Callable[[int], str | None] | None
) -> tuple[np.ndarray, dict[int, str]]:
    """The first `wanted` indices of `order` without a problem, ascending; and the problems met."""
    if problem is None:
        return np.sort(order[:wanted]), {}
    usable, problems, position = [], {}, 0
    with ThreadPoolExecutor(_THREADS) as pool:
        while len(usable) < wanted and position < len(order):
            candidates = order[position : position + wanted - len(usable)].tolist()
            position += len(candidates)
            for index, reason in zip(candidates, pool.map(problem, candidates), strict=True):
                if reason is None:
                    usable.append(index)
                else:
                    problems[index] = reason
    return np.sort(np.asarray(usable, np.int64)), problems


def _draw_order(
    count: int, labels: np.ndarray | None, samples: int | None, seed: int
) -> np.ndarray:
    """The order in which images are drawn: by turns from every class, at random within it."""
    if samples is None or samples >= count:
        return np.arange(count)
    random = np.random.default_rng(seed)
    order = random.permutation(count)
    if labels is None:
        return order
    shuffled = labels[order]
    turn = np.empty(count, np.int64)
    for label in np.unique(labels):
        members = shuffled == label
        turn[members] = np.arange(members.sum())
    turns_within_class = random.permutation(int(labels.max()) + 1)[shuffled]
    return order[np.lexsort((turns_within_class, turn))]


def _visible(folder: Path) -> list[Path]:
    entries = (entry for entry in folder.iterdir() if not entry.name.startswith("."))
    # By name, as paths themselves are ordered regardless of case on Windows.
    return sorted(entries, key=lambda entry: entry.name)


def _images_of(folder: Path) -> list[Path]:
    return [
        entry
        for entry in _visible(folder)
        if entry.suffix.lower() in EXTENSIONS and entry.is_file()
    ]


def _folders_of(folder: Path) -> list[Path]:
    return [entry for entry in _visible(folder) if entry.is_dir()]


def _labels_of_table(header: list[str], rows: dict[int, dict[str, str]]) -> Labels:
    if "index" not in header or "name" not in header:
        raise ValueError(
            "The first line must be the header `index,id,name` (`id` may be missing). "
            f"Received: {header}"
        )
    by_index: dict[int, dict[str, str]] = {}
    for line, row in rows.items():
        if not row["index"].isdecimal():
            raise ValueError(f"Line {line}: the index is no number. Received: {row['index']!r}")
        index = int(row["index"])
        if index in by_index:
            raise ValueError(f"Line {line}: the index {index} stands there a second time.")
        if not row["name"]:
            raise ValueError(f"Line {line}: the class {index} has no name.")
        by_index[index] = row
    missing = sorted(set(range(len(by_index))) - set(by_index))
    if missing:
        raise ValueError(
            f"The indices must run from 0 to {max(by_index)} without a hole. "
            f"Missing: {_listing(missing)}"
        )
    ordered = [by_index[index] for index in range(len(by_index))]
    id_column = next((column for column in ("id", "wnid") if column in header), None)
    ids = None if id_column is None else tuple(row[id_column] for row in ordered)
    return Labels(tuple(row["name"] for row in ordered), ids)


def _read_csv(path: Path) -> tuple[list[str], dict[int, dict[str, str]]]:
    """Header in lower case, and the rows that are not blank by their line number."""
    reader = csv.reader(_read_text(path).splitlines())
    header, rows = [], {}
    try:
        for values in reader:
            values = [value.strip() for value in values]
            if not any(values):
                continue
            if not header:
                header = [column.lower() for column in values]
                continue
            if len(values) != len(header):
                raise ValueError(
                    f"Line {reader.line_num} has {len(values)} values, the header has "
                    f"{len(header)}: {','.join(header)}. Received: {','.join(values)}"
                )
            rows[reader.line_num] = dict(zip(header, values, strict=True))
    except csv.Error as error:
        raise ValueError(f"Line {reader.line_num} is not comma-separated text: {error}.") from error
    return header, rows


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"The file is not UTF-8 text ({error}). Save it as UTF-8.") from error


def _normalize(name: str) -> str:
    return name.casefold().replace("_", " ").replace("-", " ").strip()


def _listing(items: Iterable[Any]) -> str:
    items = [str(item) for item in items]
    more = f" and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
    return ", ".join(items[:_LISTED]) + more
