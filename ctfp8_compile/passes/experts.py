"""Replaces the two forms in which transformers runs stacked experts with a matmul on the stacked FP8 weights.

Grouped (prefill; tokens sorted by expert):

    before                                              after
    %d = ctfp8.dequantize(%w, %s, …)    [E, N, K]       %y = ctfp8.dequantized_grouped_mm(%x, %w, %s, %offs, block)
    %t = permute(%d, [0, 2, 1])
    %y = _grouped_mm(%x, %t, %offs)

Gathered (decode; one weight per row):

    %d = ctfp8.dequantize(%w, %s, …)    [E, N, K]       %y = ctfp8.dequantized_gathered_mm(%x, %w, %s, %ids, block)
    %g = index(%d, [%ids])              [T, N, K]
    %y = bmm(%g, unsqueeze(%x, -1))     [T, N, 1]
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..graph import arguments, trace_weight, value
from .rule import Match, Rule, View

aten = torch.ops.aten


class GroupedExpertsRule(Rule):
    """`_grouped_mm(x, weight, offs)`."""

    name = "grouped experts"

    @property
    def roots(self) -> tuple[Any, ...]:  # type: ignore[override]
        """ATen's grouped matmul, and the fallback for dtypes it does not take, once transformers has registered it."""
        fallback = getattr(torch.ops.transformers, "grouped_mm_fallback", None)
        return (aten._grouped_mm.default,) if fallback is None else (aten._grouped_mm.default, fallback.default)

    def pattern(self, node: fx.Node) -> Match | None:
        x, w = arguments(node)[:2]
        offs = arguments(node)[2] if len(arguments(node)) > 2 else node.kwargs.get("offs")
        weight = trace_weight(w)
        if weight is None or weight.expert_ids is not None or not weight.transposed or not isinstance(offs, fx.Node):
            return None
        if value(weight.marker).dim() != 3 or weight.matrix is not None or value(x).dim() != 2:
            return None
        if len(arguments(node)) > 3 and any(a is not None for a in arguments(node)[3:]):
            return None  # a bias or another output dtype
        return Match.of(node, "grouped_mm", x, weight, offs=offs)


class GatheredExpertsRule(Rule):
    """`bmm(weight[ids], x[:, :, None])`, or `bmm(x[:, None], weight[ids])` where the model keeps experts transposed."""

    name = "gathered experts"
    roots = (aten.bmm.default,)

    def pattern(self, node: fx.Node) -> Match | None:
        for operand, column in ((0, True), (1, False)):
            weight, x = trace_weight(arguments(node)[operand]), arguments(node)[1 - operand]
            if weight is None or weight.expert_ids is None or weight.transposed == column:
                continue
            one = 2 if column else 1
            if value(x).shape[one] != 1:
                return None  # several rows per expert: not a gather
            return Match.of(
                node, "gathered_mm", x, weight, expert_ids=weight.expert_ids,
                x_views=[View("squeeze", (one,))], out_views=[View("unsqueeze", (one,))],
            )  # fmt: skip
        return None
