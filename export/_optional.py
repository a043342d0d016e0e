"""The optional dependencies of this room, imported in one place."""

from __future__ import annotations

import importlib
from types import ModuleType


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


def import_onnx() -> ModuleType:
    """Imports the library of the ONNX file format.

    Raises:
        ImportError: If it is not installed; the message says how to install it.
    """
    return _import("onnx", "onnx", "write or read ONNX files", "onnx")


def import_tf2onnx() -> ModuleType:
    """Imports the converter from TensorFlow graphs to ONNX.

    Raises:
        ImportError: If it is not installed; the message says how to install it.
    """
    return _import("tf2onnx", "tf2onnx", "convert a float model to ONNX", "onnx")


def import_onnxruntime() -> ModuleType:
    """Imports onnxruntime, which runs ONNX files.

    Raises:
        ImportError: If it is not installed; the message says how to install it.
    """
    return _import("onnxruntime", "onnxruntime", "run ONNX files", "onnx")


def _import(module: str, package: str, purpose: str, extra: str = "tflite") -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"`{package}` is needed to {purpose} ({error}). "
            f'Install it with: pip install "keras-effnet[{extra}]"'
        ) from error
