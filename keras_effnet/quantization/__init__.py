"""Quantization to 8-bit integers: calibrate, correct, analyze."""

from .lowering import is_quantized
from .quantize import CORRECTIONS, QuantizationConfig, quantize_model

__all__ = ["CORRECTIONS", "QuantizationConfig", "is_quantized", "quantize_model"]
