"""torch's own scaled matmuls, `aten._scaled_mm` and `aten._scaled_grouped_mm`, for CUDA and XPU.

    aten._scaled_mm(x [M, K] fp8, weight.t() [K, N] fp8 column-major, scale_a, scale_b, bias, …, out_dtype)

with `scale_a` `[M, 1]` and `scale_b` `[1, N]`, both float32. These rowwise kernels write bfloat16.
"""

from __future__ import annotations

import torch
from torch import fx

from .. import ops
from ..graph import value
from ..target import Target
from .kernel import Problem
from .scaled import Scaled, ScaledKernel, multiples_of, row_scales, token_scales

aten = torch.ops.aten
_convert = torch.ops.prims.convert_element_type.default


def _linear(problem: Problem, target: Target) -> str | None:
    if target.capability == (8, 9) and _torch_version() < (2, 12):
        return f"aten._scaled_mm on sm89 needs torch 2.12 or later, not {torch.__version__}"
    return multiples_of(16, problem)


def _grouped(problem: Problem, target: Target) -> str | None:
    if target.capability != (9, 0):
        return f"aten._scaled_grouped_mm is for cuda:sm90, not {target}"
    return multiples_of(16, problem)


def _torch_version() -> tuple[int, int]:
    major, minor, *_ = torch.__version__.split(".")
    return int(major), int(minor)


def _build_linear(do: ops.Do, s: Scaled) -> fx.Node:
    weight = do(aten.permute.default, s.weight, [1, 0])
    scale_a, scale_b = token_scales(do, s, [-1, 1]), row_scales(do, s, [1, value(s.weight).shape[0]])
    fused, rest = split_bias(s)
    out = do(aten._scaled_mm.default, s.x, weight, scale_a, scale_b, fused, None, torch.bfloat16, True)
    return finish(do, s, out, rest)


def split_bias(s: Scaled) -> tuple[fx.Node | None, fx.Node | None]:
    """The bias as `(in the kernel, after it)`: not in a kernel that writes bfloat16 where the model's dtype holds more."""
    exact = s.extra is not None and value(s.extra).dtype == s.out_dtype == torch.bfloat16
    return (s.extra, None) if exact else (None, s.extra)


def finish(do: ops.Do, s: Scaled, out: fx.Node, bias: fx.Node | None = None) -> fx.Node:
    """The kernel's bfloat16 result in the model's dtype, and a bias that the kernel did not take."""
    if s.out_dtype != torch.bfloat16:
        out = do(_convert, out, s.out_dtype)
    return out if bias is None else do(aten.add.Tensor, out, do(_convert, bias, s.out_dtype))


def _build_grouped(do: ops.Do, s: Scaled) -> fx.Node:
    experts, rows, _ = value(s.weight).shape
    weight = do(aten.permute.default, s.weight, [0, 2, 1])
    scale_a, scale_b = token_scales(do, s, [-1]), row_scales(do, s, [experts, rows])
    offs = s.extra if value(s.extra).dtype == torch.int32 else do(_convert, s.extra, torch.int32)
    arguments = (s.x, weight, scale_a, scale_b, offs, None, None, torch.bfloat16, True)
    return finish(do, s, do(aten._scaled_grouped_mm.default, *arguments))


LINEAR = ScaledKernel("aten._scaled_mm", "scaled_mm", ("linear",), ("rowwise",), _linear, _build_linear)
GROUPED = ScaledKernel(
    "aten._scaled_grouped_mm", "scaled_mm", ("grouped_mm", "gathered_mm"), ("rowwise",), _grouped, _build_grouped
)
