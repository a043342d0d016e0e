"""Writing files whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from pathlib import Path


def check_target(path: str | os.PathLike, *, overwrite: bool = False) -> Path:
    """Checks that a file can be written, before long work starts.

    Args:
        path: The file to be written.
        overwrite: Whether an existing file may be replaced.

    Returns:
        The path.

    Raises:
        FileNotFoundError: If its folder does not exist.
        IsADirectoryError: If the path is a folder.
        FileExistsError: If the file exists and `overwrite` is False.
        PermissionError: If the folder cannot be written.
        OSError: If writing there fails for another reason, such as a read-only file system.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"A file name is needed, but {str(path)!r} is a folder.")
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"There is no folder {str(path.parent)!r} to write {path.name!r} into. Create it first."
        )
    if path.exists() and not overwrite:
        raise FileExistsError(
            f"{str(path)!r} exists. Choose another name, or allow it to be replaced "
            "(overwrite=True, on the command line --overwrite)."
        )
    # Permission bits say little (read-only mounts, network shares, root): only trying tells.
    temporary = _temporary_name(path)
    with _explained(path), _removed_at_the_end(temporary):
        temporary.touch(exist_ok=False)
    return path


def write_whole(path: str | os.PathLike, data: bytes, *, overwrite: bool = False) -> Path:
    """Writes a file under a temporary name in the same folder, then renames it.

    Whatever goes wrong, or interrupts it, leaves neither a part of the file nor the temporary
    one, and an existing file as it was.

    Args:
        path: The file to write.
        data: Its content.
        overwrite: Whether an existing file may be replaced.

    Returns:
        The path.

    Raises:
        OSError: As `check_target`, and if the disk is full; the message names the file.
    """
    path = check_target(path, overwrite=overwrite)
    temporary = _temporary_name(path)
    with _explained(path, size=len(data)), _removed_at_the_end(temporary):
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    return path


def _temporary_name(path: Path) -> Path:
    return path.with_name(f".{path.name[:100]}.{uuid.uuid4().hex[:8]}.part")


@contextlib.contextmanager
def _removed_at_the_end(temporary: Path):
    """Removes a temporary file if it is still there, also when Ctrl-C comes in between."""
    try:
        yield
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _explained(path: Path, size: int | None = None):
    """Turns an operating system's error into one that names the file and what was tried."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "the disk is full" if full else error.strerror or str(error)
        amount = "" if size is None else f" ({size:,} bytes)"
        raise type(error)(
            error.errno, f"Cannot write {str(path)!r}{amount}: {reason}. Nothing was written"
        ) from error
