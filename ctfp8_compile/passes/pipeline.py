"""The passes, in order: *match → select → rewrite*, and what follows a rewrite.

    graph ── match ──▶ uses of FP8 weights ── select(target) ──▶ decisions ── rewrite ──▶ ctfp8 nodes ── PASSES ──▶ target's ops

`explain` ends with the decisions. A CPU export writes them into the artifact (`annotate`) and decomposes the graph; `load`
reads them, selects from its own machine's kernels and goes on from there. Nothing is decided in two places.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import fx

from ..errors import UsageError
from ..graph import is_marker
from ..report import Entry, Report
from ..target import Target
from .attention import fuse_attention
from .collectives import WAYS
from .combine_linears import combine_linears
from .cse import share_quantization
from .decision import Decision, match, select
from .decompose import decompose
from .embedding import EmbeddingRule
from .experts import GatheredExpertsRule, GroupedExpertsRule
from .linear import BatchedMatmulRule, LinearRule, MatmulRule
from .lower import lower_scaled
from .rewrite import Kernels, rewrite
from .rule import Rule
from .skinny_linear import stream_skinny_linears
from .transforms import transforms

#: Linears come before experts: both may start at `bmm`, and the linear's test (a broadcast weight) is the cheaper one.
RULES: list[Rule] = [
    LinearRule(),
    MatmulRule(),
    BatchedMatmulRule(),
    GroupedExpertsRule(),
    GatheredExpertsRule(),
    EmbeddingRule(),
]

#: What follows a rewrite, each with the reason for its place.
PASSES: tuple[tuple[Callable[[fx.Graph, Kernels], object], str], ...] = (
    (lambda graph, kernels: decompose(graph), "first: what no kernel took is plain ATen, and every dead view of a weight gone"),
    (lambda graph, kernels: share_quantization(graph), "before lowering, while a quantization is one node"),
    (combine_linears, "after sharing, which makes the inputs of q, k and v the same node"),
    (lower_scaled, "last: nothing above knows a target's operators"),
)


def decide(graph: fx.Graph, target: Target, rules: Sequence[Rule] | None = None) -> list[Decision]:
    """What would become of each use of an FP8 weight on a target; the graph stays as it is."""
    return select(match(graph, RULES if rules is None else rules), target)


def apply(
    graph: fx.Graph, target: Target, decisions: Sequence[Decision], lower: bool = True, collectives: str = "as traced"
) -> Report:
    """Rewrites a graph in place as decided, and says what it did.

    Args:
        lower: whether to end with the target's own operators, or with the `ctfp8::` ones that any machine can run.
        collectives: one of `collectives.WAYS`, tried before lowering, while a quantization is one node.
    """
    decisions, kernels = rewrite(graph, decisions)
    rotated = transforms(graph)
    attention = fuse_attention(graph, target)  # before the passes: they make plain ATen of an FP8 cache that is left
    for step, _ in PASSES[:-1]:
        step(graph, kernels)
    for change in WAYS[collectives]:
        change(graph)
    if lower:
        PASSES[-1][0](graph, kernels)
        stream_skinny_linears(graph, target)
    return report(target, decisions, attention, rotated)


def run(
    graph: fx.Graph,
    target: Target,
    rules: Sequence[Rule] | None = None,
    lower: bool = True,
    collectives: str = "as traced",
) -> Report:
    """`decide`, then `apply`.

    Args:
        graph: an ATen graph with fake values in `node.meta["val"]`, from Inductor's post-grad hook or `torch.export`.
    """
    if not any(is_marker(node) for node in graph.nodes):
        rotated = transforms(graph)
        attention = fuse_attention(graph, target)
        decompose(graph)
        if lower:
            stream_skinny_linears(graph, target)
        return report(target, (), attention, rotated)
    return apply(graph, target, decide(graph, target, rules), lower, collectives)


def report(
    target: Target, decisions: Sequence[Decision], attention: Sequence[Entry] = (), transforms: Sequence[Entry] = ()
) -> Report:
    """The report of a list of decisions, of what became of attention, and of transforms of activations."""
    weights = Report.of(str(target), [decision.entry() for decision in decisions])
    return replace(weights, attention=tuple(attention), transforms=tuple(transforms))


def register(rule: Rule) -> Rule:
    """Adds a rule of yours behind the built-in ones, for every graph compiled or lowered in this process from now on.

    A rule of the same class that was registered before gives way to it.

    Raises:
        UsageError: it lacks a name or roots, or overrides what rules of earlier versions could, and would be lost in an
            artifact.
    """
    if not getattr(rule, "name", "") or not getattr(rule, "roots", ()):
        raise UsageError(f"{type(rule).__name__} needs a name and roots: the operators at which its pattern starts.")
    for method in ("check", "rewrite"):
        if hasattr(rule, method):
            raise UsageError(
                f"{type(rule).__name__}.{method}: a rule only finds; what it finds is rewritten here and by whoever loads an "
                "artifact. Say it in the match: passes.Match.of(..., x_views=…, out_views=…); see docs/writing-a-rule.md."
            )
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


