"""What a rule is: a pattern that finds a matmul with an FP8 weight, a check with a reason, a rewrite.

    class MyRule(Rule):
        name = "my-rule"
        roots = (aten.some_op.default,)                 # ops at which the pattern starts

        def pattern(self, node) -> Match | None: ...     # what to find; None: not mine
        def check(self, match, target) -> Plan | str     # a kernel, or the sentence why not (inherited)
        def rewrite(self, graph, match, plan) -> Node    # what replaces it (inherited)

A pattern starts at the consumer and looks back along its weight operand (`graph.trace_weight`). One visit of each node
is enough, so a pass is linear in the size of the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from ..graph import Weight, before, call, value
from ..lowering.kernel import Kernel, Operands, Problem, choose
from ..target import Target

aten = torch.ops.aten


@dataclass(frozen=True)
class Match:
    """A matmul with an FP8 weight.

    Attributes:
        node: the node to replace.
        kind: `linear`, `grouped_mm` or `gathered_mm` (see `lowering.kernel.Problem`).
        x: its activation, `[..., K]`.
        weight: its weight operand, traced back to the marker.
        extra: bias (or None) of a linear, `offs` of a grouped, `ids` of a gathered matmul.
        reshape: shape to give the kernel's result, where the replaced node has extra dimensions of size one.
    """

    node: fx.Node
    kind: str
    x: fx.Node
    weight: Weight
    extra: fx.Node | None = None
    squeeze_x: int | None = None
    unsqueeze_out: int | None = None

    @property
    def marker(self) -> fx.Node:
        return self.weight.marker


@dataclass(frozen=True)
class Plan:
    """The kernel that was chosen for a match, and the problem it answered for."""

    kernel: Kernel
    problem: Problem


class Rule:
    """One pattern and its rewrite. Rules hold no state."""

    name: ClassVar[str]
    roots: ClassVar[tuple[Any, ...]]

    def pattern(self, node: fx.Node) -> Match | None:
        """The match at this node, or None where the node is not what the rule looks for."""
        raise NotImplementedError

    def check(self, match: Match, target: Target, kernels: Sequence[Kernel]) -> Plan | str:
        """A plan if some kernel of the target takes the match, else the sentence that says why none does."""
        weight, block, activation, dtype = (match.marker.args[i] for i in (0, 3, 4, 5))
        x = value(match.x)
        if x.dtype != dtype:
            return f"its input is {_short(x.dtype)} where the weight dequantizes to {_short(dtype)}"
        shape = tuple(value(weight).shape)
        problem = Problem(
            kind=match.kind,
            x_dtype=x.dtype,
            x_shape=tuple(x.shape),
            weight_shape=shape[1:] if match.weight.matrix is not None else shape,
            block=(block[0], block[1]),
            activation=activation,
            bias=match.kind == "linear" and match.extra is not None,
        )
        kernel, why = choose(kernels, problem, target)
        return why if kernel is None else Plan(kernel, problem)

    def rewrite(self, graph: fx.Graph, match: Match, plan: Plan) -> fx.Node:
        """Builds the replacement right before the matched node and returns it."""
        weight, weight_scale, input_scale = match.marker.args[:3]
        like = match.node
        with before(graph, match.node):
            if match.weight.matrix is not None:
                weight, weight_scale, input_scale = (
                    None if t is None else call(graph, aten.select.int, t, 0, match.weight.matrix, like=like)
                    for t in (weight, weight_scale, input_scale)
                )
            x = match.x
            if match.squeeze_x is not None:
                x = call(graph, aten.squeeze.dim, x, match.squeeze_x, like=like)
            operands = Operands(x, weight, weight_scale, input_scale, match.extra)
            out = plan.kernel.emit(graph, plan.problem, operands, like)
            if match.unsqueeze_out is not None:
                out = call(graph, aten.unsqueeze.default, out, match.unsqueeze_out, like=like)
        return out


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
