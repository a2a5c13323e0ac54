"""CPU: activations are not quantized; the weight is dequantized inside the matmul (W8A16) where a fused kernel is built."""

from __future__ import annotations

from torch import fx

from .. import ops
from ..graph import call
from ..target import Target
from .kernel import Operands, Problem


class FusedDequantizeMatmul:
    """`x @ dequantize(weight).T` in one pass over the FP8 weight."""

    name = "fused dequantize-matmul"

    def supports(self, problem: Problem, target: Target) -> str | None:
        return "the fused CPU kernel is not part of this version"

    def emit(self, graph: fx.Graph, problem: Problem, operands: Operands, like: fx.Node) -> fx.Node:
        args = (operands.x, operands.weight, operands.weight_scale, operands.extra, list(problem.block))
        return call(graph, ops.DEQUANTIZED[problem.kind], *args, like=like)

    def fingerprint(self) -> str:
        return ""


KERNELS = (FusedDequantizeMatmul(),)
