"""What the benchmarks share: the package that they measure, the machine, results written whole.

Importing this makes `keras_effnet` that of this checkout, whatever is installed.
"""

from __future__ import annotations

import os
import platform
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# Real photographs and trained weights, beside the repository.
SHARED = ROOT.parent / "shared"

sys.path.insert(0, str(ROOT / "scripts"))
import _checkout  # noqa: E402, F401


def describe_machine(packages: tuple[str, ...]) -> dict:
    """Processor, system and the versions of those packages that are installed."""
    cpu = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    versions = {}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": versions,
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def machine_line(machine: dict) -> str:
    """The description as one line of text."""
    packages = ", ".join(f"{name} {number}" for name, number in machine["packages"].items())
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}; Python "
        f"{machine['python']}, {packages}; {machine['date']}."
    )


def write_whole(path: Path, text: str) -> None:
    """Writes a file under a temporary name and renames it."""
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
