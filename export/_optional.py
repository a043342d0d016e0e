"""The optional dependencies of this room, imported in one place."""

from __future__ import annotations

import importlib
from types import ModuleType

_HINT = 'Install it with: pip install "keras-effnet[tflite]"'


def import_tensorflow() -> ModuleType:
    """Imports TensorFlow, whose converter writes TFLite files.

    Raises:
        ImportError: If it is not installed; the message says how to install it.
    """
    return _import("tensorflow", "tensorflow", "convert a model to TFLite")


def import_litert() -> ModuleType:
    """Imports LiteRT's interpreter module, which runs TFLite files.

    Raises:
        ImportError: If it is not installed; the message says how to install it.
    """
    return _import("ai_edge_litert.interpreter", "ai-edge-litert", "run TFLite files")


def import_tflite_schema() -> ModuleType:
    """Imports the generated reader of the TFLite file format, which is part of LiteRT.

    Raises:
        ImportError: If it is not installed; the message says how to install it.
    """
    return _import("ai_edge_litert.schema_py_generated", "ai-edge-litert", "read TFLite files")


def _import(module: str, package: str, purpose: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"`{package}` is needed to {purpose} ({error}). {_HINT}") from error
