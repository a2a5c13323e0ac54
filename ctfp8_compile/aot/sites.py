"""Where the FP8 matmuls of a saved graph are, so that whoever loads it can put the machine's own kernel back.

A graph in a file is plain ATen, so that anything can run it. `record` notes at each matmul what a rule matched there, under
`meta["custom"]`, which `torch.export.save` keeps with the node. `pick` offers each of those matmuls to the kernels of the
machine that loads the file; where one takes it, the kernel replaces the matmul and its weight is not dequantized any more.

    in the file                                             after `pick`
    %f = to(%w, f32)                                        %y = ctfp8.dequantized_linear(%x, %w, %s, %b, block)
    %m = mul(%f, %s)
    %d = to(%m, bf16)
    %y = linear(%x, %d, %b)    # {"ctfp8": {"weight": …}}

Notes on nodes are simpler and safer than recognising our own arithmetic again: nothing has to be matched, and a graph
whose notes were stripped is still right. Rules are not needed, so loading needs neither transformers nor a checkpoint.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ..errors import ArtifactError
from ..graph import before, call, value
from ..lowering import KINDS, Operands, Problem, choose, kernels_of
from ..ops import FP8
from ..report import Entry
from ..target import Target

if TYPE_CHECKING:
    from ..passes import Rule

KEY = "ctfp8"
aten = torch.ops.aten


@dataclass(frozen=True)
class Site:
    """One matmul with an FP8 weight, as a rule matched it; nodes by name.

    Attributes:
        kind, block, activation: as in `lowering.Problem`.
        parameter: the model's name of the weight.
        matrix, squeeze_x, unsqueeze_out: as in `passes.Match`.
    """

    rule: str
    kind: str
    parameter: str
    x: str
    weight: str
    weight_scale: str
    input_scale: str | None
    extra: str | None
    matrix: int | None
    squeeze_x: int | None
    unsqueeze_out: int | None
    block: tuple[int, int]
    activation: str

    @staticmethod
    def read(note: Any, node: str) -> Site:
        """From what `torch.export.load` gives back.

        Raises:
            ArtifactError: not what `record` writes.
        """
        try:
            site = Site(**{**note, "block": tuple(note["block"])})
        except (TypeError, KeyError):
            raise ArtifactError(
                f"{node}: its note for ctfp8 is not one that ctfp8 wrote. Export the model again."
            ) from None
        if site.kind not in KINDS:
            raise ArtifactError(f"{node}: its note for ctfp8 is of an unknown kind, {site.kind!r}.")
        names = (site.rule, site.kind, site.parameter, site.x, site.weight, site.weight_scale, site.activation)
        numbers = [n for n in (site.matrix, site.squeeze_x, site.unsqueeze_out) if n is not None] + [*site.block]
        if not all(isinstance(n, str) for n in names) or not all(isinstance(n, int) for n in numbers):
            raise ArtifactError(f"{node}: its note for ctfp8 was edited. Export the model again.")
        return site


def record(graph: fx.Graph, rules: Iterable[Rule]) -> None:
    """Notes at each matmul that a rule matches what it matched. The graph itself stays as it is."""
    by_root = defaultdict(list)
    for rule in rules:
        for root in rule.roots:
            by_root[root].append(rule)
    for node in graph.nodes:
        for rule in by_root.get(node.target, ()):
            match = rule.pattern(node)
            if match is None or not isinstance(match.weight.matrix, int | None):
                continue
            weight, weight_scale, input_scale, block, activation, dtype = match.marker.args
            if value(match.x).dtype != dtype:
                continue  # the rule's own check would decline it
            site = Site(
                rule.name, match.kind, match.weight.name, match.x.name, weight.name, weight_scale.name,
                input_scale and input_scale.name, match.extra and match.extra.name, match.weight.matrix,
                match.squeeze_x, match.unsqueeze_out, tuple(block), activation,
            )  # fmt: skip
            node.meta["custom"] = {**node.meta.get("custom", {}), KEY: asdict(site)}
            break


def pick(graph: fx.Graph, target: Target) -> list[Entry]:
    """Puts a kernel of this machine at each site where one takes it; one entry a site.

    Raises:
        ArtifactError: a note names a node that is not there.
    """
    kernels = kernels_of(target)
    nodes = {node.name: node for node in graph.nodes}
    entries = []
    for node in list(graph.nodes):
        note = (node.meta.get("custom") or {}).get(KEY)
        if note is None:
            continue
        site = Site.read(note, node.name)
        operands = Operands(*(_node(nodes, name, node) for name in
                              (site.x, site.weight, site.weight_scale, site.input_scale, site.extra)))  # fmt: skip
        x, weight, scale = value(operands.x), value(operands.weight), value(operands.weight_scale)
        if not _fits(site.block, weight, scale):
            raise ArtifactError(f"{node}: its note for ctfp8 does not fit its weight. Export the model again.")
        problem = Problem(
            kind=site.kind,
            x_dtype=x.dtype,
            x_shape=tuple(x.shape),
            weight_shape=tuple(weight.shape if site.matrix is None else weight.shape[1:]),
            block=site.block,
            activation=site.activation,
            bias=site.kind == "linear" and site.extra is not None,
        )
        kernel, why = choose(kernels, problem, target)
        if kernel is not None:
            try:
                with before(graph, node):
                    new = _emit(graph, kernel, problem, operands, site, node)
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                raise ArtifactError(f"{node}: its note for ctfp8 does not fit the graph ({error}).") from error
            node.replace_all_uses_with(new, propagate_meta=False)
            nodes[node.name] = new  # a later note may name it as its input
            graph.erase_node(node)
        entries.append(
            Entry(site.parameter, site.rule, kernel.name if kernel else "", why, tuple(weight.shape), site.block,
                  site.activation)
        )  # fmt: skip
    graph.eliminate_dead_code()
    return entries


def _node(nodes: dict[str, fx.Node], name: str | None, site: fx.Node) -> Any:
    if name is None:
        return None
    if name not in nodes:
        raise ArtifactError(f"{site.name}: its note for ctfp8 names {name!r}, which is not in the graph.")
    return nodes[name]


def _fits(block: tuple[int, int], weight: torch.Tensor, scale: torch.Tensor) -> bool:
    if weight.dtype != FP8 or scale.dtype != torch.float32 or min(block) < 1:
        return False
    rows, cols = weight.shape[-2:]
    return scale.shape == (*weight.shape[:-2], math.ceil(rows / block[0]), math.ceil(cols / block[1]))


def _emit(graph: fx.Graph, kernel: Any, problem: Problem, operands: Operands, site: Site, like: fx.Node) -> fx.Node:
    """As `passes.Rule.rewrite`, from a note instead of a match."""
    x, weight, weight_scale, input_scale = operands.x, operands.weight, operands.weight_scale, operands.input_scale
    if site.matrix is not None:
        weight, weight_scale, input_scale = (
            None if t is None else call(graph, aten.select.int, t, 0, site.matrix, like=like)
            for t in (weight, weight_scale, input_scale)
        )
    if site.squeeze_x is not None:
        x = call(graph, aten.squeeze.dim, x, site.squeeze_x, like=like)
    out = kernel.emit(graph, problem, Operands(x, weight, weight_scale, input_scale, operands.extra), like)
    return (
        out if site.unsqueeze_out is None else call(graph, aten.unsqueeze.default, out, site.unsqueeze_out, like=like)
    )
