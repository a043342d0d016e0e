"""Files that are written whole or not at all."""

import contextlib
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

_FACTS = "position"
# Beginning of the temporary names, by which what a killed process left can be told.
PART = ".part-"


@contextlib.contextmanager
def whole(path: str | os.PathLike) -> Iterator[Path]:
    """Gives a temporary name in the same folder, and renames it when the block succeeds.

    A file under the real name is complete, whatever ends the process: its content is on the disk
    before it gets that name.

    Args:
        path: The file to write or replace.

    Yields:
        The path to write to; it has the same ending.
    """
    path = Path(path)
    temporary = path.with_name(f"{PART}{uuid.uuid4().hex[:8]}-{path.name}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | os.PathLike, data: dict) -> None:
    """Writes a dictionary as a JSON file."""
    text = json.dumps(data, indent=2, allow_nan=False) + "\n"
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_state(path: str | os.PathLike, arrays: list[np.ndarray], facts: dict[str, Any]) -> None:
    """Writes a checkpoint: arrays in order, and JSON data, in one file.

    There is one file, so that its parts always belong together.

    Args:
        path: The file to write or replace.
        arrays: Of any shapes and dtypes.
        facts: What else belongs to the state.

    Raises:
        OSError: If it cannot be written; an earlier checkpoint is left as it was.
    """
    named = {f"{index:05}": array for index, array in enumerate(arrays)}
    named[_FACTS] = np.array(json.dumps(facts))
    with whole(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **named)


def read_state(path: str | os.PathLike) -> tuple[list[np.ndarray], dict[str, Any]]:
    """Reads what `write_state` wrote.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no checkpoint.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no checkpoint {str(path)!r} to resume from.")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
    except Exception as error:  # A broken archive can fail anywhere inside zipfile.
        raise ValueError(f"{str(path)!r} is no checkpoint: {error}") from error
    if _FACTS not in arrays:
        raise ValueError(f"{str(path)!r} is no checkpoint: it holds no position.")
    facts = json.loads(str(arrays.pop(_FACTS)))
    return [arrays[name] for name in sorted(arrays)], facts
