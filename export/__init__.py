"""Exported files: written from Keras models, run, verified and reported.

`to_tflite` writes a file, `TFLiteRunner` runs it, `read_tflite` tells what stands in it; so do
`to_onnx`, `ONNXRunner` and `read_onnx` for ONNX. `compare` measures a file against the Keras
model, `ExportReport` holds the outcome. `check_file` judges a TFLite file by the device that it
is for, `ModelMetadata` is what a file tells of itself. Converters and runtimes are loaded when
they are needed: `pip install "keras-effnet[tflite]"` or `"keras-effnet[onnx]"`.
"""

from .check import TargetReport, check_file
from .metadata import ModelMetadata, add_metadata, read_metadata
from .onnx_file import ONNXFile, OptimizedGraph, optimized, read_onnx
from .onnx_runner import ONNXRunner
from .report import ExportReport, write_report
from .runner import TFLiteRunner
from .tflite_file import TensorInfo, TFLiteFile, read_tflite
from .to_onnx import ONNXExport, to_onnx
from .to_tflite import TFLiteExport, to_tflite
from .verify import Scores, compare

__all__ = [
    "ExportReport",
    "ModelMetadata",
    "ONNXExport",
    "ONNXFile",
    "ONNXRunner",
    "OptimizedGraph",
    "Scores",
    "TFLiteExport",
    "TFLiteFile",
    "TFLiteRunner",
    "TargetReport",
    "TensorInfo",
    "add_metadata",
    "check_file",
    "compare",
    "optimized",
    "read_metadata",
    "read_onnx",
    "read_tflite",
    "to_onnx",
    "to_tflite",
    "write_report",
]
