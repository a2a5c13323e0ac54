"""What a rule is: a pattern that finds one form in which a model uses an FP8 weight.

    class MyRule(Rule):
        name = "my rule"
        roots = (aten.some_op.default,)                 # ops at which the pattern starts

        def pattern(self, node) -> Match | None: ...     # what to find; None: not mine

A pattern starts at the consumer and looks back along its weight operand (`graph.trace_weight`). One visit of each node is
enough, so a pass is linear in the size of the graph. What it finds it says in a `Match`: which of the problems that kernels
know (`lowering.kernel.Kind`) the node is, and the views that lead to it. That is all a rewrite needs, here and on the machine
that loads an artifact, so rules do not rewrite and hold no state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import fx

from ..graph import Weight, arguments, call, value
from ..lowering.kernel import Kind

aten = torch.ops.aten
ViewOp = Literal["squeeze", "unsqueeze", "transpose"]
VIEW_OPS: tuple[ViewOp, ...] = get_args(ViewOp)


@dataclass(frozen=True)
class View:
    """A view of a tensor: a dimension of size one removed (`squeeze`) or added (`unsqueeze`), or two swapped (`transpose`)."""

    op: ViewOp
    dims: tuple[int, ...]

    def build(self, graph: fx.Graph, node: fx.Node, like: fx.Node) -> fx.Node:
        """Adds the view of `node` at the graph's insertion point."""
        if self.op == "squeeze":
            return call(graph, aten.squeeze.dim, node, *self.dims, like=like)
        if self.op == "unsqueeze":
            return call(graph, aten.unsqueeze.default, node, *self.dims, like=like)
        order = list(range(value(node).dim()))
        a, b = self.dims
        order[a], order[b] = order[b], order[a]
        return call(graph, aten.permute.default, node, order, like=like)  # Inductor expects no composite operators


@dataclass(frozen=True)
class Match:
    """A node that is a matmul with an FP8 weight, as a rule found it: `out_views(kind(x_views(x), weight, …))`.

    Attributes:
        node: what is to be replaced.
        kind: which problem it is to a kernel: `linear`, `grouped_mm`, `gathered_mm` or `embedding`.
        x: its activation; `[..., K]` behind `x_views`. Of an embedding, the ids.
        weight, weight_scale, input_scale: what its marker dequantizes: `[N, K]` or `[E, N, K]`, with its scales.
        parameter: the model's name of the weight.
        block, activation, dtype: rows and columns that share a scale; the checkpoint's activation scheme; what the weight
            dequantizes to.
        matrix: which of the weight's matrices, where it holds several and one was selected; a number or a node.
        bias: of a linear, or None.
        offs: cumulative offsets of the experts' rows, of a `grouped_mm`.
        expert_ids: the expert of each row, of a `gathered_mm`.
        x_views, out_views: the views of the activation that the kernel reads, and of its result that replaces the node.
    """

    node: fx.Node
    kind: Kind
    x: fx.Node
    weight: fx.Node
    weight_scale: fx.Node
    input_scale: fx.Node | None
    parameter: str
    block: tuple[int, int]
    activation: str
    dtype: torch.dtype
    matrix: Any = None
    bias: fx.Node | None = None
    offs: fx.Node | None = None
    expert_ids: fx.Node | None = None
    x_views: tuple[View, ...] = ()
    out_views: tuple[View, ...] = ()

    @staticmethod
    def of(
        node: fx.Node,
        kind: Kind,
        x: fx.Node,
        weight: Weight,
        *,
        bias: fx.Node | None = None,
        offs: fx.Node | None = None,
        expert_ids: fx.Node | None = None,
        x_views: Sequence[View] = (),
        out_views: Sequence[View] = (),
    ) -> Match:
        """From a weight operand that was traced back to its marker."""
        stored, weight_scale, input_scale, block, activation, dtype = arguments(weight.marker)
        return Match(
            node, kind, x, stored, weight_scale, input_scale, weight.name, (block[0], block[1]), activation, dtype,
            weight.matrix, bias, offs, expert_ids, tuple(x_views), tuple(out_views),
        )  # fmt: skip

    def mapped(self, new: Any) -> Match:
        """With each node it names replaced by `new(node)`."""
        names = ("node", "x", "weight", "weight_scale", "input_scale", "matrix", "bias", "offs", "expert_ids")
        return replace(self, **{n: new(v) for n in names if isinstance(v := getattr(self, n), fx.Node)})


class Rule:
    """One pattern. Rules hold no state."""

    name: ClassVar[str]
    roots: ClassVar[tuple[Any, ...]]

    def pattern(self, node: fx.Node) -> Match | None:
        """The match at this node, or None where the node is not what the rule looks for."""
        raise NotImplementedError
