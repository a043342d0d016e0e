"""Quantization to 8-bit integers: calibrate, correct, analyze."""

from .analysis import Analysis, analyze, fewest_float_layers
from .lowering import is_quantized
from .quantize import CORRECTIONS, QuantizationConfig, quantize_model
from .ranges_file import load_calibration, save_calibration

__all__ = [
    "CORRECTIONS",
    "Analysis",
    "QuantizationConfig",
    "analyze",
    "fewest_float_layers",
    "is_quantized",
    "load_calibration",
    "quantize_model",
    "save_calibration",
]
