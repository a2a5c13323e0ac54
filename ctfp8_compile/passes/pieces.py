"""The pieces of a graph that may be regions: of each instance of its repeated layers, the nodes between two writes to memory.

    layer 0: norm, q, k, v, rotary | copy_ into the cache | attention, o, norm, gate, up, down        two pieces
    layer 1: norm, q, k, v, rotary | copy_ into the cache | attention, o, norm, gate, up, down        two like them

Which pieces compute the same is asked of their `key`; `region_calls` makes one subgraph of those that do.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..compat import HigherOrderOperator, OpOverload
from ..graph import fake_value, is_traced_marker, module_path
from .effects import only_computes

_SMALLEST = 3  # nodes of a region


@dataclass(frozen=True)
class Piece:
    """Nodes of a layer between two writes."""

    nodes: tuple[fx.Node, ...]

    @property  # not kept: when other pieces become calls, theirs are among them
    def inputs(self) -> tuple[fx.Node, ...]:
        """What they read, in the order in which they first do."""
        own = set(self.nodes)
        return tuple(dict.fromkeys(a for node in self.nodes for a in node.all_input_nodes if a not in own))

    @property
    def read_outside(self) -> tuple[int, ...]:
        own = set(self.nodes)
        return tuple(i for i, node in enumerate(self.nodes) if any(user not in own for user in node.users))


def write_out_sizes(graph: fx.Graph) -> None:
    """Sizes that were fixed while dynamo traced, such as the batch of a static cache: the first layers ask for them."""
    for node in list(graph.nodes):
        found = value_of(node)
        number = found.node.maybe_as_int() if isinstance(found, torch.SymInt) else None
        if number is not None and node.op == "call_function":
            written: Any = lambda n, node=node, number=number: number if n is node else n  # noqa: E731 - map_arg is typed for nodes only
            for user in list(node.users):
                user.args, user.kwargs = fx.node.map_arg((user.args, user.kwargs), written)
            graph.erase_node(node)
    for node in graph.find_nodes(op="call_method", target="size"):
        if not node.users:
            graph.erase_node(node)


def layers_of(graph: fx.Graph, least: int) -> dict[Any, list[fx.Node]]:
    """The nodes of each instance of the outermost module class that covers most of the graph: from its first to its last.

    Classes of which there are fewer instances do not count.
    """
    groups: dict[Any, dict[Any, list[int]]] = defaultdict(lambda: defaultdict(list))
    nodes = list(graph.nodes)
    for at, node in enumerate(nodes):
        if node.op in ("call_function", "call_method"):
            for kind, path in module_path(node):
                if path and path[-1].isdigit():
                    groups[kind, path[:-1]][path].append(at)
    found: dict[Any, list[fx.Node]] = {}
    covered = 0
    for instances in groups.values():  # outer modules come first
        spans = sorted((places[0], places[-1], path) for path, places in instances.items())
        if len(spans) < least or any(one[1] >= other[0] for one, other in itertools.pairwise(spans)):
            continue
        size = sum(len(places) for places in instances.values())
        if size > covered:
            covered = size
            found = {path: nodes[begin : end + 1] for begin, end, path in spans}
    return found


def pieces_of(layer: Sequence[fx.Node]) -> Iterator[Piece]:
    piece: list[fx.Node] = []
    own: set[int] = set()  # the memory of what the piece makes
    for node in layer:
        if node.op in ("placeholder", "get_attr") or _is_weight(node) or _is_size(node):
            continue
        if only_computes(node) or _writes_within(node, own):
            own |= memory(node).difference(*map(memory, node.all_input_nodes))
            piece.append(node)
        else:
            yield Piece(tuple(piece))
            piece, own = [], set()
    yield Piece(tuple(piece))


def with_parameters(graph: fx.Graph, pieces: Sequence[Piece]) -> list[Piece]:
    """Pieces, and where they use them, weights, which a write may part from their use, and what was declared of parameters
    (`horizontal_fusion`, `prepack`), which stands in front of the graph."""
    pieces = [_with_sizes(graph, piece) for piece in pieces if len(piece.nodes) >= _SMALLEST]
    of = {node: i for i, piece in enumerate(pieces) for node in piece.nodes}
    more: dict[int, list[fx.Node]] = defaultdict(list)
    for node in reversed(graph.nodes):
        if node not in of and (_is_weight(node) or _is_declared(node)):
            homes = {of.get(user) for user in node.users}
            if len(homes) == 1 and (home := homes.pop()) is not None:
                of[node] = home
                more[home].insert(0, node)
    return [Piece((*more[i], *piece.nodes)) for i, piece in enumerate(pieces)]


def _with_sizes(graph: fx.Graph, piece: Piece) -> Piece:
    """A piece that computes what it needs of the graph's sizes: dynamo lets the first layer do it for all."""
    own: dict[fx.Node, fx.Node] = {}

    def owned(node: fx.Node) -> fx.Node:
        if not _is_size(node):
            return node
        if node not in own:
            with graph.inserting_before(piece.nodes[0]):
                own[node] = graph.node_copy(node, owned)
            own[node].meta["nn_module_stack"] = piece.nodes[0].meta.get("nn_module_stack", {})
        return own[node]

    for node in piece.nodes:
        node.args, node.kwargs = fx.node.map_arg((node.args, node.kwargs), owned)
    return Piece((*own.values(), *piece.nodes))


