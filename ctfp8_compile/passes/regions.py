"""Layers that compute the same become calls of one subgraph, which is then compiled once.

    before                                              after
    %q0 = linear(%h, dequantize(%w0, …))                %r0 = invoke_subgraph(ctfp8_region_0, %h, %w0, …)
    …                                                   %h1 = getitem(%r0, 0)
    %h1 = add(%h, %y0)                                  %r1 = invoke_subgraph(ctfp8_region_0, %h1, %w1, …)
    %q1 = linear(%h1, dequantize(%w1, …))               %h2 = getitem(%r1, 0)
    …

This is done to the graph that dynamo made of the whole model, so a model needs no preparation, and what cannot be a region stays
where it is. A layer is cut where it writes to memory, such as a cache: the write stays in the graph around it, where Inductor sees
what it is to and does it in place, and each piece is a region of its own.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from ..compat import HigherOrderOperator, OpOverload, OpOverloadPacket, free_symbols, invoke_subgraph
from ..graph import arguments, fake_value, is_traced_marker, module_name, module_path, parameter_name
from ..report import Entry, Report
from .effects import only_computes

#: Fewer layers are compiled one by one: what they cost is little, and calls of a region are not fused with what is around them.
LEAST = 4
_SMALLEST = 3  # nodes of a region


@dataclass(frozen=True)
class Regions:
    """What became of a graph's repeated layers.

    Attributes:
        said: in the report; empty where nothing repeats.
        names: of each further instance of a region: by a name in what is compiled, the name there.
        order: all names, as they were in the graph.
        stacks: of each call, by the names of its region's nodes, in which modules the nodes it stands for were traced.
    """

    said: str = ""
    names: tuple[Mapping[str, str], ...] = ()
    order: tuple[str, ...] = ()
    stacks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def report(self, parts: Sequence[Report]) -> Report:
        """One report of all that was compiled: of the graph around the regions, and of each region."""
        weights = self._spread(entry for part in parts for entry in (*part.rewritten, *part.kept))
        attention = self._spread(entry for part in parts for entry in part.attention)
        rotated = self._spread(entry for part in parts for entry in part.transforms)
        whole = Report.of(parts[0].target, weights)
        return replace(whole, attention=tuple(attention), transforms=tuple(rotated), layers=self.said)

    def _spread(self, entries: Iterable[Entry]) -> list[Entry]:
        """Entries of a region for each of its instances; all in the graph's order."""
        entries, every = list(entries), []
        compiled = {entry.name for entry in entries}  # a module may be in part in a region
        for entry in entries:
            others = (names[entry.name] for names in self.names if entry.name in names)
            every += [entry, *(replace(entry, name=name) for name in dict.fromkeys(others) if name not in compiled)]
        place = {name: i for i, name in enumerate(self.order)}
        return sorted(every, key=lambda entry: place.get(entry.name, 0))


def declare(gm: fx.GraphModule) -> Regions:
    """Makes regions of repeated layers, in place, in a graph of dynamo's."""
    _write_out_sizes(gm.graph)
    layers = _layers(gm.graph)
    if len(layers) < LEAST:
        return Regions()
    order = tuple(dict.fromkeys(name for node in gm.graph.nodes for name in _names(node)))
    alike: dict[Any, list[_Piece]] = defaultdict(list)
    for piece in _with_parameters(gm.graph, [piece for layer in layers.values() for piece in _pieces(layer)]):
        alike[_key(piece)].append(piece)
    names: list[Mapping[str, str]] = []
    stacks: dict[str, Mapping[str, Any]] = {}
    regions = 0
    for pieces in alike.values():
        if len(pieces) >= LEAST and (outputs := _outputs(pieces)):
            names += [_renamed(pieces[0], piece) for piece in pieces[1:]]
            stacks |= _replace(gm, f"ctfp8_region_{regions}", pieces, outputs)
            regions += 1
    what = f"{len(layers)} repeated layers"
    if not regions:
        return Regions(f"{what} compiled one by one: they differ")
    gm.graph.lint()
    return Regions(f"{what} compiled as {regions} region{'s' * (regions > 1)}", tuple(names), order, stacks)


def inline(gm: fx.GraphModule, stacks: Mapping[str, Mapping[str, Any]]) -> None:
    """Undoes `declare`, in place."""
    for call in gm.graph.find_nodes(op="call_function", target=invoke_subgraph):
        attribute, _, *operands = arguments(call)
        inner: Any = gm.get_submodule(str(attribute.target)).graph
        given = dict(zip(inner.find_nodes(op="placeholder"), operands, strict=True))
        with gm.graph.inserting_before(call):
            results: Any = gm.graph.graph_copy(inner, given)
        for node in inner.nodes:
            if node.name in stacks[call.name]:
                given[node].meta["nn_module_stack"] = stacks[call.name][node.name]
        for part in list(call.users):
            part.replace_all_uses_with(results[arguments(part)[1]], propagate_meta=False)
            gm.graph.erase_node(part)
        gm.graph.erase_node(call)
        gm.graph.erase_node(attribute)
    gm.recompile()


