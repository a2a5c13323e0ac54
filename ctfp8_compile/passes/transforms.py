"""Transforms of a rotated checkpoint in a graph: those that are the same become one, and what there is goes into the report.

    before                                                     after
    %a = ctfp8.rotate(%x, %m, …)                               %a = ctfp8.rotate(%x, %m, …)
    %b = ctfp8.rotate(%x, %m, …)                               … linear(%a, %q), linear(%a, %k)
    … linear(%a, %q), linear(%b, %k)

`decompose` makes plain ATen of what is left.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from ..graph import arguments, fake_value, module_name
from ..ops import ROTATE
from ..report import Entry


def share_rotations(graph: fx.Graph) -> int:
    """Replaces each rotation of an activation by an earlier one that is the same, in any tracer's graph: q, k and v share it.

    This comes before horizontal fusion, which asks for linears with the same input.

    Returns:
        How many gave way.
    """
    done = 0
    first: dict[Any, fx.Node] = {}
    for node in graph.find_nodes(op="call_function", target=ROTATE):
        same = first.setdefault(repr(node.args), node)  # node names are unique in a graph
        if same is not node:
            node.replace_all_uses_with(same, propagate_meta=False)
            graph.erase_node(node)
            done += 1
    return done


def transforms(graph: fx.Graph) -> list[Entry]:
    """Each rotation of a graph for the report: where it is applied, which it is, and what computes it."""
    found = []
    for node in graph.find_nodes(op="call_function", target=ROTATE):
        _, matrix, _, _, precision, name = arguments(node)
        kernel = f"matmul in {str(precision).removeprefix('torch.')}"
        shape = tuple(fake_value(matrix).shape)
        found.append(Entry(module_name(node), f"transform {name}", kernel, "", shape, (), "", before=("ctfp8.rotate",)))
    return found
