"""Weights: where the official files are, how they are fetched, read and loaded.

Three steps, each usable alone: `fetch_weights` puts a verified file into Keras' cache,
`read_weights` reads any file that Keras ever wrote into plain arrays by layer name, and
`load_weights` checks them against a model and assigns them all, or none.

Loading is by name, never by position, so a file that does not belong to the model is recognised
as such, and one error lists everything that does not fit.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import tempfile
import urllib.request
import warnings
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import h5py
import keras
import numpy as np

from .scaling import resolve
from .specs import IMAGENET_STD, SPECS, ModelSpec, get_spec, list_models

BASE_URL = "https://storage.googleapis.com"
BASE_URL_VARIABLE = "KERAS_EFFNET_WEIGHTS_URL"

STEM = "stem_conv"
HEAD = "predictions"
NORMALIZATION = "normalization"

# Member of a `.keras` file that holds the spec of a converted model.
SPEC_MEMBER = "keras_effnet.json"

_LISTED = 20  # Entries of each kind that an error message spells out.
_HASH_BLOCK = 1 << 20
_SECONDS_TO_ANSWER = 60
# The largest tensor of the family (L2) has 45 MB; a file that declares more is not ours, and
# reading it would only exhaust the memory.
_LARGEST_TENSOR = 1 << 30
_HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
# Scale of the second `Rescaling` of keras.applications.
_SECOND = 1 / np.sqrt(IMAGENET_STD)
# Standard deviations where variances belong: (0.229, 0.224, 0.225) against (0.052, 0.050, 0.051).
_STD_TOLERANCE = 1e-3


class WeightsDownloadError(OSError):
    """An official file could not be fetched, or is not the published one."""


class WeightsFileError(ValueError):
    """A file cannot be read as Keras weights."""


class WeightsMismatchError(ValueError):
    """The weights do not fit the model; the message lists everything that does not."""


@dataclass(frozen=True)
class WeightsSource:
    """An official weights file.

    Args:
        model: Constructor name of the variant, e.g. `"EfficientNetB0"`.
        weights: Name of the training, as given to `weights=`, e.g. `"imagenet"`.
        include_top: Whether the file holds the classifier.
        path: Below the base address, e.g. `"keras-applications/efficientnetb0.h5"`.
        md5: Published hash of the file, 32 hexadecimal digits; None for the TensorFlow checkpoints
            of the official repositories, which have none: they are verified by the hash that the
            storage itself tells, and converted after they were fetched.
        top1: Published ImageNet top-1 accuracy of these weights in percent, or None.
        source: Where hash and accuracy stand.
        preprocessing: The transform to convert it with, `"advprop"`, or None for the variant's.
    """

    model: str
    weights: str
    include_top: bool
    path: str
    md5: str | None
    top1: float | None
    source: str
    preprocessing: str | None = None

    def __post_init__(self) -> None:
        if self.model not in SPECS:
            raise ValueError(f"`model` must be a variant of the table. Received: {self.model!r}")
        if self.md5 is not None and not re.fullmatch("[0-9a-f]{32}", self.md5):
            raise ValueError(f"`md5` must be 32 hexadecimal digits. Received: {self.md5!r}")

    @property
    def file_name(self) -> str:
        return self.path.rsplit("/", 1)[-1]

    @property
    def is_checkpoint(self) -> bool:
        """Whether it is a TensorFlow checkpoint, which must be converted."""
        return self.md5 is None

    @property
    def url(self) -> str:
        """Address in Google's public storage."""
        return f"{BASE_URL}/{self.path}"


# keras.applications: model, hash with top, hash without top, top-1. Hashes: `WEIGHTS_HASHES` of
# Keras 3.15's applications/efficientnet.py and efficientnet_v2.py. Top-1: the table of
# keras.io/api/applications.
_KERAS_APPLICATIONS = """
    EfficientNetB0   902e53a9f72be733fc0bcb005b3ebbac 50bc09e76180e00e4465e1a485ddc09d 77.1
    EfficientNetB1   1d254153d4ab51201f1646940f018540 74c4e6b3e1f6a1eea24c589628592432 79.1
    EfficientNetB2   b15cce36ff4dcbd00b6dd88e7857a6ad 111f8e2ac8aa800a7a99e3239f7bfb39 80.1
    EfficientNetB3   ffd1fdc53d0ce67064dc6a9c7960ede0 af6d107764bb5b1abb91932881670226 81.6
    EfficientNetB4   18c95ad55216b8f92d7e70b3a046e2fc ebc24e6d6c33eaebbd558eafbeedf1ba 82.9
    EfficientNetB5   ace28f2a6363774853a83a0b21b9421a 38879255a25d3c92d5e44e04ae6cec6f 83.6
    EfficientNetB6   165f6e37dce68623721b423839de8be5 9ecce42647a20130c1f39a5d4cb75743 84.0
    EfficientNetB7   8c03f828fec3ef71311cd463b6759d99 cbcfe4450ddf6f3ad90b1b398090fe4a 84.3
    EfficientNetV2B0 21ecbf6da12460d5c40bb2f29ceb2188 893217f2bb855e2983157299931e43ff 78.7
    EfficientNetV2B1 069f0534ff22adf035c89e2d9547a9dc 0e80663031ca32d657f9caa404b6ec37 79.8
    EfficientNetV2B2 424e49f28180edbde1e94797771950a7 1dfe2e7a5d45b6632553a8961ea609eb 80.5
    EfficientNetV2B3 1f1fc43bd98a6e4fd8fdfd551e02c7a0 f6abf7b5849ac99a89b50dd3fd532856 82.0
    EfficientNetV2S  e1d88a8495beba45748fedd0cecbe016 af0682fb74e8c54910f2d4393339c070 83.9
    EfficientNetV2M  a3bf6aa3276309f4fc6a34aa114c95cd 1b8dc055df72dde80d614482840fe342 85.3
    EfficientNetV2L  27e6d408b53c7ebc868fefa357689935 b0b66b5c863aef5b46e8608fe1711615 85.7
"""