def key_of(piece: Piece) -> Any:
    """Equal for pieces that compute the same of inputs of the same kind."""
    places: dict[fx.Node, str] = {node: f"%{i}" for i, node in enumerate(piece.nodes)}
    places |= {node: f"input {i}" for i, node in enumerate(piece.inputs)}
    steps = []
    for node in piece.nodes:
        placed: Any = lambda n: _Place(places[n])  # noqa: E731 - map_arg is typed for arguments of nodes only
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), placed)
        steps.append((node.op, node.target, repr(args), repr(kwargs)))
    return tuple(steps), tuple(_kind(node) for node in piece.inputs)


@dataclass(frozen=True)
class _Place:
    name: str


def _kind(node: fx.Node) -> Any:
    found = value_of(node)
    if isinstance(found, Tensor):
        return (
            tuple(map(str, found.shape)), tuple(map(str, found.stride())), str(found.storage_offset()), found.dtype, found.device,
            found.requires_grad,
        )  # fmt: skip
    return type(found), str(found) if isinstance(found, (int, torch.SymInt)) else id(node)


def value_of(node: fx.Node) -> Any:
    """What a node stands for; None where dynamo does not say, such as for a constant of the graph."""
    return fake_value(node) if "val" in node.meta or "example_value" in node.meta else None


def memory(node: fx.Node) -> set[int]:
    found = value_of(node)
    parts = found if isinstance(found, (tuple, list)) else [found]
    return {part.untyped_storage()._cdata for part in parts if isinstance(part, Tensor)}


def _is_size(node: fx.Node) -> bool:
    """Whether a node computes a number, and of the graph's dynamic sizes alone."""
    inputs = node.all_input_nodes
    return (
        node.op == "call_function"
        and isinstance(value_of(node), (torch.SymInt, torch.SymFloat, torch.SymBool))
        and all((n.op == "placeholder" and isinstance(value_of(n), torch.SymInt)) or _is_size(n) for n in inputs)
    )


def _is_weight(node: fx.Node) -> bool:
    """Whether a node is a marker of a weight, or a view of one."""
    if is_traced_marker(node) or len(node.all_input_nodes) != 1:
        return is_traced_marker(node)
    return (
        bool(memory(node)) and memory(node) <= memory(node.all_input_nodes[0]) and _is_weight(node.all_input_nodes[0])
    )


def _is_declared(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and only_computes(node) and _of_parameters(node)


def _of_parameters(node: fx.Node) -> bool:
    return all(n.op == "placeholder" or _of_parameters(n) for n in node.all_input_nodes)


def _writes_within(node: fx.Node, own: set[int]) -> bool:
    """Whether a node that does not only compute, does nothing else than to write to memory of its piece's own."""
    given = {m for n in node.all_input_nodes for m in memory(n)}
    return bool(given) and given <= own and not isinstance(node.target, HigherOrderOperator)
