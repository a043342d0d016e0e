"""What all tests share."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from keras_effnet.cli.common import keep_freed_memory

# Read by TensorFlow when it is first imported.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
keep_freed_memory()

_SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """`shared("weights/x.h5")`: a path in the folder of real photographs and trained weights.

    It stands beside the repository. Without it the test is skipped, on the continuous
    integration it fails.
    """

    def find(path: str) -> Path:
        found = _SHARED / path
        if not found.exists():
            message = f"needs {found}, which is no part of the repository"
            if os.environ.get("CI"):
                pytest.fail(message)
            pytest.skip(message)
        return found

    return find