@dataclass(frozen=True)
class _Piece:
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


def _layers(graph: fx.Graph) -> dict[Any, list[fx.Node]]:
    """The nodes of each instance of the outermost module class that covers most of the graph: from its first to its last."""
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
        if len(spans) < LEAST or any(one[1] >= other[0] for one, other in zip(spans, spans[1:], strict=False)):
            continue
        size = sum(len(places) for places in instances.values())
        if size > covered:
            covered = size
            found = {path: nodes[begin : end + 1] for begin, end, path in spans}
    return found


def _write_out_sizes(graph: fx.Graph) -> None:
    """Sizes that turned out to be fixed while dynamo traced, such as the batch of a static cache: the first layers ask for them."""
    for node in list(graph.nodes):
        found = _value(node)
        number = found.node.maybe_as_int() if isinstance(found, torch.SymInt) else None
        if number is not None and node.op == "call_function":
            written: Any = lambda n, node=node, number=number: number if n is node else n  # noqa: E731 - map_arg is typed for nodes only
            for user in list(node.users):
                user.args, user.kwargs = fx.node.map_arg((user.args, user.kwargs), written)
            graph.erase_node(node)
    for node in graph.find_nodes(op="call_method", target="size"):
        if not node.users:
            graph.erase_node(node)


def _pieces(layer: Sequence[fx.Node]) -> Iterator[_Piece]:
    piece: list[fx.Node] = []
    own: set[int] = set()  # the memory of what the piece makes
    for node in layer:
        if node.op in ("placeholder", "get_attr") or _is_weight(node) or _is_size(node):
            continue
        if only_computes(node) or _writes_within(node, own):
            own |= _memory(node).difference(*map(_memory, node.all_input_nodes))
            piece.append(node)
        else:
            yield _Piece(tuple(piece))
            piece, own = [], set()
    yield _Piece(tuple(piece))


def _with_parameters(graph: fx.Graph, pieces: Sequence[_Piece]) -> list[_Piece]:
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
    return [_Piece((*more[i], *piece.nodes)) for i, piece in enumerate(pieces)]


def _with_sizes(graph: fx.Graph, piece: _Piece) -> _Piece:
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
    return _Piece((*own.values(), *piece.nodes))


def _is_size(node: fx.Node) -> bool:
    """Whether a node computes a number, and of the graph's dynamic sizes alone."""
    inputs = node.all_input_nodes
    return (
        node.op == "call_function"
        and isinstance(_value(node), (torch.SymInt, torch.SymFloat, torch.SymBool))
        and all(n.op == "placeholder" and isinstance(_value(n), torch.SymInt) or _is_size(n) for n in inputs)
    )


def _is_weight(node: fx.Node) -> bool:
    """Whether a node is a marker of a weight, or a view of one."""
    if is_traced_marker(node) or len(node.all_input_nodes) != 1:
        return is_traced_marker(node)
    return bool(_memory(node)) and _memory(node) <= _memory(node.all_input_nodes[0]) and _is_weight(node.all_input_nodes[0])


