"""Files that are written whole or not at all."""

import contextlib
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

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
