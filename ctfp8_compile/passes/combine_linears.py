"""Scaled matmuls with one input, whose weights are packed (`ctfp8_compile.passes.horizontal_fusion`), become one.

    before                                                      after
    %a = scaled_mm(%x, slice(%w, 0, 0, 64), %sa, …)             %y = scaled_mm(%x, %w, %sa, %s, …)
    %b = scaled_mm(%x, slice(%w, 0, 64, 96), %sa, …)            %a = clone(slice(%y, 1, 0, 64))
                                                                %b = clone(slice(%y, 1, 64, 96))

The clones give consumers the strides they were traced with; Inductor fuses them into pointwise ones.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import fx

from ..graph import arguments, before, call, value
from ..ops.triton import WEIGHT_ONLY
from .horizontal_fusion import PACK
from .rewrite import Kernels

aten = torch.ops.aten
_ctfp8 = torch.ops.ctfp8
#: Matmuls that can be fused, and where they have what is packed: weight, its scales, bias.
_PARTS = {
    _ctfp8.scaled_mm.default: (1, 3, 4),
    _ctfp8.dequantized_linear.default: (1, 2, 3),
    WEIGHT_ONLY["linear"]: (1, 2, 3),
}


def combine_linears(graph: fx.Graph, kernels: Kernels) -> int:
    """Combines in place what reads all parts of a `pack` node with the same kernel; other parts go apart again.

    Returns:
        How many groups were combined.
    """
    done = 0
    groups: dict[Any, list[tuple[int, fx.Node]]] = defaultdict(list)
    for node in graph.nodes:
        if (at := _PARTS.get(node.target)) and (part := _part(arguments(node)[at[0]])) is not None:
            rest = [arg for i, arg in enumerate(arguments(node)) if i not in at]
            others = tuple(_part(arguments(node)[i]) or arguments(node)[i] for i in at[1:])
            wholes = tuple(other[0] if isinstance(other, tuple) else other for other in others)
            groups[part[0], wholes, node.target, repr(rest), kernels.get(node)].append((part[1], node))
    for (weight, *_), members in groups.items():
        members.sort(key=lambda member: member[0])
        if weight.target is PACK and sum(value(node).shape[-1] for _, node in members) == value(weight).shape[0]:
            _combine(graph, members, kernels)
            done += 1
    for node in [n for n in graph.nodes if n.target is PACK]:
        _apart(graph, node)
    for node in [n for n in graph.nodes if n.target is aten.slice.Tensor and not n.users]:
        graph.erase_node(node)
    return done


def _combine(graph: fx.Graph, members: list[tuple[int, fx.Node]], kernels: Kernels) -> None:
    nodes = {node for _, node in members}
    first = next(node for node in graph.nodes if node in nodes)
    whole = list(arguments(first))
    for i in _PARTS[first.target]:
        if whole[i] is not None:
            part = _part(whole[i])
            assert part is not None
            whole[i] = part[0]
    with before(graph, first):
        out = call(graph, first.target, *whole, like=first)
        for begin, node in members:
            dim, end = value(node).dim() - 1, begin + value(node).shape[-1]
            own = call(graph, aten.slice.Tensor, out, dim, begin, end, like=node)
            own = call(graph, aten.clone.default, own, like=own, memory_format=torch.contiguous_format)
            node.replace_all_uses_with(own, propagate_meta=False)
    if (kernel := kernels.get(first)) is not None:
        kernels[out] = kernel
    for node in nodes:
        kernels.pop(node, None)
        graph.erase_node(node)


def _apart(graph: fx.Graph, whole: fx.Node) -> None:
    """Slices of a `pack` node become its parts."""
    begin = 0
    parts = {}
    for part in arguments(whole)[0]:
        parts[begin] = part
        begin += value(part).shape[0]
    for node in list(whole.users):
        if node.target is aten.slice.Tensor:
            node.replace_all_uses_with(parts[arguments(node)[2]], propagate_meta=False)
            graph.erase_node(node)
    if not whole.users:
        graph.erase_node(whole)


def _part(node: Any) -> tuple[fx.Node, int] | None:
    """`(what is packed, first row)` of a part of it; scales may have been prepacked in another way (`prepack`)."""
    if isinstance(node, fx.Node) and node.target is aten.slice.Tensor and arguments(node)[1] == 0:
        return arguments(node)[0], arguments(node)[2]
    return None
