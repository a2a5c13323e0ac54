"""Weight-only operators that our passes put into a graph: their Triton kernels, where Inductor can see and launch them.

    before                                                   after
    %y = ctfp8.weight_only_linear(%x, %w, %s, None, …)       %e = empty_strided(…)
                                                             %c = view(%w, uint8)
                                                             %k = triton_kernel_wrapper_functional(x=%x, weight=%c, out=%e, …)
                                                             %y = getitem(%k, "out")

AOTAutograd does this to any `torch.library.triton_op`; our passes run after it, so they do it for those that they add.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..compat import dispatch_functionalize, make_fx
from ..graph import arguments, before, value
from ..ops.triton import GPUS, WEIGHT_ONLY

_OPERATORS = set(WEIGHT_ONLY.values())


def inline_triton(graph: fx.Graph) -> int:
    """Replaces each weight-only operator on a GPU by what it does, in place; returns how many."""
    found = [n for n in graph.nodes if n.op == "call_function" and n.target in _OPERATORS]
    on_gpus = [node for node in found if value(node).device.type in GPUS]
    for node in on_gpus:
        _inline(graph, node)
    return len(on_gpus)


def _inline(graph: fx.Graph, node: fx.Node) -> None:
    nodes = [arg for arg in arguments(node) if isinstance(arg, fx.Node)]

    def call(*tensors: torch.Tensor) -> torch.Tensor:
        given = iter(tensors)
        op: Any = node.target
        return op(*(next(given) if isinstance(arg, fx.Node) else arg for arg in arguments(node)))

    fakes = [value(n) for n in nodes]
    with fakes[0].fake_mode:
        traced = make_fx(dispatch_functionalize(call))(*fakes)
    copies = dict(zip((n for n in traced.graph.nodes if n.op == "placeholder"), nodes, strict=True))
    with before(graph, node):
        for inner in traced.graph.nodes:
            if inner.op == "call_function":
                copies[inner] = graph.node_copy(inner, copies.__getitem__)
                # strides as they were traced, whatever Inductor would prefer: kernels read raw pointers
                values = fx.node.map_arg((copies[inner].args, copies[inner].kwargs), value)
                copies[inner].meta["eager_input_vals"] = values
            elif inner.op == "output":
                node.replace_all_uses_with(copies[arguments(inner)[0]], propagate_meta=False)
    graph.erase_node(node)
