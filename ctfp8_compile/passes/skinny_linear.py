"""Skinny linears (few rows) with a large weight that is not quantized, such as a decoder's head, run as a streaming GEMV.

    before                                   after
    %t = permute(%w, [1, 0])                 %y = ctfp8.linear(%x, %w, %b)
    %y = addmm(%b, %x, %t)                   (or mm, linear)

A decode step reads the head whole, an eighth of all bytes of a model whose layers are FP8.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from ..graph import arguments, before, call, value
from ..lowering import has_streaming_gemv
from ..target import Target

aten = torch.ops.aten
#: Elements from which on no cache keeps a weight from one step to the next.
ELEMENTS = 1 << 22
LARGE_LINEARS = (aten.linear.default, aten.mm.default, aten.addmm.default)
#: Rows, at most, for which the operator is another than torch's.
ROWS = 4


def stream_skinny_linears(graph: fx.Graph, target: Target, rows: int = ROWS, elements: int = ELEMENTS) -> int:
    """Rewrites such linears of a graph in place, if the target has a kernel for them; returns how many.

    Args:
        rows: at most so many of activations; their number may be a dynamic size.
        elements: at least so many of the weight.
    """
    done = 0
    for node in graph.nodes:
        x, weight, bias = _linear(node)
        if weight is None or not _is_large(weight, elements) or not _may_be_few(value(x).shape[:-1], rows):
            continue
        if value(x).dtype != value(weight).dtype or not has_streaming_gemv(target, value(x).dtype):
            continue
        with before(graph, node):
            new = call(graph, torch.ops.ctfp8.linear.default, x, weight, bias, like=node)
        node.replace_all_uses_with(new, propagate_meta=False)
        graph.erase_node(node)
        done += 1
    return done


def _linear(node: fx.Node) -> tuple[Any, Any, Any]:
    """Input, weight and bias of a matmul with a weight; None for the weight of any other node."""
    if node.target is aten.linear.default:
        x, weight, *bias = arguments(node)
        return x, weight, bias[0] if bias else None
    if node.target is aten.mm.default:
        return arguments(node)[0], _transposed(arguments(node)[1]), None
    if node.target is aten.addmm.default and not node.kwargs:
        bias, x, weight = arguments(node)
        return (x, _transposed(weight), bias) if value(bias).dim() == 1 else (None, None, None)
    return None, None, None


def _transposed(node: fx.Node) -> fx.Node | None:
    """What the node is the transpose of, which has two dimensions."""
    of, *dims = arguments(node) or (None,)
    if node.target is aten.t.default or (node.target is aten.permute.default and dims[0] == [1, 0]):
        return of
    return of if node.target is aten.transpose.int and (dims[0] - dims[1]) % 2 else None


def _is_large(weight: fx.Node, elements: int) -> bool:
    shape = value(weight).shape
    fixed = weight.op in ("placeholder", "get_attr") and all(isinstance(size, int) for size in shape)
    return fixed and len(shape) == 2 and math.prod(shape) >= elements


def _may_be_few(sizes: Any, rows: int) -> bool:
    return math.prod(size for size in sizes if isinstance(size, int)) <= rows
