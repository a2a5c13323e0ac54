"""Static activations, as the checkpoint has them: each is quantized to FP8 and back, in front of its matmul.

before                                        after, of a linear
%d = ctfp8.dequantize(%w, %s, …)              %q = ctfp8.quantize_per_tensor(%rows, %a)      QuantizeLinear
%y = linear(%x, %d)                           %r = ctfp8.dequantize(%q, %a, …)               DequantizeLinear
                                              %y = linear(%r, %d)

Each row of a gathered matmul has its expert's scale. QuantizeLinear has one scale, or one for each index of an axis that is as
long as the file says; rows vary, so they are divided by their scales, quantized with a scale of 1, and multiplied again. Both
give the FP8 values that a matmul of FP8 with FP8 would take.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from ..errors import UsageError
from ..graph import MARKER, before, call, sizes, value
from ..passes import RULES, Decision, Match, match

QUANTIZE = torch.ops.ctfp8.quantize_per_tensor.default
aten = torch.ops.aten


def quantize_static(graph: fx.Graph) -> int:
    """Adds the pairs, in place; returns how many matmuls got one.

    Args:
        graph: with markers of weights, as `torch.export` gives it.

    Raises:
        UsageError: no activation of the model is static; or one belongs to a weight whose use no rule knows.
    """
    static = [found for found in match(graph, RULES) if found.activation == "tensor"]
    found = [_known(one) for one in static if one.match is None or one.match.kind != "embedding"]
    if not found:
        raise UsageError(
            "quantize_activations: no activation of this model has a static scale in the checkpoint, and a scale that depends on "
            "the activation is none for QuantizeLinear. Leave it out: activations then stay as they are."
        )
    for one in found:
        _quantize(graph, one)
    return len(found)


def _known(found: Decision) -> Match:
    if found.match is None or found.match.kind not in ("linear", "gathered_mm") or found.match.matrix is not None:
        raise UsageError(
            f"{found.parameter}: quantize_activations knows linears and gathered experts, and this weight is used in another way "
            f"({found.reason or 'one of several matrices is chosen'}). Leave it out: activations then stay as they are."
        )
    return found.match


def _quantize(graph: fx.Graph, found: Match) -> None:
    """Puts the activation of one matmul through FP8."""
    node, x, scale = found.node, found.x, found.input_scale
    assert scale is not None

    def do(op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return call(graph, op, *args, like=node, **kwargs)

    with before(graph, node):
        shape, cols = sizes(graph, x, like=node), value(found.weight).shape[-1]
        rows = do(aten._to_copy.default, do(aten.reshape.default, x, [-1, cols]), dtype=torch.float32)
        if value(scale).shape[-1] != 1:  # of matrices that were merged, which share one input
            scale = do(aten.amax.default, scale, [-1], True)
        if found.kind == "linear":
            rows = _there_and_back(do, rows, do(aten.reshape.default, scale, [1, 1]))
        else:
            own = do(aten.index.Tensor, scale, [found.expert_ids])
            one = do(aten.full.default, [1, 1], 1.0, dtype=torch.float32, device=value(x).device)
            rows = do(aten.mul.Tensor, _there_and_back(do, do(aten.div.Tensor, rows, own), one), own)
        rows = do(aten._to_copy.default, rows, dtype=value(x).dtype)
        node.replace_input_with(x, do(aten.reshape.default, rows, shape))


def _there_and_back(do: Any, rows: fx.Node, scale: fx.Node) -> fx.Node:
    q = do(operator.getitem, do(QUANTIZE, rows, scale), 0)
    return do(MARKER, q, scale, None, [1, value(rows).shape[-1]], "none", torch.float32)