def _is_declared(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and only_computes(node) and _of_parameters(node)


def _of_parameters(node: fx.Node) -> bool:
    return all(n.op == "placeholder" or _of_parameters(n) for n in node.all_input_nodes)


def _key(piece: _Piece) -> Any:
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
    found = _value(node)
    if isinstance(found, Tensor):
        return (
            tuple(map(str, found.shape)), tuple(map(str, found.stride())), str(found.storage_offset()), found.dtype, found.device,
            found.requires_grad,
        )  # fmt: skip
    return type(found), str(found) if isinstance(found, (int, torch.SymInt)) else id(node)


def _value(node: fx.Node) -> Any:
    """What a node stands for; None where dynamo does not say, such as for a constant of the graph."""
    return fake_value(node) if "val" in node.meta or "example_value" in node.meta else None


def _outputs(pieces: Sequence[_Piece]) -> list[int] | None:
    """Which nodes a region gives back, so that none of them is a view of an input or of another; None where it cannot be one.

    What is such a view is made again outside, from what it is a view of.
    """
    first = pieces[0].nodes
    place = {node: i for i, node in enumerate(first)}
    wanted = sorted({i for piece in pieces for i in piece.read_outside})
    inputs = {m for node in pieces[0].inputs for m in _memory(node)}
    if any(not isinstance(_value(node), (Tensor, torch.SymInt, int)) for piece in pieces for node in piece.inputs):
        return None
    made: dict[int, int] = {}
    for i, node in enumerate(first):
        for m in _memory(node):
            made.setdefault(m, i)
    shared = defaultdict(list)
    for i in wanted:
        for m in _memory(first[i]):
            shared[m].append(i)
    outputs = set()
    waiting = list(wanted)
    while waiting:
        i = waiting.pop()
        memory = _memory(first[i])
        again = memory and (memory & inputs or (any(len(shared[m]) > 1 for m in memory) and i != min(made[m] for m in memory)))
        if again and not only_computes(first[i]):
            return None
        if again or not isinstance(_value(first[i]), Tensor):
            waiting += [place[n] for n in first[i].all_input_nodes if n in place and place[n] not in outputs]
        else:
            outputs.add(i)
    return sorted(outputs)


def _memory(node: fx.Node) -> set[int]:
    found = _value(node)
    parts = found if isinstance(found, (tuple, list)) else [found]
    return {part.untyped_storage()._cdata for part in parts if isinstance(part, Tensor)}


def _replace(gm: fx.GraphModule, name: str, pieces: Sequence[_Piece], outputs: Sequence[int]) -> dict[str, Mapping[str, Any]]:
    symbols = _symbols(gm.graph, pieces[0])
    region, copies = _region(pieces[0], symbols, outputs)
    gm.add_submodule(name, region)
    stacks: dict[str, Mapping[str, Any]] = {}
    for piece in pieces:
        there = {copy: n.meta.get("nn_module_stack", {}) for copy, n in zip(copies, piece.nodes, strict=True)}
        stacks[_call(gm.graph, name, piece, symbols, outputs).name] = there
    return stacks


def _symbols(graph: fx.Graph, piece: _Piece) -> list[fx.Node]:
    """The graph's dynamic sizes that a region has and is not given: its code is to know them."""
    used = {s for node in (*piece.inputs, *piece.nodes) if isinstance(_value(node), Tensor) for s in free_symbols(_value(node))}
    sizes = (n for n in graph.find_nodes(op="placeholder") if isinstance(_value(n), torch.SymInt))
    return [n for n in sizes if n not in piece.inputs and free_symbols(_value(n)) & used]


def _region(piece: _Piece, symbols: Sequence[fx.Node], outputs: Sequence[int]) -> tuple[fx.GraphModule, list[str]]:
    """The region, and what it calls the piece's nodes."""
    graph = fx.Graph()
    inside: dict[fx.Node, fx.Node] = {}
    for node in (*piece.inputs, *symbols):
        inside[node] = graph.placeholder(node.name)
        inside[node].meta = {"example_value": _value(node)}
    for node in piece.nodes:
        inside[node] = graph.node_copy(node, inside.__getitem__)
    graph.output(tuple(inside[piece.nodes[i]] for i in outputs))
    names = [inside[node].name for node in piece.nodes]
    graph.eliminate_dead_code(lambda node: node.is_impure() or not (node.op == "get_attr" or only_computes(node)))
    return fx.GraphModule({}, graph), names


def _call(graph: fx.Graph, name: str, piece: _Piece, symbols: Sequence[fx.Node], outputs: Sequence[int]) -> fx.Node:
    last = piece.nodes[-1]
    stack = {k: v for k, v in last.meta.items() if k in ("nn_module_stack", "stack_trace")}
    new: dict[fx.Node, fx.Node] = {}
    with graph.inserting_after(last):
        region = graph.get_attr(name)
    with graph.inserting_after(region):
        call = graph.call_function(invoke_subgraph, (region, name, *piece.inputs, *symbols))
    call.meta = {**stack, "example_value": tuple(_value(piece.nodes[i]) for i in outputs)}
    at = call
    for position, i in enumerate(outputs):
        with graph.inserting_after(at):
            at = new[piece.nodes[i]] = graph.call_function(operator.getitem, (call, position))
        at.meta = {**stack, "example_value": _value(piece.nodes[i])}
    own = set(piece.nodes)
    read = {node for node in piece.nodes if any(user not in own for user in node.users)}
    for node in _again(piece.nodes, read, new):
        with graph.inserting_after(at):
            at = new[node] = graph.node_copy(node, lambda n: new.get(n, n))
    for node in read:
        node.replace_all_uses_with(new[node], delete_user_cb=lambda user: user not in own, propagate_meta=False)
    for node in reversed(piece.nodes):
        graph.erase_node(node)
    return call


def _again(nodes: Sequence[fx.Node], read: set[fx.Node], given: Mapping[fx.Node, fx.Node]) -> list[fx.Node]:
    """The views that are made outside, in their order."""
    own, needed, waiting = set(nodes), set(), [node for node in read if node not in given]
    while waiting:
        node = waiting.pop()
        needed.add(node)
        waiting += [n for n in node.all_input_nodes if n in own and n not in given and n not in needed]
    return [node for node in nodes if node in needed]


def _names(node: fx.Node) -> Iterator[str]:
    """What a report may call a node by."""
    if is_traced_marker(node):
        yield parameter_name(node)
    elif node.op in ("call_function", "call_method") and node.meta.get("nn_module_stack"):
        yield module_name(node)


def _renamed(one: _Piece, other: _Piece) -> Mapping[str, str]:
    pairs = ((a, b) for n, m in zip(one.nodes, other.nodes, strict=True) for a, b in zip(_names(n), _names(m), strict=True))
    return dict(pairs)


def _writes_within(node: fx.Node, own: set[int]) -> bool:
    """Whether a node that does not only compute, does nothing else than to write to memory of its piece's own."""
    given = {m for n in node.all_input_nodes for m in _memory(n)}
    return bool(given) and given <= own and not isinstance(node.target, HigherOrderOperator)
