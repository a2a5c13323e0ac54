"""Replaces each matmul for which a kernel was selected by what that kernel emits.

before                                              after
%d = ctfp8.dequantize(%w, %s, …)                    %y = ctfp8.dequantized_linear(%x, %w, %s, %b, block)
%t = permute(%d, [1, 0])
%y = addmm(%b, %x, %t)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from ..compat import statically_known_true
from ..errors import UsageError
from ..graph import before, call, is_plumbing, op_name, same_strides, value
from ..lowering import Kernel, Operands
from .decision import Decision

aten = torch.ops.aten
#: Which kernel lowers a node, of those nodes that are still to be lowered.
Kernels = dict[fx.Node, Kernel]


def rewrite(graph: fx.Graph, decisions: Sequence[Decision]) -> tuple[list[Decision], Kernels]:
    """Rewrites a graph in place.

    Returns:
        The decisions with what was built for each, and the kernel of each node that a later pass is to lower.

    Raises:
        UsageError: a rule's match does not describe the node it was found at.
    """
    replaced: dict[Any, fx.Node] = {}
    kernels: Kernels = {}
    done = []
    for decision in decisions:
        if decision.kernel is None or decision.match is None:
            done.append(decision)
            continue
        node = decision.match.node
        last = node.prev
        new = _build(graph, replace(decision, match=decision.match.mapped(lambda n: replaced.get(n, n))))
        _same_tensor(decision, node, new)
        with before(graph, node):
            new = _as_traced(graph, node, new)
        built = list(_nodes_after(last, new))
        for step in built:
            if step.target in decision.kernel.lowers:
                kernels[step] = decision.kernel
        done.append(replace(decision, after=_names(built)))
        node.replace_all_uses_with(new, propagate_meta=False)
        graph.erase_node(node)
        replaced[node] = new
    return done, kernels


def preview(decisions: Sequence[Decision]) -> list[Decision]:
    """The decisions with what would be built for each, where nothing was; nothing is rewritten."""
    return [d if d.kernel is None or d.after else _preview(d) for d in decisions]


def _preview(decision: Decision) -> Decision:
    assert decision.match is not None
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}

    def copy(node: fx.Node) -> fx.Node:
        if node not in copies:
            copies[node] = graph.placeholder(node.name)
            copies[node].meta["val"] = value(node)
        return copies[node]

    found = decision.match.mapped(copy)
    end = graph.output(())
    end.meta["val"] = value(decision.match.node)
    out = _build(graph, replace(decision, match=replace(found, node=end)))
    first = next(iter(graph.nodes)).prev
    return replace(decision, after=_names(_nodes_after(first, out)))


def _names(built: Iterator[fx.Node] | Sequence[fx.Node]) -> tuple[str, ...]:
    return tuple(op_name(n) for n in built if n.op == "call_function" and not is_plumbing(n))


def _build(graph: fx.Graph, decision: Decision) -> fx.Node:
    """Builds the replacement right before the matched node."""
    found, kernel, problem = decision.match, decision.kernel, decision.problem
    assert found is not None
    assert kernel is not None
    assert problem is not None
    like = found.node
    with before(graph, like):
        weight, weight_scale, input_scale = (
            t if t is None or found.matrix is None else call(graph, aten.select.int, t, 0, found.matrix, like=like)
            for t in (found.weight, found.weight_scale, found.input_scale)
        )
        x = found.x
        for view in found.x_views:
            x = view.build(graph, x, like)
        assert weight is not None
        assert weight_scale is not None
        operands = Operands(x, weight, weight_scale, input_scale, found.bias, found.offs, found.expert_ids)
        out = kernel.emit(graph, problem, operands, like)
        for view in found.out_views:
            out = view.build(graph, out, like)
    return out


def _same_tensor(decision: Decision, old: fx.Node, new: fx.Node) -> None:
    """A replacement has the shape and dtype of what it replaces, or a rule found what is not there."""
    a, b = value(old), value(new)
    sizes = zip(a.shape, b.shape, strict=False)
    differ = any(isinstance(m, int) and isinstance(n, int) and m != n for m, n in sizes)
    if a.dim() != b.dim() or a.dtype != b.dtype or differ:
        raise UsageError(
            f"{decision.parameter}: the rule {decision.rule!r} would replace {op_name(old)} of {a.dtype} {list(a.shape)} by "
            f"{b.dtype} {list(b.shape)}. Its pattern has to describe the node: see x_views and out_views of passes.Match."
        )


def _as_traced(graph: fx.Graph, old: fx.Node, new: fx.Node) -> fx.Node:
    """The replacement with the strides that what follows was traced with: a `view` may not take others."""
    if same_strides(value(old), value(new)):
        return new
    steps = value(old).stride()
    order = sorted(
        range(len(steps)),
        key=lambda dim: sum(statically_known_true(steps[dim] >= step) for step in steps),
        reverse=True,
    )
    turned = order != list(range(len(steps)))
    if turned:
        new = call(graph, aten.permute.default, new, order, like=old)
    new = call(graph, aten.clone.default, new, like=old, memory_format=torch.contiguous_format)
    return (
        call(graph, aten.permute.default, new, [order.index(d) for d in range(len(order))], like=old) if turned else new
    )


def _nodes_after(first: fx.Node, last: fx.Node) -> Iterator[fx.Node]:
    """The nodes behind `first` up to and with `last`, in the order of the graph."""
    node = first
    while node is not last:
        node = node.next
        yield node
