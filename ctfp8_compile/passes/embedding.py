"""Replaces `embedding(dequantize(table), ids)` with the gathering of FP8 rows, which are dequantized then.

    before                                              after
    %d = ctfp8.dequantize(%table, %s, …)                %q = embedding(%table, %ids)
    %y = embedding(%d, %ids)                            %r = embedding(%s, %ids)          a scale per channel
                                                        %y = to(mul(to(%q, f32), %r), bf16)

Without it a whole vocabulary would be dequantized at each step, for the rows of one token.
"""

from __future__ import annotations

import torch
from torch import fx

from ..graph import trace_weight, value
from .rule import Match, Rule

aten = torch.ops.aten


class EmbeddingRule(Rule):
    """`embedding`, as every tracer keeps it, and a plain `index_select` of rows."""

    name = "embedding"
    roots = (aten.embedding.default, aten.index_select.default)

    def pattern(self, node: fx.Node) -> Match | None:
        table, *at, ids = node.args[:3] if node.target is aten.index_select.default else node.args[:2]
        weight = trace_weight(table)
        if weight is None or weight.transposed or weight.broadcast or weight.expert_ids is not None:
            return None
        if value(weight.marker).dim() - (weight.matrix is not None) != 2 or at not in ([], [0], [-2]):
            return None
        if not isinstance(ids, fx.Node) or (at and value(ids).dim() != 1):
            return None
        return Match.of(node, "embedding", ids, weight)