def _keras_applications() -> Iterable[WeightsSource]:
    for row in _KERAS_APPLICATIONS.strip().splitlines():
        model, with_top, without_top, top1 = row.split()
        name = SPECS[model].name
        v2 = name.startswith("efficientnetv2")
        folder = "tensorflow/keras-applications/efficientnet_v2" if v2 else "keras-applications"
        for include_top, md5 in ((True, with_top), (False, without_top)):
            suffix = ".h5" if include_top else "_notop.h5"
            yield WeightsSource(
                model=model,
                weights="imagenet",
                include_top=include_top,
                path=f"{folder}/{name}{suffix}",
                md5=md5,
                top1=float(top1),
                source="keras.applications",
            )


# TensorFlow checkpoints of the authors: training, folder and file, then model=top-1 (- for none
# published). Addresses and figures of V1: tensorflow/tpu, efficientnet/README.md; of Lite and
# EdgeTPU: the README.md of their folders; of V2: google/automl, efficientnetv2/README.md, and
# effnetv2_model.py (`get_model`) for B0 to B3 on ImageNet-21k.
_CHECKPOINTS = """
    baseline ckpts/efficientnet-{v1}.tar.gz
        B0=76.7 B1=78.7 B2=79.8 B3=81.1 B4=82.5 B5=83.1
    autoaugment ckptsaug/efficientnet-{v1}.tar.gz
        B0=77.1 B1=79.1 B2=80.1 B3=81.6 B4=82.9 B5=83.6 B6=84.0 B7=84.3
    randaugment randaug/efficientnet-{v1}-randaug.tar.gz
        B5=83.7 B7=84.7
    advprop advprop/efficientnet-{v1}.tar.gz
        B0=77.6 B1=79.6 B2=80.5 B3=81.9 B4=83.3 B5=84.3 B6=84.8 B7=85.2 B8=85.5
    noisy-student noisystudent/noisy_student_efficientnet-{v1}.tar.gz
        B0=78.8 B1=81.5 B2=82.4 B3=84.1 B4=85.3 B5=86.1 B6=86.4 B7=86.9 L2=88.4
    noisy-student-475 noisystudent/noisy_student_efficientnet-{v1}_475.tar.gz
        L2=88.2
    imagenet lite/{name}.tar.gz
        Lite0=75.1 Lite1=76.7 Lite2=77.6 Lite3=79.8 Lite4=81.5
    imagenet efficientnet-edgetpu-{last}.tar.gz
        EdgeTPUS=77.23 EdgeTPUM=78.69 EdgeTPUL=80.62
    imagenet21k v2/{name}-21k.tgz
        V2B0=- V2B1=- V2B2=- V2B3=- V2S=- V2M=- V2L=- V2XL=-
    imagenet21k-ft1k v2/{name}-21k-ft1k.tgz
        V2B0=- V2B1=- V2B2=- V2B3=- V2S=84.9 V2M=86.2 V2L=86.9 V2XL=87.2
"""
_CHECKPOINT_FOLDER = "cloud-tpu-checkpoints/efficientnet"


def _checkpoints() -> Iterable[WeightsSource]:
    lines = _CHECKPOINTS.strip().splitlines()
    for heading, models in zip(lines[::2], lines[1::2], strict=True):
        weights, path = heading.split()
        for entry in models.split():
            suffix, top1 = entry.split("=")
            spec = SPECS[f"EfficientNet{suffix}"]
            file = path.format(name=spec.name, v1=suffix.lower(), last=suffix[-1])
            yield WeightsSource(
                model=spec.constructor,
                weights=weights,
                include_top=True,
                path=f"{_CHECKPOINT_FOLDER}/{file}",
                md5=None,
                top1=None if top1 == "-" else float(top1),
                source="google/automl" if suffix.startswith("V2") else "tensorflow/tpu",
                preprocessing="advprop" if weights == "advprop" else None,
            )


SOURCES: tuple[WeightsSource, ...] = (*_keras_applications(), *_checkpoints())
"""Every official file."""


def list_weights(model: str = "*") -> list[WeightsSource]:
    """Official files: what exists for a variant, with its accuracy and its source.

    Args:
        model: Shell-style pattern (`*`, `?`, `[…]`) of constructor names, regardless of case.

    Returns:
        The matching rows of `SOURCES`; empty if none match.
    """
    names = set(list_models(model))
    return [source for source in SOURCES if source.model in names]


# --- Fetching ---------------------------------------------------------------------------------


