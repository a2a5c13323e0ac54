"""Plain ATen: what passes write as prims, for Inductor, is written as ATen in a graph that others are to read.

before                                        after
%f = prims.convert_element_type(%w, f32)      %f = aten._to_copy(%w, dtype=f32)
%i = prims.iota(%n, start=0, step=1, …)       %i = aten.arange(%n, …)

Inductor has no lowering for some of ATen behind its own decompositions, which is why passes take prims. Converters to other
runtimes know ATen alone (`findings/openvino-refuses-prims.sh`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

aten = torch.ops.aten
_convert = torch.ops.prims.convert_element_type.default
_iota = torch.ops.prims.iota.default


def plain(graph: fx.Graph) -> None:
    """Writes each prim that our passes write as ATen. A node stays the same object, under the same name."""
    for node in graph.find_nodes(op="call_function", target=_convert):
        x, dtype = node.args
        node.target, node.args, node.kwargs = aten._to_copy.default, (x,), {"dtype": dtype}
    for node in graph.find_nodes(op="call_function", target=_iota):
        start, step = node.kwargs["start"], node.kwargs["step"]
        if (start, step) == (0, 1):
            kept = {name: node.kwargs[name] for name in ("dtype", "device")}
            node.target, node.kwargs = aten.arange.default, kept


def as_prim(node: fx.Node) -> tuple[Any, Any, Any]:
    """Target, args and kwargs of a node, a cast as passes write it."""
    if node.target is aten._to_copy.default and [*node.kwargs] == ["dtype"]:
        return _convert, (*node.args, node.kwargs["dtype"]), {}
    return node.target, node.args, node.kwargs
