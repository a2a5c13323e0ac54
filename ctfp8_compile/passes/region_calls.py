"""Pieces that compute the same become calls of one subgraph: what it is given, what it gives back, what is made again outside.

    before                                              after
    %q0 = linear(%h, dequantize(%w0, …))                %r0 = invoke_subgraph(ctfp8_region_0, %h, %w0, …)
    %k0 = view(%q0, …)          read outside            %q0 = getitem(%r0, 0)
    …                                                   %k0 = view(%q0, …)

A region gives back no view of what it is given, nor two of one memory: `invoke_subgraph` takes none.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..compat import free_symbols, invoke_subgraph
from .effects import only_computes
from .pieces import Piece, memory, value_of


def outputs_of(pieces: Sequence[Piece]) -> list[int] | None:
    """Which nodes a region gives back, so that none of them is a view of an input or of another; None where it cannot be one.

    What is such a view is made again outside, from what it is a view of.
    """
    first = pieces[0].nodes
    place = {node: i for i, node in enumerate(first)}
    wanted = sorted({i for piece in pieces for i in piece.read_outside})
    inputs = {m for node in pieces[0].inputs for m in memory(node)}
    if any(not isinstance(value_of(node), (Tensor, torch.SymInt, int)) for piece in pieces for node in piece.inputs):
        return None
    made: dict[int, int] = {}
    for i, node in enumerate(first):
        for m in memory(node):
            made.setdefault(m, i)
    shared = defaultdict(list)
    for i in wanted:
        for m in memory(first[i]):
            shared[m].append(i)
    outputs = set()
    waiting = list(wanted)
    while waiting:
        i = waiting.pop()
        own = memory(first[i])
        several = any(len(shared[m]) > 1 for m in own)
        again = own and (own & inputs or (several and i != min(made[m] for m in own)))
        if again and not only_computes(first[i]):
            return None
        if again or not isinstance(value_of(first[i]), Tensor):
            waiting += [place[n] for n in first[i].all_input_nodes if n in place and place[n] not in outputs]
        else:
            outputs.add(i)
    return sorted(outputs)


def replace_by_calls(
    gm: fx.GraphModule, name: str, pieces: Sequence[Piece], outputs: Sequence[int]
) -> dict[str, Mapping[str, Any]]:
    symbols = _symbols(gm.graph, pieces[0])
    region, copies = _region(pieces[0], symbols, outputs)
    gm.add_submodule(name, region)
    stacks: dict[str, Mapping[str, Any]] = {}
    for piece in pieces:
        there = {copy: n.meta.get("nn_module_stack", {}) for copy, n in zip(copies, piece.nodes, strict=True)}
        stacks[_call(gm.graph, name, piece, symbols, outputs).name] = there
    return stacks


def _symbols(graph: fx.Graph, piece: Piece) -> list[fx.Node]:
    """The graph's dynamic sizes that a region has and is not given: its code is to know them."""
    used = {
        s
        for node in (*piece.inputs, *piece.nodes)
        if isinstance(value_of(node), Tensor)
        for s in free_symbols(value_of(node))
    }
    sizes = (n for n in graph.find_nodes(op="placeholder") if isinstance(value_of(n), torch.SymInt))
    return [n for n in sizes if n not in piece.inputs and free_symbols(value_of(n)) & used]


def _region(piece: Piece, symbols: Sequence[fx.Node], outputs: Sequence[int]) -> tuple[fx.GraphModule, list[str]]:
    """The region, and what it calls the piece's nodes."""
    graph = fx.Graph()
    inside: dict[fx.Node, fx.Node] = {}
    for node in (*piece.inputs, *symbols):
        inside[node] = graph.placeholder(node.name)
        inside[node].meta = {"example_value": value_of(node)}
    for node in piece.nodes:
        inside[node] = graph.node_copy(node, inside.__getitem__)
    graph.output(tuple(inside[piece.nodes[i]] for i in outputs))
    names = [inside[node].name for node in piece.nodes]
    graph.eliminate_dead_code(lambda node: node.is_impure() or not (node.op == "get_attr" or only_computes(node)))
    return fx.GraphModule({}, graph), names


def _call(graph: fx.Graph, name: str, piece: Piece, symbols: Sequence[fx.Node], outputs: Sequence[int]) -> fx.Node:
    last = piece.nodes[-1]
    stack = {k: v for k, v in last.meta.items() if k in ("nn_module_stack", "stack_trace")}
    new: dict[fx.Node, fx.Node] = {}
    with graph.inserting_after(last):
        region = graph.get_attr(name)
    with graph.inserting_after(region):
        call = graph.call_function(invoke_subgraph, (region, name, *piece.inputs, *symbols))
    call.meta = {**stack, "example_value": tuple(value_of(piece.nodes[i]) for i in outputs)}
    at = call
    for position, i in enumerate(outputs):
        with graph.inserting_after(at):
            at = new[piece.nodes[i]] = graph.call_function(operator.getitem, (call, position))
        at.meta = {**stack, "example_value": value_of(piece.nodes[i])}
    own = set(piece.nodes)
    read = {node for node in piece.nodes if any(user not in own for user in node.users)}
    for node in _again(piece.nodes, read, new):
        with graph.inserting_after(at):
            at = new[node] = graph.node_copy(node, lambda n: new.get(n, n))
    for node in read:
        node.replace_all_uses_with(new[node], delete_user_cb=lambda user: user not in own, propagate_meta=False)
    for node in reversed(piece.nodes):
        graph.erase_node(node)
    return call


def _again(nodes: Sequence[fx.Node], read: set[fx.Node], given: Mapping[fx.Node, fx.Node]) -> list[fx.Node]:
    """The views that are made outside, in their order."""
    own, needed, waiting = set(nodes), set(), [node for node in read if node not in given]
    while waiting:
        node = waiting.pop()
        needed.add(node)
        waiting += [n for n in node.all_input_nodes if n in own and n not in given and n not in needed]
    return [node for node in nodes if node in needed]
