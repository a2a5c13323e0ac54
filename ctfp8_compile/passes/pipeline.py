"""The passes, in order, with the reason for the order.

1. **Rules**: every matmul whose weight is a marker is offered to each rule that starts at its op. Linears come before
   experts because both may start at `bmm`, and the linear's test (a broadcast weight) is the cheaper one.
2. **Clean up**: dead views and markers go. Once, because removing nodes while walking them is quadratic.
3. **Expand**: what no rule took becomes plain ATen. After the rules, because a rule needs to see the marker.
4. **Share**: matmuls with the same input share its quantization. Before lowering, while a quantization is one node.
5. **Join**: matmuls that share a quantized input, of weights that lie side by side, become one. After sharing.
6. **Lower**: scaled matmuls and quantizations become the target's operators. `lower=False` stops before, for a reader.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from ..errors import UsageError
from ..graph import is_marker, is_plumbing, is_view, op_name, parameter_name, trace_weight, value
from ..lowering import kernels_of
from ..report import Entry, Report
from ..target import Target
from .decompose import expand_marker
from .experts import GatheredExpertsRule, GroupedExpertsRule
from .combine_linears import join
from .linear import BatchedMatmulRule, LinearRule, MatmulRule
from .lower import lower_scaled, share_quantization
from .rule import Rule

RULES: list[Rule] = [
    LinearRule(),
    MatmulRule(),
    BatchedMatmulRule(),
    GroupedExpertsRule(),
    GatheredExpertsRule(),
]


def register(rule: Rule) -> Rule:
    """Adds a rule of yours behind the built-in ones, for every graph compiled or lowered in this process from now on.

    A rule of the same class that was registered before gives way to it.
    """
    if not getattr(rule, "name", "") or not getattr(rule, "roots", ()):
        raise UsageError(f"{type(rule).__name__} needs a name and roots: the operators at which its pattern starts.")
    RULES[:] = [r for r in RULES if (type(r).__module__, type(r).__qualname__) != (type(rule).__module__, type(rule).__qualname__)]
    RULES.append(rule)
    return rule


def fingerprint() -> str:
    """The sources of the rules that are not ours; enters Inductor's cache key, as the package's own sources do."""
    own = __name__.partition(".")[0] + "."
    return "".join(_source(type(rule)) for rule in RULES if not type(rule).__module__.startswith(own))


def _source(rule: type) -> str:
    try:
        return inspect.getsource(rule)
    except (OSError, TypeError):  # made without a file
        return repr(sorted((k, getattr(v, "__code__", v)) for k, v in vars(rule).items() if not k.startswith("__")))


def run(graph: fx.Graph, target: Target, rules: Sequence[Rule] = RULES, lower: bool = True) -> Report:
    """Rewrites a graph in place for a target and says what it did.

    Args:
        graph: an ATen graph with fake values in `node.meta["val"]`, from Inductor's post-grad hook or `torch.export`.
        lower: whether to end with the target's own operators, or with the `ctfp8::` ones that any machine can run.
    """
    if not any(is_marker(node) for node in graph.nodes):
        return Report(str(target), (), ())
    kernels = kernels_of(target)
    by_root = defaultdict(list)
    for rule in rules:
        for root in rule.roots:
            by_root[root].append(rule)
    entries: list[Entry] = []
    declined: dict[fx.Node, tuple[str, str]] = {}
    for node in list(graph.nodes):
        for rule in by_root.get(node.target, ()):
            match = rule.pattern(node)
            if match is None:
                continue
            plan = rule.check(match, target, kernels)
            if isinstance(plan, str):
                declined.setdefault(match.marker, (rule.name, plan))
                continue
            before, last = _steps_to(node), node.prev
            new = rule.rewrite(graph, match, plan)
            after = tuple(op_name(step) for step in _nodes_after(last, new) if not is_plumbing(step))
            node.replace_all_uses_with(new, propagate_meta=False)
            graph.erase_node(node)
            entries.append(_entry(match.marker, rule.name, kernel=plan.kernel.name, before=before, after=after))
            break
    _sweep(graph)
    for marker in [node for node in graph.nodes if is_marker(node)]:
        rule_name, why = declined.get(marker) or ("", _unmatched(marker))
        entries.append(_entry(marker, rule_name, reason=why, before=_steps_to(_consumers(marker)[0])))
        marker.replace_all_uses_with(expand_marker(graph, marker), propagate_meta=False)
        graph.erase_node(marker)
    share_quantization(graph)
    join(graph)
    if lower:
        lower_scaled(graph)
    return _report(target, entries)


def _entry(marker: fx.Node, rule: str, **what: Any) -> Entry:
    weight, _, _, block, activation, _ = marker.args
    what = {"kernel": "", "reason": "", **what}
    return Entry(
        parameter_name(marker), rule, shape=tuple(value(weight).shape), block=tuple(block), activation=activation, **what
    )


def _steps_to(node: fx.Node) -> tuple[str, ...]:
    """The operations from a marker to a node that consumes it, through views: `("ctfp8.dequantize", "permute", "mm")`."""
    source = next((a for a in node.all_input_nodes if trace_weight(a) is not None), None)
    return (op_name(node),) if source is None else (*_steps_to(source), op_name(node))


def _nodes_after(first: fx.Node, last: fx.Node) -> Iterator[fx.Node]:
    """The nodes behind `first` up to and with `last`, in the order of the graph."""
    node = first
    while node is not last:
        node = node.next
        yield node


def _report(target: Target, entries: Sequence[Entry]) -> Report:
    """One entry a parameter; where it is used several times, a use that stayed dequantized decides."""
    by_name: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        by_name[entry.name].append(entry)
    merged = [
        replace(next((u for u in uses if u.reason), uses[0]), uses=len(uses)) for uses in by_name.values()
    ]
    return Report(str(target), tuple(e for e in merged if not e.reason), tuple(e for e in merged if e.reason))


def _consumers(marker: fx.Node) -> list[fx.Node]:
    """The nodes that use a weight, behind all views of it."""
    seen: set[fx.Node] = set()
    frontier, consumers = [marker], list[fx.Node]()
    while frontier:
        for user in frontier.pop().users:
            if user in seen:
                continue
            seen.add(user)
            (consumers if trace_weight(user) is None else frontier).append(user)
    return consumers


def _unmatched(marker: fx.Node) -> str:
    """Why no pattern matched: names the operations that consume the weight."""
    names = {str(n.target) if n.op == "call_function" else "the graph's output" for n in _consumers(marker)}
    return f"no rule knows this use of a weight: {', '.join(sorted(names))}"


def _sweep(graph: fx.Graph) -> None:
    """Erases views of weights, and markers, that nothing uses any more."""
    for node in reversed(graph.nodes):
        if not node.users and (is_marker(node) or is_view(node)):
            graph.erase_node(node)
