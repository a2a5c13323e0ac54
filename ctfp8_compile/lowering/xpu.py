"""XPU: activations are quantized, linears run as `aten._scaled_mm`; the weight-only kernel takes what that does not, and experts.

oneDNN multiplies FP8 as float16 on GPUs up to Xe2 (https://github.com/uxlfoundation/oneDNN/pull/2904), so weight-only may be the
faster one there; a report says so.
"""

from __future__ import annotations

from . import scaled_mm, weight_only
from .kernel import Kernel

_FLOAT16 = (
    "oneDNN multiplies FP8 as float16 on Intel GPUs up to Xe2, so quantized activations save no arithmetic there; weight-only, "
    "ctfp8.kernels='triton', may be faster"
)
KERNELS: tuple[Kernel, ...] = (
    *scaled_mm.linear(fast_accum=False, note=_FLOAT16),
    scaled_mm.xpu_blocks(note=_FLOAT16),
    weight_only.KERNEL,
)
