"""Embeddings, on every target: the rows that are asked for are gathered as FP8 and scaled; the table is never dequantized.

%y = embedding(dequantize(%table, %scale), %ids)    →    %q = embedding(%table, %ids)
                                                         %s = embedding(%scale, %ids)
                                                         %y = to(mul(to(%q, f32), %s), bf16)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .. import ops
from ..graph import call, sizes, value
from ..target import Target
from .kernel import SCALINGS, YES, Kind, Operands, Problem, ScaleLayout, Verdict

aten = torch.ops.aten


class GatheredRows:
    """Plain ATen, which Inductor fuses with what follows."""

    name = "gathered FP8 rows"
    library = "auto"
    kinds: tuple[Kind, ...] = ("embedding",)
    scalings = SCALINGS
    lowers = ()
    scale_layout: ScaleLayout = ""
    note = ""

    def supports(self, problem: Problem, target: Target) -> Verdict:
        return YES

    def preferred(self, problem: Problem, target: Target) -> bool:
        return False

    def emit(self, graph: fx.Graph, problem: Problem, operands: Operands, like: fx.Node) -> fx.Node:
        def do(op: Any, *args: Any, **kwargs: Any) -> fx.Node:
            return call(graph, op, *args, like=like, **kwargs)

        shape = sizes(graph, operands.x, like)
        scales = tuple(value(operands.weight_scale).shape)
        table = ops.Table(
            operands.weight, operands.weight_scale, problem.weight_shape, scales, problem.block, problem.exponents
        )
        return ops.embedding_steps(do, operands.x, shape, table, value(like).dtype, like.target is aten.index.Tensor)

    def lower(self, graph: fx.Graph, node: fx.Node) -> fx.Node:
        return node

    def fingerprint(self) -> str:
        return ""


KERNEL = GatheredRows()
