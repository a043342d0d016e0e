"""JSON files that are written whole or not at all."""

import json
import os
import uuid
from pathlib import Path


def write_json(path: str | os.PathLike, data: dict) -> None:
    """Writes a dictionary as a JSON file, under a temporary name and then renamed."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    text = json.dumps(data, indent=2, allow_nan=False) + "\n"
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
