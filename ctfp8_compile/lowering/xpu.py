"""XPU: activations are quantized, linears run as `aten._scaled_mm`; experts stay dequantized until torch has a grouped one."""

from __future__ import annotations

from . import scaled_mm

KERNELS = (scaled_mm.linear(fast_accum=False),)
