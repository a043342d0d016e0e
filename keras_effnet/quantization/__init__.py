"""Quantization to 8-bit integers: calibrate, correct, train, analyze."""

from .analysis import Analysis, analyze, fewest_float_layers
from .distillation import Distillation, DistillationConfig, distill
from .lowering import is_quantized
from .quantize import CORRECTIONS, QuantizationConfig, quantize_model
from .ranges_file import load_calibration, save_calibration
from .training import FreezeBatchNorms, FreezeRanges, settle

__all__ = [
    "CORRECTIONS",
    "Analysis",
    "Distillation",
    "DistillationConfig",
    "FreezeBatchNorms",
    "FreezeRanges",
    "QuantizationConfig",
    "analyze",
    "distill",
    "fewest_float_layers",
    "is_quantized",
    "load_calibration",
    "quantize_model",
    "save_calibration",
    "settle",
]
