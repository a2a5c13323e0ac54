"""Puts a marker back in place of the arithmetic that `decompose` made of it, where the graph has just that arithmetic.

    before                                        after
    %f = to(%w, f32)                              %d = ctfp8.dequantize(%w, %s, …, bf16)
    %m = mul(%f, %s)
    %d = to(%m, bf16)

Of an artifact that someone edited the notes may say one thing and the graph another. What was folded was compared node by node,
and what rules find in the folded graph is what it computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from ..graph import MARKER, before, call, is_view, value
from .decompose import arithmetic
from .plain import as_prim
from .rule import Match

#: The arithmetic of one weight in a graph of its own: its last node, and the weight and scale it starts from.
_Arithmetic = tuple[fx.Node, fx.Node, fx.Node]


class Folder:
    """Folds the weights of one graph; those of one shape are compared with the same arithmetic."""

    def __init__(self, graph: fx.Graph):
        self.graph = graph
        self._known: dict[Any, _Arithmetic] = {}
        self._markers: dict[fx.Node, fx.Node] = {}

    def fold(self, match: Match) -> bool:
        """Whether an operand of the match's node is its weight, dequantized; then a marker stands there."""
        expected = self._expected(match)
        for source in _sources(match.node):
            folded = self._markers.get(source)
            if folded is not None and folded.args[:2] == (match.weight, match.weight_scale):
                return True
            if _same(source, *expected, match):
                self._put(source, match)
                return True
        return False

    def _put(self, source: fx.Node, match: Match) -> None:
        args = (match.weight, match.weight_scale, match.input_scale, list(match.block), match.activation, match.dtype)
        with before(self.graph, source):
            marker = call(self.graph, MARKER, *args, like=source)
        source.replace_all_uses_with(marker, delete_user_cb=lambda user: user.op != "output", propagate_meta=False)
        self._markers[marker] = marker

    def _expected(self, match: Match) -> _Arithmetic:
        weight, scale = value(match.weight), value(match.weight_scale)
        key = (weight.shape, scale.shape, scale.dtype, match.block, match.dtype)
        if key not in self._known:
            graph = fx.Graph()
            w, s = graph.placeholder("weight"), graph.placeholder("weight_scale")
            w.meta["val"], s.meta["val"] = weight, scale
            marker = graph.call_function(MARKER, (w, s, None, list(match.block), match.activation, match.dtype))
            self._known[key] = arithmetic(graph, marker), w, s
        return self._known[key]


def _sources(node: fx.Node) -> Iterator[fx.Node]:
    """What each operand is a view of."""
    for source in node.all_input_nodes:
        while is_view(source) and isinstance(source.args[0], fx.Node):
            source = source.args[0]
        yield source


def _same(found: Any, expected: Any, weight: fx.Node, scale: fx.Node, match: Match) -> bool:
    if expected is weight or expected is scale:
        return found is (match.weight if expected is weight else match.weight_scale)
    if isinstance(expected, fx.Node):
        if not isinstance(found, fx.Node) or found.op != expected.op:
            return False
        (target, args, kwargs), (wanted, of, _) = as_prim(found), as_prim(expected)
        return target == wanted and not kwargs and _same([*args], [*of], weight, scale, match)
    if isinstance(expected, list | tuple):
        return (
            isinstance(found, list | tuple)
            and len(found) == len(expected)
            and all(_same(f, e, weight, scale, match) for f, e in zip(found, expected, strict=True))
        )
    return type(found) is type(expected) and (
        found is expected if isinstance(expected, torch.dtype) else found == expected
    )
