"""A pipeline: passes in order, checked, printed as one line and read from one, and run in a loop.

horizontal-fusion,match,rewrite,decompose{caches=1},skinny-linears{rows=4,elements=4194304}
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from torch import fx

from ..errors import UsageError
from ..graph import format_graph
from ..report import Ran
from .graph_pass import STAGES, Context, Pass, Stage
from .verify import verified

#: `name` or `name{setting=1,other=2}`, and what follows it.
_ONE = re.compile(r"\s*([\w-]+)\s*(?:\{([^{}]*)\})?\s*(?:,|$)")


@dataclass(frozen=True)
class Pipeline:
    """Passes in the order in which they run.

    Raises:
        UsageError: two have one name, or one stands where it must not.
    """

    passes: tuple[Pass, ...]

    def __post_init__(self) -> None:
        check_order(self.passes)

    def __str__(self) -> str:
        """The line that `parse` reads."""
        return ",".join(map(str, self.passes))

    def without(self, *names: str) -> Pipeline:
        """The others, in their order."""
        return Pipeline(tuple(one for one in self.passes if one.name not in names))

    def run(self, stage: Stage, graph: fx.Graph, context: Context) -> None:
        """Runs the passes of a stage over a graph, in place."""
        for one in self.passes:
            if one.stage != stage:
                continue
            matches, skipped = 0, one.why_not(graph, context)
            if not skipped:
                with verified(graph, one.name):
                    matches = one.run(graph, context, **dict(one.settings))
            text = format_graph(graph) if context.graphs and not skipped else ""
            context.ran.append(Ran(one.name, one.stage, matches, skipped, text))


def check_order(passes: Sequence[Pass]) -> None:
    """See `Pipeline`."""
    place: dict[str, int] = {}
    for at, one in enumerate(passes):
        if place.setdefault(one.name, at) != at:
            raise UsageError(f"the pass {one.name} stands twice in the pipeline. Name it once.")
    for at, one in enumerate(passes):
        late = [name for name in one.after if place.get(name, at) > at]
        early = [name for name in one.before if place.get(name, at) < at]
        for name, order in [(name, "behind") for name in late] + [(name, "before") for name in early]:
            raise UsageError(f"the pass {one.name} has to run {order} {name}: {one.why}. Put them in that order.")
    stages = [STAGES.index(one.stage) for one in passes]
    for one, stage, following in zip(passes, stages, stages[1:], strict=False):
        if stage > following:
            other = passes[place[one.name] + 1]
            raise UsageError(
                f"the pass {other.name} changes the graph as it was traced, and {one.name} the one after that. Put it before "
                "all passes of the later stage."
            )


def chosen(known: Sequence[Pass], asked: Collection[str] = (), without: Collection[str] = ()) -> Pipeline:
    """The passes that run where nothing else is said, with those asked for, without those not wanted."""
    return Pipeline(tuple(p for p in known if (not p.asked or p.name in asked) and p.name not in without))


def parse(line: str, known: Sequence[Pass]) -> Pipeline:
    """A pipeline from its line.

    Raises:
        UsageError: it names a pass or a setting that is not there, or names passes in an order that does not work.
    """
    of = {one.name: one for one in known}
    passes, at = [], 0
    while at < len(line):
        match = _ONE.match(line, at)
        if match is None:
            raise UsageError(
                f"passes {line!r}: {line[at:]!r} cannot be read. Write names with commas: match,rewrite{{n=1}}."
            )
        if match[1] not in of:
            raise UsageError(f"there is no pass {match[1]!r}; there are {', '.join(of)}.")
        passes.append(_with(of[match[1]], match[2] or ""))
        at = match.end()
    return Pipeline(tuple(passes))


def _with(one: Pass, given: str) -> Pass:
    settings = dict(one.settings)
    for part in filter(None, given.split(",")):
        key, _, value = (text.strip() for text in part.partition("="))
        if key not in settings or not value.isdigit():
            takes = ", ".join(f"{key}={value}" for key, value in one.settings) or "none"
            raise UsageError(f"the pass {one.name} takes no setting {part.strip()!r}; it takes {takes}.")
        settings[key] = int(value)
    return replace(one, settings=tuple(settings.items()))


def inserted(one: Pass, known: Sequence[Pass]) -> list[Pass]:
    """The passes with one more, which takes the place that its constraints give it, or else the last of its stage.

    Raises:
        UsageError: there is no such place, or it names passes that are not there.
    """
    others = [other for other in known if other.name != one.name]
    place = {other.name: at for at, other in enumerate(others)}
    for name in (*one.after, *one.before):
        if name not in place:
            raise UsageError(
                f"the pass {one.name} is to run before or behind {name}; there is no such pass, but {', '.join(place)}."
            )
    last = max((at for at, other in enumerate(others) if other.stage == one.stage), default=len(others) - 1)
    at = min((place[name] for name in one.before), default=last + 1)
    if one.after:
        at = max(place[name] for name in one.after) + 1
    found = [*others[:at], one, *others[at:]]
    check_order(found)
    return found
