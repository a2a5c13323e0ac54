"""Replaces `linear(x, dequantize(w))`, in each of the forms tracers give it, with a matmul on the FP8 weight.

before                                              after
%d = ctfp8.dequantize(%w, %s, …)                    %y = ctfp8.dequantized_linear(%x, %w, %s, %b, block)
%t = permute(%d, [1, 0])
%y = addmm(%b, %x, %t)          (or mm, linear, or bmm over a broadcast weight)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ..compat import statically_known_true
from ..graph import trace_weight, value
from .rule import Match, Rule

aten = torch.ops.aten


class LinearRule(Rule):
    """`aten.linear`, as `torch.export` keeps it."""

    name = "linear"
    roots = (aten.linear.default,)

    def pattern(self, node: fx.Node) -> Match | None:
        x, w, *bias = node.args
        return _linear(node, x, w, bias[0] if bias else None, transposed=False)


class MatmulRule(Rule):
    """`mm` and `addmm`: a linear after decomposition, its input flattened to two dimensions; `matmul` where it is kept."""

    name = "linear"
    roots = (aten.mm.default, aten.addmm.default, aten.matmul.default)

    def pattern(self, node: fx.Node) -> Match | None:
        bias, (x, w) = (node.args[0], node.args[1:]) if node.target is aten.addmm.default else (None, node.args)
        if bias is not None and node.kwargs:
            return None  # a scaled addend is not a bias
        return _linear(node, x, w, bias, transposed=True)


class BatchedMatmulRule(Rule):
    """`bmm` with a broadcast weight: a linear whose input was not contiguous, so that it could not be flattened."""

    name = "linear"
    roots = (aten.bmm.default,)

    def pattern(self, node: fx.Node) -> Match | None:
        x, w = node.args
        weight = trace_weight(w)
        return _linear(node, x, w, None, transposed=True) if weight is not None and weight.broadcast else None


def _linear(node: fx.Node, x: Any, w: Any, bias: Any, transposed: bool) -> Match | None:
    weight = trace_weight(w)
    if weight is None or weight.expert_ids is not None or weight.transposed != transposed:
        return None
    if value(weight.marker).dim() - (weight.matrix is not None) != 2:
        return None
    rows = value(weight.marker).shape[-2]
    if not _same_shape(value(node).shape, (*value(x).shape[:-1], rows)):
        return None  # the weight's batch dimensions are part of the result
    if bias is not None and not _same_shape(value(bias).shape, (rows,)):
        return None  # an addend that is itself broadcast
    return Match.of(node, "linear", x, weight, bias=bias)


def _same_shape(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether they are known to be equal; nothing is assumed about sizes that vary."""
    return len(a) == len(b) and all(statically_known_true(x == y) for x, y in zip(a, b, strict=True))
