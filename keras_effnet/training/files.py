"""Files of a run, each written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

_PART = ".part-"


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Gives a temporary name in the same folder, and renames it when the block succeeds.

    A file under the real name is complete, whatever ends the process: its content is on the disk
    before it gets that name.

    Args:
        path: The file to write or replace.

    Yields:
        The path to write to; it has the same ending.
    """
    temporary = path.with_name(f"{_PART}{uuid.uuid4().hex[:8]}-{path.name}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_parts(folder: Path) -> None:
    """Removes what a killed process left half-written."""
    for path in folder.glob(f"{_PART}*"):
        path.unlink(missing_ok=True)
