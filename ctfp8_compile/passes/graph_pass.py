"""What a pass is: a name, the function that changes a graph, and where it may stand among the others.

    def remove_clones(graph: fx.Graph, context: Context) -> int: ...      # changes the graph; says how often

    Pass("remove-clones", "post_grad", remove_clones, why="behind lowering, which adds them", after=("lower-scaled",))

A graph is valid after every pass: it passes `graph.lint()`, and each new node has the fake value that its operator gives
(`verify` checks both). So any part of the pipeline can be run, and a fault is that of the pass after which it shows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import fx
from torch.export import ExportedProgram

from ..report import Entry, Ran
from ..target import Target
from .decision import Decision
from .prepack import Prepacked
from .regions import Regions
from .rewrite import Kernels
from .rule import Rule

#: `traced`: the graph as dynamo or torch.export gives it, with linears whole. `post_grad`: functional ATen, as Inductor has it
#: at its post-grad hook. A program of torch.export is one graph that goes through both.
Stage = Literal["traced", "post_grad"]
STAGES: tuple[Stage, ...] = ("traced", "post_grad")
#: `compile`: `torch.compile`. `export`: a program of torch.export, to run or to write. `load`: a program read from a file.
Way = Literal["compile", "export", "load"]


@dataclass
class Context:
    """What the passes over one graph know, and what they leave for those behind them.

    Attributes:
        target: what the graph is for.
        way: how it came here.
        rules: those that find matmuls; None for all that are registered.
        program: whose graph it is, where its parameters may change too.
        decisions: what becomes of each use of an FP8 weight, once `match` has run, or notes were read; `rewrite` adds what it
            built.
        kernels: which kernel lowers a node, from `rewrite` on.
        attention: what became of each attention to a cache.
        transforms: those of activations, of a rotated checkpoint; as traced.
        packed: groups of placeholders that have to be packed in memory when the graph is called.
        prepacked: what a placeholder stands for from now on.
        regions: what became of repeated layers.
        replaced: what took the place of each marker that was decomposed.
        ran: what each pass did.
        graphs: whether `ran` holds the graph after each pass, as text.
    """

    target: Target
    way: Way = "export"
    rules: Sequence[Rule] | None = None
    program: ExportedProgram | None = None
    decisions: list[Decision] = field(default_factory=list)
    kernels: Kernels = field(default_factory=dict)
    attention: list[Entry] = field(default_factory=list)
    transforms: list[Entry] = field(default_factory=list)
    packed: list[list[fx.Node]] = field(default_factory=list)
    prepacked: list[Prepacked] = field(default_factory=list)
    regions: Regions = field(default_factory=Regions)
    replaced: Mapping[fx.Node, fx.Node] = field(default_factory=dict)
    ran: list[Ran] = field(default_factory=list)
    graphs: bool = False


def _never(context: Context) -> str:
    return ""


@dataclass(frozen=True)
class Pass:
    """One step of the pipeline.

    Attributes:
        name: lower case, with hyphens.
        stage: which of the two graphs it changes.
        run: changes a graph in place; takes the settings by name; returns how many matches it changed.
        why: the reason for its place.
        after, before: passes that stand before it, or behind it, in every pipeline that has them.
        operators: it has nothing to do in a graph without any of them; empty: it always looks.
        ways: how a graph came here, if it is to run.
        skips: why it has nothing to do in a context; empty if it may have.
        asked: whether it runs only where it is asked for.
        settings: numbers that it takes, with their values.
    """

    name: str
    stage: Stage
    run: Callable[..., int]
    why: str
    after: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    operators: tuple[Any, ...] = ()
    ways: tuple[Way, ...] = ("compile", "export", "load")
    skips: Callable[[Context], str] = _never
    asked: bool = False
    settings: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        """`name`, or `name{setting=1}`."""
        settings = ",".join(f"{key}={value}" for key, value in self.settings)
        return f"{self.name}{{{settings}}}" if settings else self.name

    def why_not(self, graph: fx.Graph, context: Context) -> str:
        """Why it has nothing to do in a graph; empty if it may have."""
        if context.way not in self.ways:
            return f"only in {' and '.join(map(_WAYS.__getitem__, self.ways))}"
        if reason := self.skips(context):
            return reason
        if self.operators and not any(
            graph.find_nodes(op="call_function", target=operator, sort=False) for operator in self.operators
        ):
            return "none of its operators is in the graph"
        return ""


_WAYS: dict[Way, str] = {
    "compile": "torch.compile",
    "export": "programs of torch.export",
    "load": "loading an artifact",
}
