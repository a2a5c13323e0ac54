"""XPU: activations are quantized, linears run as `aten._scaled_mm`; experts are weight-only until torch has a grouped one."""

from __future__ import annotations

from . import scaled_mm, weight_only
from .kernel import Kernel

KERNELS: tuple[Kernel, ...] = (scaled_mm.linear(fast_accum=False), weight_only.KERNEL)
