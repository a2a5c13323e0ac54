"""CPU: activations are not quantized; the weight is dequantized inside the matmul (W8A16) by a fused C++ kernel.

The kernel is built on first use (`cpu_kernels`). Where it cannot be, graphs are expanded to ATen, which is right but slow,
and the reason is said once.
"""

from __future__ import annotations

import functools
import warnings

import torch
from torch import fx

from .. import ops
from ..graph import call
from ..ops import cpu as cpu_kernels
from ..target import Target
from .kernel import MATMULS, SCALINGS, Operands, Problem, ScaleLayout, Verdict, no

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@functools.cache
def unavailable() -> str | None:
    """Builds and loads the fused kernel if need be; the sentence why there is none, or None."""
    try:
        cpu_kernels.load()
    except cpu_kernels.KernelBuildError as error:
        warnings.warn(f"FP8 weights will be dequantized by slow generic code: {error}", stacklevel=2)
        return f"the fused CPU kernel could not be built: {str(error).splitlines()[0]}"
    return None


class FusedDequantizeMatmul:
    """`x @ dequantize(weight).T` in one pass over the FP8 weight."""

    library = "auto"
    kinds = MATMULS
    scalings = SCALINGS
    lowers = ()
    scale_layout: ScaleLayout = ""
    note = ""

    @property
    def name(self) -> str:
        """With the instruction set in use, such as `fused dequantize-matmul (avx512-bf16)`."""
        return f"fused dequantize-matmul ({cpu_kernels.isa() if cpu_kernels.loaded() else 'reference'})"

    def supports(self, problem: Problem, target: Target) -> Verdict:
        if problem.x_dtype not in _DTYPES:
            return no(f"the fused CPU kernel takes bfloat16, float16 and float32 activations, not {problem.x_dtype}")
        return Verdict(unavailable() or "")

    def preferred(self, problem: Problem, target: Target) -> bool:
        return False

    def emit(self, graph: fx.Graph, problem: Problem, operands: Operands, like: fx.Node) -> fx.Node:
        of_kind = {"linear": operands.bias, "grouped_mm": operands.offs, "gathered_mm": operands.expert_ids}
        args = (operands.x, operands.weight, operands.weight_scale, of_kind[problem.kind], list(problem.block))
        return call(graph, ops.DEQUANTIZED[problem.kind], *args, like=like)

    def lower(self, graph: fx.Graph, node: fx.Node) -> fx.Node:
        return node

    def fingerprint(self) -> str:
        return unavailable() or cpu_kernels.isa()


def attention(dtype: torch.dtype) -> Verdict:
    """Whether the fused attention takes queries of this dtype."""
    if dtype not in _DTYPES:
        return no(f"the fused attention takes bfloat16, float16 and float32 queries, not {dtype}")
    return Verdict(unavailable() or "")


def has_streaming_gemv(dtype: torch.dtype) -> bool:
    """Whether `ctfp8.linear` is faster than torch's for a few rows of this dtype and a weight that no cache holds."""
    return dtype == torch.bfloat16 and unavailable() is None and bool(torch.ops.ctfp8_cpu.has_streaming_gemv())


KERNELS = (FusedDequantizeMatmul(),)
