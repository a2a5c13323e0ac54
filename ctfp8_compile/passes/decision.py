"""What becomes of each use of an FP8 weight: found by rules (`match`), and given a kernel or a reason (`select`).

A list of decisions is what all ways through the package share: `explain` shows it, a compiled graph is rewritten by it, and
an artifact carries it to the machine that runs it (`annotate`), which selects again from its own kernels.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from ..graph import is_marker, op_name, parameter_name, trace_weight, value
from ..lowering import Kernel, Problem, choose, kernels_of
from ..report import Entry
from ..target import Target
from .rule import Match, Rule


@dataclass(frozen=True)
class Decision:
    """One use of an FP8 weight: a kernel that takes it, or the reason why it stays dequantized.

    Attributes:
        parameter, shape, block, activation: the weight, as in `report.Entry`.
        rule: the rule that matched; empty if none did.
        match: what it found; None if no rule knows this use.
        problem, kernel: what was asked and the kernel that said yes; None where the weight stays dequantized.
        reason: why it does; empty where it does not.
        declined: why kernels that come before the one chosen declined.
        note: what the chosen kernel has to say to who gets it.
        before, after: the operations from the weight to its use, as traced and as rewritten.
    """

    parameter: str
    shape: tuple[int, ...]
    block: tuple[int, int]
    activation: str
    rule: str = ""
    match: Match | None = None
    problem: Problem | None = None
    kernel: Kernel | None = None
    reason: str = ""
    declined: str = ""
    note: str = ""
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()

    def entry(self) -> Entry:
        """As the report shows it."""
        kernel = self.kernel.name if self.kernel is not None else ""
        return Entry(self.parameter, self.rule, kernel, self.reason, self.shape, self.block, self.activation,
                     before=self.before, after=self.after, declined=self.declined, note=self.note)  # fmt: skip


def match(graph: fx.Graph, rules: Sequence[Rule]) -> list[Decision]:
    """Every use of every FP8 weight in a graph, in its order; those that no rule knows last, with that reason."""
    by_root = defaultdict(list)
    for rule in rules:
        for root in rule.roots:
            by_root[root].append(rule)
    decisions: list[Decision] = []
    known: set[tuple[fx.Node, fx.Node]] = set()
    for node in graph.nodes:
        for rule in by_root.get(node.target, ()):
            if (found := rule.pattern(node)) is not None:
                known.add((found.weight, node))
                decisions.append(found_by(rule.name, found, _steps_to(node)))
                break
    for marker in [node for node in graph.nodes if is_marker(node)]:
        uses = _consumers(marker)
        if unknown := [use for use in uses if (marker.args[0], use) not in known]:
            names = sorted({str(n.target) if n.op == "call_function" else "the graph's output" for n in unknown})
            weight, _, _, block, activation, _ = marker.args
            decisions.append(
                Decision(
                    parameter_name(marker), tuple(value(weight).shape), (block[0], block[1]), activation,
                    reason=f"no rule knows this use of a weight: {', '.join(names)}", before=_steps_to(unknown[0]),
                )
            )  # fmt: skip
    return decisions


def found_by(rule: str, found: Match, before: tuple[str, ...] = ()) -> Decision:
    """A decision that is still to be made."""
    shape = tuple(value(found.weight).shape)
    return Decision(found.parameter, shape, found.block, found.activation, rule, found, before=before)


def select(decisions: Sequence[Decision], target: Target) -> list[Decision]:
    """Gives each match the first kernel of the target that is eligible, or the sentences of those that declined."""
    kernels = kernels_of(target)
    return [d if d.match is None else _select(d, d.match, target, kernels) for d in decisions]


def _select(decision: Decision, found: Match, target: Target, kernels: Sequence[Kernel]) -> Decision:
    x = value(found.x)
    if x.dtype != found.dtype and found.kind != "embedding":
        why = f"its input is {_short(x.dtype)} where the weight dequantizes to {_short(found.dtype)}"
        return replace(decision, problem=None, kernel=None, reason=why, declined="", note="")
    shape = decision.shape
    problem = Problem(
        kind=found.kind,
        x_dtype=x.dtype,
        x_shape=tuple(x.shape),
        weight_shape=shape if found.matrix is None else shape[1:],
        block=found.block,
        activation=found.activation,
        bias=found.bias is not None,
        exponents=value(found.weight_scale).dtype == torch.uint8,
    )
    kernel, why = choose(kernels, problem, target)
    reason, declined = (why, "") if kernel is None else ("", why)
    note = "" if kernel is None else kernel.note
    return replace(decision, problem=problem, kernel=kernel, reason=reason, declined=declined, note=note)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _steps_to(node: fx.Node) -> tuple[str, ...]:
    """The operations from a marker to a node that consumes it, through views: `("ctfp8.dequantize", "permute", "mm")`."""
    source = next((a for a in node.all_input_nodes if trace_weight(a) is not None), None)
    return (op_name(node),) if source is None else (*_steps_to(source), op_name(node))


def _consumers(marker: fx.Node) -> list[fx.Node]:
    """The nodes that use a weight, behind all views of it."""
    return list(dict.fromkeys(_uses(marker)))


def _uses(node: fx.Node) -> Iterator[Any]:
    for user in node.users:
        if trace_weight(user) is None:
            yield user
        else:
            yield from _uses(user)
