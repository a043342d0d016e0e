"""Checkpoints of other libraries as named tensors, read without executing anything in them.

A file is told by its content, never by its extension. TensorFlow, PyTorch and safetensors are
imported when a file of theirs is opened.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import pickle
import re
import shutil
import tarfile
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..weights import WeightsFileError

FORMATS = ("keras", "tensorflow", "pytorch", "safetensors")

# Of a whole training state, where the weights may stand; the averaged ones come first.
_AVERAGED = ("state_dict_ema", "model_ema")
_WEIGHTS = ("state_dict", "model")


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a file.

    Args:
        origin: The file, for messages.
        format: `"tensorflow"`, `"pytorch"` or `"safetensors"`.
        shapes: Name to shape of every tensor.
        dtypes: Name to the name of its type, such as `"float32"`.
        read: Returns a tensor by its name.
        config: What a `config.json` beside the file says, as timm's repositories have it.
    """

    origin: str
    format: str
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    read: Callable[[str], np.ndarray]
    config: Mapping[str, Any] = field(default_factory=dict)


def format_of(path: Path) -> str:
    """Format of a file, one of `FORMATS`.

    Raises:
        FileNotFoundError: If there is no such file or checkpoint.
        WeightsFileError: If it is none of these.
    """
    if path.is_dir() or _index(path).is_file():
        return "tensorflow"
    if not path.is_file():
        raise FileNotFoundError(f"There is no file, folder or TensorFlow checkpoint {str(path)!r}.")
    with path.open("rb") as file:
        start = file.read(16)
    if start[:2] == b"\x1f\x8b" or path.suffix == ".index" or ".data-0000" in path.name:
        return "tensorflow"
    if start.startswith(b"\x89HDF\r\n\x1a\n"):
        return "keras"
    if start.startswith(b"PK"):
        return "keras" if _is_keras_archive(path) else "pytorch"
    if start[:1] == b"\x80":
        return "pytorch"
    if start[8:9] == b"{":
        return "safetensors"
    raise WeightsFileError(
        f"{str(path)!r} is no weights file that can be converted: neither a TensorFlow checkpoint "
        "(or its .tar.gz), nor of Keras (.h5, .weights.h5, .keras), nor of PyTorch (.pth, .pt, "
        f".bin, .safetensors). Received: {path.stat().st_size} bytes beginning with {start!r}"
    )


def _is_keras_archive(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return "model.weights.h5" in archive.namelist()
    except zipfile.BadZipFile as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: BaseException) -> WeightsFileError:
    size = f" ({path.stat().st_size} bytes)" if path.is_file() else ""
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return WeightsFileError(
        f"{str(path)!r}{size} is damaged or incomplete: {reason}. Copy or download it again."
    )


@contextlib.contextmanager
def open_checkpoint(path: Path, format: str, ema: bool) -> Iterator[Checkpoint]:
    """Opens a file of another library; its tensors can be read inside the `with` block.

    Args:
        path: The file. Of a TensorFlow checkpoint: its common prefix, one of its files, the folder
            that holds it, or the `.tar.gz` of the official repositories.
        format: From `format_of`.
        ema: Whether averaged weights are preferred where a PyTorch file holds both.

    Raises:
        ImportError: If the library that reads it is not installed.
        WeightsFileError: If it is damaged, holds several checkpoints, or code.
    """
    if format == "tensorflow":
        with _unpacked(path) as folder:
            yield _open_tensorflow(_prefix(folder), str(path))
    elif format == "safetensors":
        with _open_safetensors(path) as checkpoint:
            yield checkpoint
    else:
        yield _open_pytorch(path, ema)


# --- TensorFlow -------------------------------------------------------------------------------


def _index(path: Path) -> Path:
    return path.with_name(path.name + ".index")


@contextlib.contextmanager
def _unpacked(path: Path) -> Iterator[Path]:
    """The path itself, or a temporary folder with the checkpoint out of an archive."""
    if not path.is_file() or path.suffix == ".index" or ".data-0000" in path.name:
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            with tarfile.open(path) as archive:
                for member in archive:
                    name = Path(member.name).name
                    wanted = re.search(r"\.index$|\.data-\d+-of-\d+$", name)
                    # macOS puts `._name` beside every file.
                    if not (wanted and member.isfile()) or name.startswith("._"):
                        continue
                    with open(Path(folder) / name, "wb") as file:
                        shutil.copyfileobj(archive.extractfile(member), file)
        except (tarfile.TarError, EOFError, OSError, gzip.BadGzipFile, zlib.error) as error:
            raise _damaged(path, error) from None
        yield Path(folder)


def _prefix(path: Path) -> Path:
    """The common prefix of a checkpoint's files."""
    if _index(path).is_file():
        return path
    if path.is_dir():
        found = sorted(path.glob("*.index"))
        if len(found) != 1:
            raise WeightsFileError(
                f"{str(path)!r} holds {len(found) or 'no'} TensorFlow checkpoints"
                f"{': ' if found else ''}{', '.join(file.stem for file in found)}. "
                "Give the prefix of one, such as 'folder/model.ckpt'."
            )
        return found[0].with_suffix("")
    prefix = re.sub(r"\.index$|\.data-\d+-of-\d+$", "", path.name)
    prefix = path.with_name(prefix)
    if not _index(prefix).is_file():
        raise WeightsFileError(f"The TensorFlow checkpoint {str(prefix)!r} has no .index file.")
    return prefix


