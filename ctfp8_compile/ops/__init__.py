"""The `ctfp8::` operators (`operators`), the arithmetic they are made of (`fp8`), and their CPU kernels (`cpu`)."""

from .fp8 import (
    AMAX_MIN,
    FP8,
    FP8_MAX,
    Do,
    apply,
    dequantize_reference,
    expand_scale,
    exponent_steps,
    quantize_per_group_steps,
    quantize_per_tensor_steps,
    quantize_per_token_steps,
)
from .operators import DEQUANTIZED

__all__ = [
    "AMAX_MIN",
    "DEQUANTIZED",
    "FP8",
    "FP8_MAX",
    "Do",
    "apply",
    "dequantize_reference",
    "expand_scale",
    "exponent_steps",
    "quantize_per_group_steps",
    "quantize_per_tensor_steps",
    "quantize_per_token_steps",
]
