"""Decisions in an artifact: what a rule found, by names of nodes, so that whoever loads it can select its own kernels.

A graph in a file is plain ATen, so that anything can run it, and a graph without its notes is still right. On loading, a
kernel of that machine replaces each matmul that one takes, and its weight is not dequantized any more:

    in the file                                             loaded
    %f = to(%w, f32)                                        %y = ctfp8.dequantized_linear(%x, %w, %s, %b, block)
    %m = mul(%f, %s)
    %d = to(%m, bf16)
    %y = linear(%x, %d, %b)

Rules that a user registered are not needed there. The built-in ones are matched again, to hold a note against its graph
(`fold`). Loading needs neither transformers nor a checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import fx

from ..errors import ArtifactError
from ..graph import value
from ..lowering import KINDS
from ..ops import FP8
from .decision import Decision, found_by, match
from .fold import Folder
from .rule import VIEW_OPS, Match, View
from .rules import RULES

_NODES = ("node", "x", "weight", "weight_scale", "input_scale", "bias", "offs", "expert_ids")
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.bfloat16, torch.float16, torch.float32)}


@dataclass(frozen=True)
class Note:
    """A `Match` in plain types, as JSON holds it: nodes by name, a dtype by name, a view as its operator and dimensions."""

    rule: str
    node: str
    kind: str
    x: str
    weight: str
    weight_scale: str
    input_scale: str | None
    parameter: str
    block: tuple[int, int]
    activation: str
    dtype: str
    matrix: int | str | None
    bias: str | None
    offs: str | None
    expert_ids: str | None
    x_views: tuple[tuple[str, tuple[int, ...]], ...]
    out_views: tuple[tuple[str, tuple[int, ...]], ...]


def notes(decisions: Sequence[Decision], graph: fx.Graph, replaced: Mapping[fx.Node, fx.Node]) -> tuple[Note, ...]:
    """What rules found in a graph.

    Args:
        replaced: nodes that are not in the graph any more, such as markers, and what took their place.
    """
    alive = set(graph.nodes)
    matches = [(d.rule, d.match.mapped(lambda n: replaced.get(n, n))) for d in decisions if d.match is not None]
    return tuple(
        Note(rule, **{field.name: _plain(getattr(match, field.name)) for field in fields(Match)})
        for rule, match in matches
        if match.node in alive
    )


def _plain(item: Any) -> Any:
    if isinstance(item, fx.Node):
        return item.name
    if isinstance(item, View):
        return item.op, item.dims
    if isinstance(item, torch.dtype):
        return str(item).removeprefix("torch.")
    return tuple(map(_plain, item)) if isinstance(item, tuple) else item


def read(noted: Sequence[Note], graph: fx.Graph) -> list[Decision]:
    """Decisions that are still to be made, from `notes`; markers stand in the graph again where notes name a weight.

    Raises:
        ArtifactError: they do not fit the graph, or say other than it does.
    """
    nodes = {node.name: node for node in graph.nodes}
    decisions = [_read(note, nodes) for note in noted]
    folder = Folder(graph)
    for decision in decisions:
        assert decision.match is not None
        if not folder.fold(decision.match):
            raise _lie(decision.match)
    found = {again.match.node: again for again in match(graph, RULES) if again.match is not None}
    for decision in decisions:
        assert decision.match is not None
        _agree(decision.match, decision.rule, found.get(decision.match.node))
    return decisions


def _agree(noted: Match, rule: str, found: Decision | None) -> None:
    """A note says what its rule finds in the graph; of a rule that is not registered here, its operands are the node's."""
    if found is not None and found.match is not None and found.rule == rule:
        if replace(found.match, parameter=noted.parameter) != noted:
            raise _lie(noted)
    elif rule in {known.name for known in RULES} or any(
        n is not None and n not in noted.node.all_input_nodes
        for n in (noted.x, noted.bias, noted.offs, noted.expert_ids)
    ):
        raise _lie(noted)


def _lie(noted: Match) -> ArtifactError:
    return ArtifactError(f"{noted.node}: its note says other than the graph does. {_AGAIN}")


def _read(note: Note, nodes: Mapping[str, fx.Node]) -> Decision:
    if note.kind not in KINDS:
        raise ArtifactError(f"{note.node}: its note is of an unknown kind, {note.kind!r}. {_AGAIN}")
    if note.dtype not in _DTYPES or min(note.block) < 1:
        raise ArtifactError(f"{note.node}: its note is of {note.dtype} in blocks of {note.block}. {_AGAIN}")
    found = {name: _node(nodes, note, name) for name in _NODES}
    matrix = _node(nodes, note, "matrix") if isinstance(note.matrix, str) else note.matrix
    one = Match(
        **found, kind=note.kind, parameter=note.parameter, block=note.block, activation=note.activation,
        dtype=_DTYPES[note.dtype], matrix=matrix, x_views=_views(note, note.x_views), out_views=_views(note, note.out_views),
    )  # fmt: skip
    if not _fits(one):
        raise ArtifactError(f"{note.node}: its note does not fit its weight. {_AGAIN}")
    return found_by(note.rule, one)


_AGAIN = "Export the model again."


def _node(nodes: Mapping[str, fx.Node], note: Note, which: str) -> Any:
    name = getattr(note, which)
    if name is None:
        return None
    if name not in nodes:
        raise ArtifactError(f"{note.node}: its note names {name!r}, which is not in the graph. {_AGAIN}")
    if not isinstance(value(nodes[name]), torch.Tensor) and which != "matrix":
        raise ArtifactError(f"{note.node}: its note names {name!r}, which is no tensor. {_AGAIN}")
    return nodes[name]


def _views(note: Note, views: Sequence[tuple[str, tuple[int, ...]]]) -> tuple[View, ...]:
    if any(op not in VIEW_OPS or len(dims) != (2 if op == "transpose" else 1) for op, dims in views):
        raise ArtifactError(f"{note.node}: its note has views that ctfp8 does not write. {_AGAIN}")
    return tuple(View(op, dims) for op, dims in views)  # type: ignore[arg-type]


def _fits(match: Match) -> bool:
    """Whether a weight and its scales have the dtypes and sizes that kernels read."""
    weight, scale = value(match.weight), value(match.weight_scale)
    rank = 2 if match.kind in ("linear", "embedding") and match.matrix is None else 3
    if weight.dtype != FP8 or weight.dim() != rank:
        return False
    if scale.dtype != torch.float32 and (scale.dtype, match.block) != (torch.uint8, (1, 32)):
        return False
    rows, cols = weight.shape[-2:]
    return scale.shape == (*weight.shape[:-2], math.ceil(rows / match.block[0]), math.ceil(cols / match.block[1]))
