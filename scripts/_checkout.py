"""Lets the scripts of a checkout run without being installed."""

import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(_ROOT))

import keras_effnet  # noqa: E402

# `export/` stands at the top level and is installed as `keras_effnet.export`.
keras_effnet.__path__.append(str(_ROOT))
