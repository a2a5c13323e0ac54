"""The `ctfp8::` operators (`operators`), the arithmetic they are made of (`fp8`), and their CPU kernels (`cpu`)."""

from .embedding import Table, embedding, embedding_steps
from .fp8 import (
    AMAX_MIN,
    FP8,
    FP8_MAX,
    Do,
    apply,
    cached_steps,
    dequantize_plainly,
    dequantize_reference,
    expand_scale,
    exponent_steps,
    quantize_mx_steps,
    quantize_per_group_steps,
    quantize_per_tensor_steps,
    quantize_per_token_steps,
)
from .operators import DEQUANTIZED
from .rotation import ROTATE, rotate_steps
from .scales import BY_ROW, SWIZZLED, TRANSPOSED, UNSWIZZLED, swizzle_steps, unswizzle_steps

__all__ = [
    "AMAX_MIN",
    "BY_ROW",
    "DEQUANTIZED",
    "FP8",
    "FP8_MAX",
    "ROTATE",
    "SWIZZLED",
    "TRANSPOSED",
    "UNSWIZZLED",
    "Do",
    "Table",
    "apply",
    "cached_steps",
    "dequantize_plainly",
    "dequantize_reference",
    "embedding",
    "embedding_steps",
    "expand_scale",
    "exponent_steps",
    "quantize_mx_steps",
    "quantize_per_group_steps",
    "quantize_per_tensor_steps",
    "quantize_per_token_steps",
    "rotate_steps",
    "swizzle_steps",
    "unswizzle_steps",
]
