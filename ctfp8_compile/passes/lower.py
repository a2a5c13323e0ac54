"""Turns the target-independent nodes that rules emit for an FP8 × FP8 matmul into the target's operators.

    before                                                     after (xpu)
    %q, %a = ctfp8.quantize_per_token(%x)                      %a = div(clamp_min(amax(abs(%x))), 448)   … plain ATen
    %y = ctfp8.scaled_mm(%q, %w, %a, %s, None, …)              %y = _scaled_mm(%q, permute(%w), %a, reshape(%s), …)

First, nodes that compute the same are made one: linears with the same input (q, k, v; gate, up) share its quantization.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from ..lowering.scaled import KERNEL, QUANTIZE, lower_quantize

aten = torch.ops.aten
_SHARED = {*QUANTIZE, operator.getitem, aten.reshape.default, aten.amax.default, aten.sym_size.int}


def share_quantization(graph: fx.Graph) -> None:
    """Replaces each quantization, and what leads to it, by an earlier one of the same input."""
    first: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in _SHARED:
            continue
        key = (node.target, repr(node.args))  # node names are unique in a graph
        same = first.setdefault(key, node)
        if same is not node:
            node.replace_all_uses_with(same, propagate_meta=False)
            graph.erase_node(node)


def lower_scaled(graph: fx.Graph) -> None:
    """Replaces every `ctfp8::scaled_…` and `ctfp8::quantize_…` node by its kernel's operators, and by ATen."""
    for node in list(graph.nodes):
        if kernel := node.meta.get(KERNEL):
            node.replace_all_uses_with(kernel.lower(graph, node), propagate_meta=False)
            graph.erase_node(node)
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in QUANTIZE:
            lower_quantize(graph, node)