def _open_tensorflow(prefix: Path, origin: str) -> Checkpoint:
    try:
        import tensorflow as tf
    except ImportError as error:
        raise ImportError(
            f"`tensorflow` is needed to read TensorFlow checkpoints ({error}). "
            "Install it with: pip install tensorflow"
        ) from error
    # `get_tensor` turns what the reader reports into these.
    damage = (tf.errors.OpError, ValueError, RuntimeError, IndexError, KeyError)
    try:
        reader = tf.train.load_checkpoint(str(prefix))
        shapes = reader.get_variable_to_shape_map()
        dtypes = {name: dtype.name for name, dtype in reader.get_variable_to_dtype_map().items()}
    except damage as error:
        raise _damaged(Path(origin), error) from None
    if any("/.ATTRIBUTES/" in name for name in shapes):
        raise WeightsFileError(
            f"{origin!r} is an object-based TensorFlow checkpoint (of tf.train.Checkpoint or "
            "Keras 2), whose names are those of somebody's Python attributes. Load it in the code "
            "that wrote it and save the weights as .h5; the official repositories' checkpoints "
            "hold variable names."
        )

    def read(name: str) -> np.ndarray:
        try:
            return reader.get_tensor(name)
        except damage as error:
            raise _damaged(Path(origin), error) from None

    return Checkpoint(
        origin, "tensorflow", {name: tuple(shape) for name, shape in shapes.items()}, dtypes, read
    )


# --- PyTorch ----------------------------------------------------------------------------------


def _config(path: Path) -> Mapping[str, Any]:
    """A `config.json` beside the file, or nothing."""
    try:
        config = json.loads(path.with_name("config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


@contextlib.contextmanager
def _open_safetensors(path: Path) -> Iterator[Checkpoint]:
    try:
        import safetensors
    except ImportError as error:
        raise ImportError(
            f"`safetensors` is needed to read {path.name!r} ({error}). "
            'Install it with: pip install "keras-effnet[convert]"'
        ) from error
    try:
        opened = safetensors.safe_open(str(path), framework="np")
    except (safetensors.SafetensorError, OSError) as error:
        raise _damaged(path, error) from None
    with opened as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, no mapping

        def read(name: str) -> np.ndarray:
            if slices[name].get_dtype() == "BF16":
                return _bfloat16(path, name)
            return file.get_tensor(name)

        yield Checkpoint(
            str(path),
            "safetensors",
            {name: tuple(value.get_shape()) for name, value in slices.items()},
            {
                name: _SAFETENSORS.get(value.get_dtype(), value.get_dtype())
                for name, value in slices.items()
            },
            read,
            _config(path),
        )


_SAFETENSORS = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I8": "int8",
    "U8": "uint8",
}


def _bfloat16(path: Path, name: str) -> np.ndarray:
    """A bfloat16 tensor as float32, of which it is the upper half; NumPy has no such type."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(length))[name]
        begin, end = entry["data_offsets"]
        file.seek(8 + length + begin)
        upper = np.frombuffer(file.read(end - begin), "<u2").astype(np.uint32)
    return (upper << 16).view(np.float32).reshape(entry["shape"])


def _open_pytorch(path: Path, ema: bool) -> Checkpoint:
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"`torch` is needed to read the PyTorch file {path.name!r} ({error}). Install it with: "
            "pip install torch, or get the same weights as .safetensors."
        ) from error
    try:
        # Only tensors and plain containers: anything else in the pickle is refused, not run. A
        # zip is mapped, so that what is not read takes no memory.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # What it finds odd and cannot read, it refuses anyway.
            loaded = torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path) or None
            )
    except pickle.UnpicklingError as error:
        name = re.search(r"Unsupported (?:global|class|operand)[^\n]*|GLOBAL [\w.]+", str(error))
        raise WeightsFileError(
            f"{str(path)!r} is refused: its pickle holds more than tensors"
            f"{f' ({name[0]})' if name else ''}, and loading that would execute code from the "
            "file. If you trust it, load it in PyTorch and save its weights alone: "
            "torch.save(model.state_dict(), …), or as .safetensors."
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise _damaged(path, error) from None
    state = _state_dict(loaded, torch, path, ema)

    def read(name: str) -> np.ndarray:
        tensor = state[name]
        floating = tensor.is_floating_point() and tensor.dtype != torch.float64
        return (tensor.to(torch.float32) if floating else tensor).numpy()

    return Checkpoint(
        str(path),
        "pytorch",
        {name: tuple(tensor.shape) for name, tensor in state.items()},
        {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in state.items()},
        read,
        _config(path),
    )


def _state_dict(loaded: Any, torch: Any, path: Path, ema: bool) -> dict[str, Any]:
    """The weights in what a file holds: they are it, or one entry of a training state."""

    def is_state(value: Any) -> bool:
        return (
            isinstance(value, Mapping)
            and len(value) > 0
            and all(isinstance(tensor, torch.Tensor) for tensor in value.values())
        )

    if is_state(loaded):
        return dict(loaded)
    if isinstance(loaded, Mapping):
        for key in (*_AVERAGED, *_WEIGHTS) if ema else (*_WEIGHTS, *_AVERAGED):
            if is_state(loaded.get(key)):
                return dict(loaded[key])
    found = list(loaded)[:10] if isinstance(loaded, Mapping) else type(loaded).__name__
    raise WeightsFileError(
        f"{str(path)!r} holds no state dict (names to tensors), neither as a whole nor under "
        f"{(*_AVERAGED, *_WEIGHTS)}. Received: {found}"
    )
