"""Replaces a marker that no rule took with plain ATen, so that the graph is right on any target.

before                                        after
%d = ctfp8.dequantize(%w, %s, …, bf16)        %f = to(%w, f32)
                                              %m = mul(%f, %s)
                                              %d = to(%m, bf16)
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import fx

from .. import ops
from ..graph import CACHED, arguments, before, call, is_marker, is_view, sizes, value

aten = torch.ops.aten
_convert = torch.ops.prims.convert_element_type.default


def decompose(graph: fx.Graph, caches: bool = True, weights: bool = True) -> dict[fx.Node, fx.Node]:
    """Decomposes every rotation, and every marker that is still used; returns what took the place of each.

    Views of weights go with the rest.

    Args:
        caches: whether those of FP8 caches too. An artifact keeps them, for the attention of the machine that loads it.
        weights: whether those of weights too. Another format has an operator for them.
    """
    for node in reversed(graph.nodes):
        if not node.users and (is_marker(node) or is_view(node)):
            graph.erase_node(node)  # once: removing nodes while walking them is quadratic
    for node in [node for node in graph.nodes if caches and node.target is CACHED]:
        with before(graph, node):
            stored, scale, dtype = arguments(node)
            do = functools.partial(_do, graph, node)
            new = ops.cached_steps(do, stored, value(stored).shape[-1], scale, dtype)
        node.replace_all_uses_with(new, propagate_meta=False)
        graph.erase_node(node)
    replaced = {}
    for node in graph.find_nodes(op="call_function", target=ops.ROTATE):
        with before(graph, node):
            x, matrix, scale, transposed, precision, _ = arguments(node)
            do = functools.partial(_do, graph, node)
            new = ops.rotate_steps(
                do,
                x,
                sizes(graph, x, like=node),
                value(x).dtype,
                matrix,
                value(matrix).shape[0],
                scale,
                transposed,
                precision,
            )
        replaced[node] = new
        node.replace_all_uses_with(new, propagate_meta=False)
        graph.erase_node(node)
    for marker in [node for node in graph.nodes if weights and is_marker(node)]:
        replaced[marker] = arithmetic(graph, marker)
        marker.replace_all_uses_with(replaced[marker], propagate_meta=False)
        graph.erase_node(marker)
    return replaced


def _do(graph: fx.Graph, like: fx.Node, op: Any, *args: Any) -> fx.Node:
    return call(graph, op, *args, like=like)


def arithmetic(graph: fx.Graph, marker: fx.Node) -> fx.Node:
    """Builds the arithmetic of `ops.dequantize_reference` in front of the marker and returns its result."""
    weight, scale, _, block, _, dtype = arguments(marker)
    with before(graph, marker):
        if value(scale).dtype == torch.uint8:
            scale = ops.exponent_steps(functools.partial(_do, graph, marker), scale)
        for dim, step in ((-2, block[0]), (-1, block[1])):
            scale = _repeat(graph, scale, dim, step, value(weight).shape[dim], marker)
        wide = call(graph, _convert, weight, torch.float32, like=marker)
        product = call(graph, aten.mul.Tensor, wide, scale, like=marker)
        return product if dtype == torch.float32 else call(graph, _convert, product, dtype, like=marker)


def _repeat(graph: fx.Graph, scale: fx.Node, dim: int, step: int, size: int, like: fx.Node) -> fx.Node:
    """Repeats each entry of `scale` along `dim` `step` times, up to `size`, out of views."""
    shape = list(value(scale).shape)
    if shape[dim] == 1 or step == 1:
        return scale
    at, whole = len(shape) + dim, size // step
    if whole * step == size:
        return _repeat_whole(graph, scale, at, step, like)
    # The last block is a part of one. It is added apart: Inductor's CPU code for an index divided by `step` is wrong (torch
    # 2.13) in the elements that fill no vector.
    last = call(graph, aten.slice.Tensor, scale, at, whole, whole + 1, like=like)
    last = call(graph, aten.expand.default, last, [*shape[:at], size - whole * step, *shape[at + 1 :]], like=like)
    first = call(graph, aten.slice.Tensor, scale, at, 0, whole, like=like)
    return call(graph, aten.cat.default, [_repeat_whole(graph, first, at, step, like), last], at, like=like)


def _repeat_whole(graph: fx.Graph, scale: fx.Node, at: int, step: int, like: fx.Node) -> fx.Node:
    shape = list(value(scale).shape)
    wide = call(graph, aten.unsqueeze.default, scale, at + 1, like=like)
    wide = call(graph, aten.expand.default, wide, [*shape[: at + 1], step, *shape[at + 1 :]], like=like)
    wide = call(graph, aten.clone.default, wide, like=like)
    return call(graph, aten.reshape.default, wide, [*shape[:at], shape[at] * step, *shape[at + 1 :]], like=like)
