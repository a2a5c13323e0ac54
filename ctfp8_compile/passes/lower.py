"""Turns the target-independent nodes that rules emit for an FP8 × FP8 matmul into the target's operators.

before                                                     after (xpu)
%q, %a = ctfp8.quantize_per_token(%x)                      %a = div(clamp_min(amax(abs(%x))), 448)   … plain ATen
%y = ctfp8.scaled_mm(%q, %w, %a, %s, None, …)              %y = _scaled_mm(%q, permute(%w), %a, reshape(%s), …)
"""

from __future__ import annotations

from torch import fx

from .. import ops
from ..graph import arguments, before, call
from ..lowering.scaled import QUANTIZE, lower_quantize
from .rewrite import Kernels


def lower_scaled(graph: fx.Graph, kernels: Kernels) -> int:
    """Replaces every node that waits for a kernel by that kernel's operators, and quantizations by ATen; returns how many."""
    done = len(kernels)
    for node, kernel in kernels.items():
        node.replace_all_uses_with(kernel.lower(graph, node), propagate_meta=False)
        graph.erase_node(node)
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in QUANTIZE:
            lower_quantize(graph, node)
            done += 1
        elif node.target is ops.UNSWIZZLED:  # dead, where a kernel reads what is behind it
            if node.users:
                with before(graph, node):
                    new = ops.unswizzle_steps(
                        lambda op, *args, node=node: call(graph, op, *args, like=node), *arguments(node)
                    )
                node.replace_all_uses_with(new, propagate_meta=False)
            graph.erase_node(node)
    return done
