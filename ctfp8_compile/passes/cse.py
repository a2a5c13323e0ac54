"""Quantizations that compute the same become one: linears with the same input (q, k, v; gate, up) share it.

before                                                     after
%q1, %a1 = ctfp8.quantize_per_token(%x)                    %q1, %a1 = ctfp8.quantize_per_token(%x)
%q2, %a2 = ctfp8.quantize_per_token(%x)                    … scaled_mm(%q1, …), scaled_mm(%q1, …)
… scaled_mm(%q1, …), scaled_mm(%q2, …)
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from ..lowering.scaled import QUANTIZE

aten = torch.ops.aten
#: Quantizations, and what leads to them.
_SHARED = {*QUANTIZE, operator.getitem, aten.reshape.default, aten.amax.default, aten.sym_size.int}


def share_quantization(graph: fx.Graph) -> int:
    """Replaces each quantization, and what leads to it, by an earlier one of the same input; returns how many nodes."""
    first: dict[Any, fx.Node] = {}
    done = 0
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in _SHARED:
            continue
        key = (node.target, repr(node.args))  # node names are unique in a graph
        same = first.setdefault(key, node)
        if same is not node:
            node.replace_all_uses_with(same, propagate_meta=False)
            graph.erase_node(node)
            done += 1
    return done
