"""Exported files: written from Keras models, run, verified and reported.

`to_tflite` writes a file, `TFLiteRunner` runs it, `read_tflite` tells what stands in it,
`compare` measures it against the Keras model, `ExportReport` holds the outcome. TensorFlow and
LiteRT are loaded when they are needed: `pip install "keras-effnet[tflite]"`.
"""

from .report import ExportReport, write_report
from .runner import TFLiteRunner
from .tflite_file import TensorInfo, TFLiteFile, read_tflite
from .to_tflite import TFLiteExport, to_tflite
from .verify import Scores, compare

__all__ = [
    "ExportReport",
    "Scores",
    "TFLiteExport",
    "TFLiteFile",
    "TFLiteRunner",
    "TensorInfo",
    "compare",
    "read_tflite",
    "to_tflite",
    "write_report",
]
