"""XPU: weight-only on today's GPUs, whose matrix units have no FP8; on others linears run as `aten._scaled_mm`."""

from __future__ import annotations

from . import scaled_mm, weight_only
from .kernel import Kernel

KERNELS: tuple[Kernel, ...] = (*scaled_mm.linear(fast_accum=False), weight_only.KERNEL)
