"""Quantization to 8-bit integers: calibrate, correct, analyze."""

from .lowering import is_quantized
from .quantize import QuantizationConfig, quantize_model

__all__ = ["QuantizationConfig", "is_quantized", "quantize_model"]
