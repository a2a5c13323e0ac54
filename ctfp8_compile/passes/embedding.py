"""Replaces `embedding(dequantize(table), ids)` with the gathering of FP8 rows, which are dequantized then.

    before                                              after
    %d = ctfp8.dequantize(%table, %s, …)                %q = embedding(%table, %ids)
    %y = embedding(%d, %ids)                            %r = embedding(%s, %ids)          a scale per channel
                                                        %y = to(mul(to(%q, f32), %r), bf16)

Without it a whole vocabulary would be dequantized at each step, for the rows of one token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..graph import arguments, trace_weight, value
from .rule import Match, Rule

aten = torch.ops.aten


class EmbeddingRule(Rule):
    """`embedding`, as every tracer keeps it; and rows that are taken by `index_select`, or by one tensor of indices."""

    name = "embedding"
    roots = (aten.embedding.default, aten.index_select.default, aten.index.Tensor)

    def pattern(self, node: fx.Node) -> Match | None:
        weight, ids = trace_weight(arguments(node)[0]), _ids(node)
        if weight is None or not isinstance(ids, fx.Node) or value(ids).dtype not in (torch.int64, torch.int32):
            return None
        if weight.transposed or weight.broadcast or weight.expert_ids is not None:
            return None
        if value(weight.marker).dim() - (weight.matrix is not None) != 2:
            return None
        rows, block = value(weight.marker).shape[-2], arguments(weight.marker)[3]
        if node.target is aten.index.Tensor and block[0] < rows and rows % block[0]:
            return None  # an index from the end would count blocks from there
        return Match.of(node, "embedding", ids, weight)


def _ids(node: fx.Node) -> Any:
    """The indices of rows; None where it is not rows that are taken."""
    _, *args = arguments(node)
    if node.target is aten.embedding.default:
        return args[0]
    if node.target is aten.index_select.default:
        return args[1] if args[0] in (0, -2) and value(args[1]).dim() == 1 else None
    return args[0][0] if len(args[0]) == 1 else None