def fetch_weights(
    model: str | ModelSpec,
    weights: str = "imagenet",
    include_top: bool = True,
    *,
    base_url: str | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> Path:
    """Puts an official file into Keras' cache, unless a good copy is there, and verifies it.

    The download runs under a temporary name in the same folder; only a file with the right hash
    gets the final name. A good copy in a cache that cannot be written is used as it is.

    Files of keras.applications have published hashes. For the authors' checkpoints nobody
    published any: theirs is the MD5 that the storage keeps of the object and sends in the header
    `x-goog-hash` (Google Cloud Storage, "Hashes and ETags"), which shows that what came is what
    lies there, whole. A mirror must send it as well.

    Args:
        model: A variant: its name, or its spec.
        weights: Name of the training, see `list_weights`.
        include_top: Whether to fetch the file with the classifier. A checkpoint has it always.
        base_url: Address of a mirror (`http`, `https` or `file`) below which the files have their
            official paths. None takes the environment variable `KERAS_EFFNET_WEIGHTS_URL` or,
            where that is not set either, Google's public storage.
        cache_dir: Keras' folder; the file goes into its `models` folder. None takes the
            environment variable `KERAS_HOME`, or `~/.keras`.

    Returns:
        Path of the verified file: one that Keras loads, or the archive of a checkpoint, which
        `convert_weights` reads.

    Raises:
        ValueError: If there is no such official file (the message lists those that exist), or the
            base address is none.
        WeightsDownloadError: If the cache cannot be written, the address cannot be reached, tells
            no hash, or what came is not the file. Nothing is left behind.
    """
    source = find_source(model, weights, include_top)
    base_url = _checked_base_url(base_url)
    folder = models_folder(cache_dir)
    # The trainings' archives have the same names.
    name = f"{source.weights}-{source.file_name}" if source.is_checkpoint else source.file_name
    target = folder / name
    if target.is_file() and (source.is_checkpoint or _md5(target) == source.md5):
        return target

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise WeightsDownloadError(
            f"Cannot write to Keras' cache {str(folder)!r}: {error.strerror or error}. Set the "
            "environment variable KERAS_HOME to a folder that can be written, or download "
            f"{base_url}/{source.path} yourself and {_by_hand(source)}."
        ) from None

    url = f"{base_url}/{source.path}"
    partial = folder / f".{name}.{os.getpid()}.part"
    expected = source.md5
    try:
        if expected is None:
            expected = _md5_told_by(url)
        # An absolute subfolder, because `get_file` turns to /tmp of its own accord otherwise.
        keras.utils.get_file(
            fname=partial.name,
            origin=url,
            cache_subdir=str(folder.absolute()),
            file_hash=expected,
            hash_algorithm="md5",
            force_download=True,
        )
        os.replace(partial, target)
    except Exception as error:  # `get_file` raises a bare Exception when it cannot reach the url.
        if partial.is_file() and (received := _md5(partial)) != expected:
            problem = f"the file has the wrong md5 hash. Expected: {expected}. "
            problem += f"Received: {received} ({partial.stat().st_size} bytes)"
        else:
            problem = str(error)
        raise WeightsDownloadError(
            f"Could not fetch the {weights!r} weights of {source.model} from {url}: {problem}. "
            f"Check the network, name a mirror in the environment variable {BASE_URL_VARIABLE}, "
            f"or get the file elsewhere and {_by_hand(source)}."
        ) from None
    finally:
        partial.unlink(missing_ok=True)
    return target


def models_folder(cache_dir: str | os.PathLike | None = None) -> Path:
    """Where Keras keeps the weights of its models: `KERAS_HOME`, or `~/.keras`, or another one."""
    return Path(cache_dir or os.environ.get("KERAS_HOME") or "~/.keras").expanduser() / "models"


def _by_hand(source: WeightsSource) -> str:
    """What to do with an official file that somebody downloaded."""
    if not source.is_checkpoint:
        return "pass its path as `weights`"
    option = f" --preprocessing {source.preprocessing}" if source.preprocessing else ""
    return (
        f"convert it: keras-effnet convert-weights --weights {source.file_name} --model "
        f"{source.model}{option} --output {SPECS[source.model].name}.keras"
    )


def _md5_told_by(url: str) -> str:
    """The MD5 hash of an object, as Google's storage tells it.

    Raises:
        OSError: If the address cannot be reached.
        ValueError: If it tells none.
    """
    request = urllib.request.Request(url, method="HEAD")
    with urllib.request.urlopen(request, timeout=_SECONDS_TO_ANSWER) as response:
        told = response.headers.get_all("x-goog-hash") or []
    for entry in ",".join(told).split(","):
        kind, _, value = entry.strip().partition("=")
        if kind == "md5":
            return base64.b64decode(value).hex()
    raise ValueError("the server tells no MD5 hash (header x-goog-hash) to verify the file by")


def locate_weights(
    model: str | ModelSpec, weights: str | os.PathLike, include_top: bool = True
) -> Path:
    """The file that the argument `weights` of a constructor means.

    Args:
        model: A variant: its name, or its spec.
        weights: Name of an official training, e.g. `"imagenet"`, which is fetched, or the path
            of a file.
        include_top: Of the official file.

    Returns:
        Path of an existing file.

    Raises:
        ValueError: If `weights` is neither.
        WeightsDownloadError: See `fetch_weights`.
    """
    names = weights_names()
    if isinstance(weights, str) and weights in names:
        return fetch_weights(model, weights, include_top)
    if not isinstance(weights, str | os.PathLike) or not Path(weights).exists():
        raise ValueError(
            f"`weights` must be None, one of {names}, or the path of an existing file. "
            f"Received: weights={weights!r}"
        )
    return Path(weights)


def weights_names() -> list[str]:
    """Names of all official trainings, as `weights=` takes them."""
    return sorted({source.weights for source in SOURCES})


def find_source(model: str | ModelSpec, weights: str, include_top: bool = True) -> WeightsSource:
    """The official file of a training.

    Args:
        model: A variant: its name, or its spec.
        weights: Name of the training.
        include_top: Of a file of keras.applications.

    Raises:
        ValueError: If there is none; the message lists those that exist.
    """
    constructor = (model if isinstance(model, ModelSpec) else get_spec(model)).constructor
    for source in SOURCES:
        # A checkpoint holds the classifier, and serves with and without it.
        top = source.include_top if source.is_checkpoint else bool(include_top)
        if (source.model, source.weights, source.include_top) == (constructor, weights, top):
            return source
    own = [
        f"weights={source.weights!r}"
        + ("" if source.is_checkpoint else f" with include_top={source.include_top}")
        for source in SOURCES
        if source.model == constructor
    ]
    others = list(dict.fromkeys(s.model for s in SOURCES if s.weights == weights))
    raise ValueError(
        f"There is no official file for {constructor}, weights={weights!r}, "
        f"include_top={include_top}. For {constructor}: {', '.join(own) or 'none at all'}. "
        f"With weights={weights!r}: {', '.join(others) or 'no variant'} "
        "(see `keras_effnet.list_weights()`). Pass None, or the path of a file of your own."
    )


def _checked_base_url(base_url: str | None) -> str:
    base_url = base_url or os.environ.get(BASE_URL_VARIABLE) or BASE_URL
    if not base_url.startswith(("http://", "https://", "file://")):
        raise ValueError(
            "The base address of the weights must start with http://, https:// or file:// "
            f"(argument `base_url` or environment variable {BASE_URL_VARIABLE}). "
            f"Received: {base_url!r}"
        )
    return base_url.rstrip("/")


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()


# --- Reading ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredWeights:
    """The weights of one network, as arrays.

    Args:
        origin: The file they come from, for messages.
        layers: Layer name to weight name to array, in the order of the file. Weights are called
            as in Keras (`kernel`, `bias`, `gamma`, …) or, where the file only numbers them,
            `"0"`, `"1"`, … in the order of the layer's own weights.
        by_counter: Whether the layers are called after their classes, counted in the order of
            the model (`conv2d`, `conv2d_1`, …): in `.weights.h5` and `.keras` files of older
            Keras versions, which hold no layer names.
        outside: Layers of the file that stand outside the network, if it is nested in a larger
            model.
    """

    origin: str
    layers: Mapping[str, Mapping[str, np.ndarray]]
    by_counter: bool = False
    outside: tuple[str, ...] = ()


def read_weights(path: str | os.PathLike) -> StoredWeights:
    """Reads a weights file that Keras wrote, whatever its version and extension.

    Layouts, told apart by content: the legacy HDF5 of keras.applications, Keras 1 and 2 (also
    inside a whole-model `.h5`), `.weights.h5`, and `.keras`. Where the network is nested in a
    larger model, its weights alone are read. Nothing in the file is executed and no model is
    built from it.

    Args:
        path: The file.

    Returns:
        The arrays by layer name.

    Raises:
        FileNotFoundError: If there is no such file.
        WeightsFileError: If it is none of these layouts, damaged, or holds several networks.
    """
    path = Path(path)
    if not path.is_file():
        _refuse_other_formats(path, b"")
        raise FileNotFoundError(f"There is no weights file {str(path)!r}.")
    with path.open("rb") as file:
        start = file.read(16)
    try:
        if start.startswith(_HDF5_MAGIC):
            return _read_hdf5(path, str(path))
        if start.startswith(b"PK"):
            return _read_hdf5(_archive_member(path), str(path))
    except WeightsFileError:
        raise
    # What h5py, zipfile and NumPy raise on damaged files.
    except (OSError, KeyError, RuntimeError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise WeightsFileError(
            f"The weights file {str(path)!r} ({path.stat().st_size} bytes) is damaged or "
            f"incomplete: {error}. Copy or download it again."
        ) from None
    _refuse_other_formats(path, start)
    raise WeightsFileError(
        f"{str(path)!r} is no weights file of Keras: neither HDF5 (.h5, .weights.h5) nor .keras. "
        f"Received: {path.stat().st_size} bytes beginning with {start!r}"
    )


def _refuse_other_formats(path: Path, start: bytes) -> None:
    """Raises WeightsFileError with a hint if the path is a well-known format of others."""
    index = path.with_name(path.name + ".index")
    if path.is_dir():
        known = "a folder (a SavedModel or a checkpoint folder?)"
    elif index.is_file() or path.suffix == ".index" or ".data-0000" in path.name:
        known = "a TensorFlow checkpoint"
    elif start[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        known = "a pickle (an old PyTorch file?), which can execute code when it is opened"
    elif start[8:9] == b"{" and start[4:8] == b"\0\0\0\0":
        known = "a safetensors file"
    elif start[4:8] == b"TFL3":
        known = "a TFLite model"
    else:
        return
    raise WeightsFileError(
        f"{str(path)!r} is {known}. Weights are read from files that Keras saved: legacy .h5, "
        ".weights.h5 or .keras. Convert it first, if it is an EfficientNet's of TensorFlow or "
        "PyTorch (keras-effnet convert-weights), else save it from the library that wrote it."
    )


def _archive_member(path: Path) -> io.BytesIO:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if "model.weights.h5" in names:
            return io.BytesIO(archive.read("model.weights.h5"))
    torch = any(name.endswith("data.pkl") for name in names)
    kind = "a PyTorch file" if torch else "an archive, but not one of Keras"
    raise WeightsFileError(
        f"{str(path)!r} is {kind}: it holds no 'model.weights.h5'. Weights are read from files "
        "that Keras saved: legacy .h5, .weights.h5 or .keras. An EfficientNet of PyTorch can be "
        "converted: keras-effnet convert-weights."
    )


def read_spec(path: str | os.PathLike) -> ModelSpec | None:
    """The spec that a converted `.keras` file holds: padding, preprocessing, crop and all.

    Args:
        path: Any weights file.

    Returns:
        The spec, or None if the file holds none.

    Raises:
        FileNotFoundError: If there is no such file.
        WeightsFileError: If the spec cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no weights file {str(path)!r}.")
    if not zipfile.is_zipfile(path):
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            if SPEC_MEMBER not in archive.namelist():
                return None
            record = json.loads(archive.read(SPEC_MEMBER))
        return ModelSpec.from_dict(record["spec"])
    except (KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise WeightsFileError(
            f"The spec in {str(path)!r} ({SPEC_MEMBER}) cannot be read: {error}. It was written by "
            "another version, or by somebody else."
        ) from None


def check_spec(spec: ModelSpec, path: Path, include_preprocessing: bool) -> None:
    """Raises WeightsMismatchError if a converted file's weights need another graph than `spec`'s.

    Padding and preprocessing leave no trace in names and shapes: with the wrong ones the weights
    would load, and predict worse.
    """
    stored = read_spec(path)
    if stored is None:
        return

    def needs(each: ModelSpec) -> dict[str, object]:
        own = {
            "padding": (each.padding, *(stage.padding for stage in each.stages)),
            "bn_epsilon": each.bn_epsilon,
        }
        if "torch" not in own["padding"]:  # The others are equal in effect.
            own["padding"] = "TensorFlow's"
        if include_preprocessing:
            own["preprocessing"] = tuple(
                getattr(each.preprocessing, name) for name in ("scale", "offset", "mean", "std")
            )
        return own

    wanted, built = needs(stored), needs(spec)
    wrong = [
        f"{name}: the weights need {wanted[name]}, the model has {built[name]}"
        for name in wanted
        if wanted[name] != built[name]
    ]
    if wrong:
        raise WeightsMismatchError(
            f"The weights of {str(path)!r} were made for another graph than that of "
            f"{spec.constructor}; nothing was loaded. {'; '.join(wrong)}. Build it from the file's "
            "own spec: create_model(keras_effnet.read_spec(path), weights=path, …)."
        )


def _read_hdf5(source: Path | io.BytesIO, origin: str) -> StoredWeights:
    with h5py.File(source, "r") as file:
        # Visits what lies in this file alone: links to other places are not followed.
        datasets: dict[str, h5py.Dataset] = {}

        def collect(name: str, item: object) -> None:
            if isinstance(item, h5py.Dataset):
                datasets[name] = item

        file.visititems(collect)
        if _has_attribute(file, "layer_names"):
            networks, counted = _legacy_networks(file, datasets), set()
        elif "model_weights" in file and _has_attribute(file["model_weights"], "layer_names"):
            networks, counted = _legacy_networks(file["model_weights"], datasets), set()
        else:
            networks, counted = _keras3_networks(file, datasets)
        if not networks:
            raise WeightsFileError(
                f"{origin!r} is an HDF5 file without weights of Keras layers. "
                f"Received: groups {list(file)[:_LISTED]}"
            )
        chosen = _choose_network(networks, origin)
        return StoredWeights(
            origin=origin,
            layers={
                layer: {name: _array(dataset) for name, dataset in weights.items()}
                for layer, weights in networks[chosen].items()
            },
            by_counter=chosen in counted,
            outside=tuple(
                layer for scope, layers in networks.items() if scope != chosen for layer in layers
            ),
        )


# A network of a file: layer name to weight name to data set. Networks are kept by their place.
_Networks = dict[str, dict[str, dict[str, h5py.Dataset]]]


def _legacy_networks(root: h5py.Group, datasets: Mapping[str, h5py.Dataset]) -> _Networks:
    """The layout of Keras 1 and 2: one group per layer, names in attributes.

    A nested model is one group that holds the weights of all its layers.
    """
    networks: _Networks = {}
    prefix = "" if root.name == "/" else root.name.strip("/") + "/"
    for layer in _attribute(root, "layer_names"):
        paths = _attribute(root[layer], "weight_names")
        nested = len({path.rpartition("/")[0] for path in paths}) > 1
        for path in paths:
            dataset = datasets.get(f"{prefix}{layer}/{path}")
            if dataset is None:
                raise KeyError(f"{layer}/{path} is named but not there")
            owner, _, variable = path.rpartition("/")
            name = owner.rpartition("/")[2] if nested else layer
            network = networks.setdefault(layer if nested else "", {})
            network.setdefault(name, {})[variable.partition(":")[0]] = dataset
    return networks


# Greedy, so that the innermost container is the network. `layers` holds a model's layers;
# `_layer_checkpoint_dependencies` did in Keras 2.12.
_KERAS3_PATH = re.compile(r"(.*)(?:layers|_layer_checkpoint_dependencies)/([^/]+)/vars/(\d+)")


def _keras3_networks(
    file: h5py.File, datasets: Mapping[str, h5py.Dataset]
) -> tuple[_Networks, set[str]]:
    """The layout of Keras 3: `layers/<class>_<count>/vars/<position>`, names in attributes.

    Returns:
        The networks, and which of them have counters in place of layer names.
    """
    networks: _Networks = {}
    counted = set()
    for path, dataset in datasets.items():
        match = _KERAS3_PATH.fullmatch(path)
        if match is None:  # Of the optimizer, of seed generators, of something else.
            continue
        scope, counter, position = match.groups()
        name = dataset.parent.attrs.get("name")
        if name is None:
            counted.add(scope)
        networks.setdefault(scope, {}).setdefault(str(name or counter), {})[position] = dataset
    return networks, counted


def _choose_network(networks: _Networks, origin: str) -> str:
    """The place of the EfficientNet among the networks of a file."""
    if len(networks) == 1:
        return next(iter(networks))
    # By counter, the stem has no name; but no other model has depthwise convolutions.
    marked = [
        scope
        for scope, layers in networks.items()
        if STEM in layers or "depthwise_conv2d" in layers
    ]
    if len(marked) != 1:
        raise WeightsFileError(
            f"{origin!r} holds {len(marked) or 'no'} EfficientNets in {len(networks)} models: "
            f"{sorted(marked or networks)}. Save the network alone, for example "
            "`model.get_layer(name).save_weights(…)`."
        )
    return marked[0]


def _has_attribute(group: h5py.Group, name: str) -> bool:
    return name in group.attrs or f"{name}0" in group.attrs


def _attribute(group: h5py.Group, name: str) -> list[str]:
    """A list of strings; Keras splits long ones into `name0`, `name1`, …"""
    if name in group.attrs:
        parts = [group.attrs[name]]
    else:
        parts = []
        while f"{name}{len(parts)}" in group.attrs:
            parts.append(group.attrs[f"{name}{len(parts)}"])
    texts = (text for part in parts for text in part)
    return [text.decode("utf-8") if isinstance(text, bytes) else str(text) for text in texts]


def _array(dataset: h5py.Dataset) -> np.ndarray:
    if dataset.external or dataset.is_virtual:
        raise ValueError(f"{dataset.name} lies in another file")
    if dataset.nbytes > _LARGEST_TENSOR:
        raise ValueError(f"{dataset.name} declares {dataset.nbytes} bytes")
    array = dataset[()]
    if dataset.attrs.get("dtype") == "bfloat16":
        # The upper half of a float32, which HDF5 stores as two opaque bytes.
        array = (np.asarray(array).view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    array = np.asarray(array)
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{dataset.name} holds no numbers but {array.dtype}")
    return array


# --- Loading ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class LoadReport:
    """What `load_weights` did.

    Args:
        origin: The file.
        loaded: Layers that got their weights from it.
        skipped_head: Why the classifier kept its own weights, or None if it did not.
        adapted_stem: Whether the stem was adapted to another number of input channels.
        mended_normalization: Whether standard deviations were squared into variances.
        ignored: Layers of the file that the model has no use for: its classifier for a model
            without one, its normalization for a model without preprocessing, those excluded by
            the caller, those outside the network.
        kept: Layers of the model that are none of the family's and not in the file, such as
            those in front of the network; they keep their weights.
    """

    origin: str
    loaded: tuple[str, ...]
    skipped_head: str | None
    adapted_stem: bool
    mended_normalization: bool
    ignored: tuple[str, ...]
    kept: tuple[str, ...]


def finalize_normalization(model: keras.Model) -> None:
    """Lets the Normalization layers of a model compute with the weights that they hold now.

    They keep tensors beside their weights, which silently stay the old ones.
    """
    for layer in model._flatten_layers(include_self=False):
        if isinstance(layer, keras.layers.Normalization):
            layer.finalize_state()


def load_weights(
    model: keras.Model,
    source: str | os.PathLike | StoredWeights,
    *,
    ignore: Sequence[str] = (),
) -> LoadReport:
    """Loads weights by layer name: everything is checked first, then all of it assigned.

    Rules:

    - **Classifier.** If the file's has another number of classes, or the file has none, the
      model's classifier keeps its weights and a `UserWarning` says so. A file with classifier
      fits a model without.
    - **Layers of one's own**, which the caller put in front of the network, keep their weights
      unless the file has them too.
    - **Input channels.** A file of 3 channels fits a model of n: one channel gets the sum of the
      RGB kernels; otherwise channel c gets the kernel of RGB channel c % 3, scaled by 3 / n, so
      that the response to a grey image stays the same. Normalization statistics follow: one
      channel gets the mean of the means and the square of the mean of the standard deviations;
      otherwise channel c those of c % 3.
    - **Normalization.** The official V1 files hold the standard deviations of ImageNet where
      `Normalization` takes variances (tensorflow issue 49930); keras.applications mends that
      with a second `Rescaling` in the graph. Here the constants are mended: standard deviations,
      recognised by value, are squared, unless the model has that second `Rescaling`. A file
      without normalization leaves the model's; a model without preprocessing ignores the file's.

    Args:
        model: A built Functional model with the layer names of keras.applications. Changed in
            place; untouched if anything does not fit.
        source: A file (see `read_weights`), or weights in memory.
        ignore: Shell-style patterns of layers of the source to leave out, e.g. those of a head
            of one's own.

    Returns:
        What was loaded and what was not.

    Raises:
        TypeError: If `model` is no Keras model or `ignore` no sequence of patterns.
        ValueError: If the EfficientNet is nested inside `model`, or `model` has no weights.
        WeightsFileError: If the file cannot be read.
        WeightsMismatchError: If anything is missing, unexpected or misshapen; lists all of it.
    """
    if isinstance(ignore, str):
        raise TypeError(f"`ignore` takes a sequence of patterns. Received: {ignore!r}")
    targets = _target_variables(model)
    stored = source if isinstance(source, StoredWeights) else read_weights(source)
    weights = _named_for(model, targets, stored)

    ignored = [name for name in weights if any(fnmatchcase(name, p) for p in ignore)]
    for name in (HEAD, NORMALIZATION):
        if name in weights and name not in targets and name not in ignored:
            ignored.append(name)
    for name in ignored:
        del weights[name]

    skipped_head = _head_problem(targets.get(HEAD), weights.get(HEAD), ignored)
    if skipped_head:
        weights.pop(HEAD, None)
    optional = {HEAD} if skipped_head else set()
    if NORMALIZATION not in weights:
        optional.add(NORMALIZATION)
    kept = [name for name in targets if name not in weights and not _FAMILY.match(name)]
    optional.update(kept)
    wanted = {name: layer for name, layer in targets.items() if name not in optional}

    mended = _mend_normalization(model, weights)
    adapted = _adapt_channels(wanted, weights)
    _check(model, wanted, weights, stored)

    for name, variables in wanted.items():
        for variable_name, variable in variables.items():
            if variable_name in weights[name]:
                variable.assign(weights[name][variable_name])
    finalize_normalization(model)

    if skipped_head and HEAD not in ignored:
        warnings.warn(
            f"The classifier of model {model.name!r} keeps the weights it had: {skipped_head}. "
            f"All other weights come from {stored.origin!r}.",
            UserWarning,
            stacklevel=2,
        )
    return LoadReport(
        origin=stored.origin,
        loaded=tuple(wanted),
        skipped_head=skipped_head,
        adapted_stem=adapted,
        mended_normalization=mended,
        ignored=(*ignored, *stored.outside),
        kept=tuple(kept),
    )


# Names of weighted layers of keras.applications' EfficientNets and of ours.
_FAMILY = re.compile(rf"(stem_|block\d+[^_]+_|top_|{HEAD}$|{NORMALIZATION}$)")

_Targets = dict[str, dict[str, keras.Variable]]
_Weights = dict[str, dict[str, np.ndarray]]


def _target_variables(model: keras.Model) -> _Targets:
    if not isinstance(model, keras.Model):
        raise TypeError(f"`model` must be a Keras model. Received: {type(model).__name__}")
    names = {layer.name for layer in model.layers}
    nested = [layer.name for layer in model.layers if isinstance(layer, keras.Model)]
    if nested and STEM not in names:
        raise ValueError(
            f"Model {model.name!r} contains other models: {nested}. Load into the EfficientNet "
            f"itself: load_weights(model.get_layer({nested[0]!r}), …)."
        )
    targets = {
        _layer_name(layer.name, names): {variable.name: variable for variable in layer.weights}
        for layer in model.layers
        if layer.weights
    }
    if not targets:
        raise ValueError(f"Model {model.name!r} has no weights; build it first.")
    return targets


def _layer_name(name: str, names: Iterable[str]) -> str:
    """Undoes Keras' numbering of `Normalization`, the only weighted layer without a name."""
    numbered = NORMALIZATION not in names and re.fullmatch(rf"{NORMALIZATION}_\d+", name)
    return NORMALIZATION if numbered else name


# Order of the weights of layers that the model may lack, where the file only numbers them.
_ORDER = {HEAD: ("kernel", "bias"), NORMALIZATION: ("mean", "variance", "count")}


def _named_for(model: keras.Model, targets: _Targets, stored: StoredWeights) -> _Weights:
    """The stored weights under the names of the model's layers and variables."""
    if stored.by_counter:
        names = _names_by_counter(model)
    else:
        names = {name: _layer_name(name, stored.layers) for name in stored.layers}
    weights = {}
    for layer, arrays in stored.layers.items():
        layer = names.get(layer, layer)
        order = tuple(targets.get(layer, _ORDER.get(layer, ())))
        weights[layer] = {
            _weight_name(name, order): np.asarray(array) for name, array in arrays.items()
        }
    return weights


def _weight_name(name: str, order: Sequence[str]) -> str:
    if name.isdigit() and int(name) < len(order):
        return order[int(name)]
    # Keras 2 called the kernel of a depthwise convolution otherwise.
    return "kernel" if name == "depthwise_kernel" else name


def _names_by_counter(model: keras.Model) -> dict[str, str]:
    """Keras' own names of a container's layers: the class in snake case, counted from 0."""
    names = {"dense": HEAD}  # For a model without head, whose only dense layer it would be.
    counts: dict[str, int] = {}
    own = {layer.name for layer in model.layers}
    for layer in model.layers:
        kind = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", type(layer).__name__)
        kind = re.sub("([a-z])([A-Z])", r"\1_\2", kind).lower()
        count = counts.get(kind, 0)
        counts[kind] = count + 1
        names[f"{kind}_{count}" if count else kind] = _layer_name(layer.name, own)
    return names


def _head_problem(
    target: Mapping[str, keras.Variable] | None,
    stored: Mapping[str, np.ndarray] | None,
    ignored: Sequence[str],
) -> str | None:
    """Why the model's classifier cannot have weights from the file, or None if it can."""
    if target is None:
        return None
    if stored is None:
        return "it was to be ignored" if HEAD in ignored else "the file has no classifier"
    kernel = stored.get("kernel")
    if kernel is None or kernel.ndim != 2 or kernel.shape[0] != target["kernel"].shape[0]:
        return None  # Not another number of classes, but another model.
    if kernel.shape[1] == target["kernel"].shape[1]:
        return None
    return f"the model has {target['kernel'].shape[1]} classes, the file {kernel.shape[1]}"


def _mend_normalization(model: keras.Model, weights: _Weights) -> bool:
    variance = weights.get(NORMALIZATION, {}).get("variance")
    if variance is None or variance.shape != (3,):
        return False
    if not np.allclose(variance, IMAGENET_STD, rtol=0, atol=_STD_TOLERANCE):
        return False
    # keras.applications mends these constants in the graph, by a second `Rescaling`.
    factors = [x.scale for x in model.layers if isinstance(x, keras.layers.Rescaling)]
    if any(np.shape(factor) == (3,) and np.allclose(factor, _SECOND) for factor in factors):
        return False
    weights[NORMALIZATION]["variance"] = np.square(variance)
    return True


def _adapt_channels(targets: _Targets, weights: _Weights) -> bool:
    """Adapts weights of 3 input channels to the model's number of channels."""
    kernel = weights.get(STEM, {}).get("kernel")
    if kernel is None or kernel.ndim != 4 or kernel.shape[2] != 3 or STEM not in targets:
        return False
    channels = targets[STEM]["kernel"].shape[2]
    if channels == 3:
        return False
    weights[STEM]["kernel"] = adapt_stem_kernel(kernel, channels)
    statistics = weights.get(NORMALIZATION, {})
    if {"mean", "variance"} <= statistics.keys():
        statistics["mean"], statistics["variance"] = adapt_normalization(
            statistics["mean"], statistics["variance"], channels
        )
    return True


def adapt_stem_kernel(kernel: np.ndarray, channels: int) -> np.ndarray:
    """A stem kernel for RGB images, adapted to another number of input channels.

    Args:
        kernel: Shape (height, width, 3, filters).
        channels: Number of input channels, at least 1.

    Returns:
        Shape (height, width, channels, filters). One channel gets the sum over RGB; otherwise
        channel c gets `kernel[:, :, c % 3] * 3 / channels`. Either keeps the response to an
        image whose channels are equal, exactly where 3 divides `channels`.
    """
    if channels == 1:
        return kernel.sum(axis=2, keepdims=True)
    return kernel[:, :, np.arange(channels) % 3] * kernel.dtype.type(3 / channels)


def adapt_normalization(
    mean: np.ndarray, variance: np.ndarray, channels: int
) -> tuple[np.ndarray, np.ndarray]:
    """RGB statistics, adapted to another number of input channels.

    Args:
        mean: Shape (3,).
        variance: Shape (3,), squared standard deviations.
        channels: Number of input channels, at least 1.

    Returns:
        Mean and variance of shape (channels,): for one channel the mean of the means and the
        square of the mean standard deviation; otherwise those of RGB channel c % 3.
    """
    if channels == 1:
        return mean.mean(keepdims=True), np.square(np.sqrt(variance).mean(keepdims=True))
    order = np.arange(channels) % 3
    return mean[order], variance[order]


def _check(model: keras.Model, targets: _Targets, weights: _Weights, stored: StoredWeights) -> None:
    """Raises WeightsMismatchError unless the weights are exactly those of the targets."""
    expected = {
        f"{layer}/{name}": tuple(variable.shape)
        for layer, variables in targets.items()
        for name, variable in variables.items()
    }
    received = {
        f"{layer}/{name}": array.shape
        for layer, arrays in weights.items()
        for name, array in arrays.items()
    }
    # A number that Keras keeps for old files alone, in shapes that changed, and never reads.
    count = f"{NORMALIZATION}/count"
    if count in expected and expected[count] != received.get(count):
        del expected[count]
        received.pop(count, None)
        weights.get(NORMALIZATION, {}).pop("count", None)

    missing = [name for name in expected if name not in received]
    unexpected = [name for name in received if name not in expected]
    misshapen = [
        f"{name} (model {shape}, file {received[name]})"
        for name, shape in expected.items()
        if name in received and received[name] != shape
    ]
    if not (missing or unexpected or misshapen):
        return

    lines = [
        f"The weights of {stored.origin!r} do not fit model {model.name!r}; nothing was loaded.",
        *listed("Missing in the file", missing),
        *listed("Unexpected, not in the model", unexpected),
        *listed("Misshapen", misshapen),
    ]
    variant = None if stored.by_counter else _variant_of(weights)
    if stored.by_counter:
        lines.append(
            "The file holds no layer names, so its layers were counted by class; it fits the "
            "same variant with the same blocks alone."
        )
    elif variant and variant.name != model.name:
        lines.append(f"The file fits {variant.constructor}: build that, or take its own file.")
    elif unexpected and not missing and not misshapen:
        lines.append("Leave layers of your own out with `ignore=[…]` (patterns of layer names).")
    else:
        lines.append(
            "Build the model with the arguments with which the file's model was built (variant, "
            "squeeze-and-excite, input channels)."
        )
    raise WeightsMismatchError("\n".join(lines))


def listed(title: str, items: Sequence[str]) -> list[str]:
    """A line of an error message that counts items and spells out the first; none for none."""
    if not items:
        return []
    more = f", … and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
    return [f"{title} ({len(items)}): {', '.join(items[:_LISTED])}{more}"]


def variant_of(stored: StoredWeights) -> ModelSpec | None:
    """The variant of the table whose layers a file of Keras has, or None."""
    return None if stored.by_counter else _variant_of(stored.layers)


def _variant_of(weights: Mapping[str, Mapping[str, np.ndarray]]) -> ModelSpec | None:
    """The variant of the table that has these convolutions in these widths, or None."""
    kernels = {
        name: kernel
        for name, arrays in weights.items()
        if _FAMILY.match(name) and (kernel := _kernel(arrays)) is not None and kernel.ndim == 4
    }
    kernels.pop(HEAD, None)

    def fits(spec: ModelSpec) -> bool:
        planned = {conv.name: conv for conv in resolve(spec).convolutions}
        planned.pop(HEAD)
        return kernels.keys() == planned.keys() and all(
            conv.output_filters in kernels[name].shape[-2:] for name, conv in planned.items()
        )

    return next(filter(fits, SPECS.values()), None)


def _kernel(arrays: Mapping[str, np.ndarray] | None) -> np.ndarray | None:
    """The kernel of a layer, by its name or, where weights are numbered, by being the first."""
    arrays = arrays or {}
    return arrays.get("kernel", arrays.get("0"))
