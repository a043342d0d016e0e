"""The folder of a run: what it was told, so that it is resumed as it was begun."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from keras_effnet.quantization.files import PART, write_json
from keras_effnet.training.batches import Images
from keras_effnet.training.loop import CHECKPOINT

SETTINGS = "run.json"
_ABSENT = "nothing"
# A refusal lists so many differences and counts the others.
_LISTED = 12


def open_folder(
    path: Path, settings: dict[str, Any], *, resume: bool = False, overwrite: bool = False
) -> None:
    """Makes the folder of a run, or checks that the run in it can be gone on with.

    Args:
        path: The folder.
        settings: All that the result depends on, as JSON data.
        resume: Whether a run is gone on with.
        overwrite: Whether a run in the folder may be replaced.

    Raises:
        NotADirectoryError: If the path is a file.
        FileNotFoundError: If there is no run to resume.
        FileExistsError: If the folder holds anything, without `resume` or `overwrite`.
        ValueError: If the run to resume has other settings; the message lists the differences.
    """
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"A folder is needed, but {str(path)!r} is a file.")
    # As a file tells them, with lists for tuples.
    settings = json.loads(json.dumps(settings))
    if resume:
        _check_same(path, settings)
        _remove_parts(path)
        return
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        what = "holds a run" if (path / SETTINGS).exists() else "is not empty"
        raise FileExistsError(
            f"The folder {str(path)!r} {what}. Choose another one, or pass --resume to go on with "
            "the run, or --overwrite to replace it."
        )
    path.mkdir(parents=True, exist_ok=True)
    _remove_parts(path)
    # The checkpoint of another run must not be resumed under these settings.
    (path / CHECKPOINT).unlink(missing_ok=True)
    write_json(path / SETTINGS, settings)


def _remove_parts(path: Path) -> None:
    """Removes what a killed process left half-written."""
    for part in path.glob(f"{PART}*"):
        part.unlink(missing_ok=True)


def _check_same(path: Path, settings: dict[str, Any]) -> None:
    file = path / SETTINGS
    if not file.is_file() or not (path / CHECKPOINT).is_file():
        raise FileNotFoundError(
            f"There is no run to resume in {str(path)!r}. Start it without --resume."
        )
    try:
        begun = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(file)!r} is damaged: {error}") from error
    found = differences(begun, settings)
    if found:
        more = f"; and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
        raise ValueError(
            f"The run in {str(path)!r} was begun with other settings: "
            f"{'; '.join(found[:_LISTED])}{more}. Resume it with the same, or start another run in "
            "another folder."
        )


def differences(begun: dict[str, Any], given: dict[str, Any]) -> list[str]:
    """What differs between two settings.

    Args:
        begun: JSON data.
        given: The same.

    Returns:
        One text for each value, such as `"config.batch_size was 32, now 16"`.
    """
    before, now = dict(_flat(begun)), dict(_flat(given))
    return [
        f"{key} was {before.get(key, _ABSENT)!r}, now {now.get(key, _ABSENT)!r}"
        for key in {**before, **now}
        if before.get(key, _ABSENT) != now.get(key, _ABSENT)
    ]


def _flat(value: Any, key: str = ""):
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else None
    )
    if items is None:
        yield key, value
        return
    for name, part in items:
        yield from _flat(part, f"{key}.{name}" if key else str(name))


def fingerprint(images: Images) -> dict[str, Any]:
    """What tells one set of images from another: number, and a hash of names and labels."""
    digest = hashlib.sha256()
    for number, label in enumerate(images.labels):
        digest.update(f"{images.name(number)}\t{label}\n".encode())
    return {"images": len(images), "sha256": digest.hexdigest()}
