"""Layers that compute the same become calls of one subgraph, which is then compiled once.

    before                                              after
    %q0 = linear(%h, dequantize(%w0, …))                %r0 = invoke_subgraph(ctfp8_region_0, %h, %w0, …)
    …                                                   %h1 = getitem(%r0, 0)
    %h1 = add(%h, %y0)                                  %r1 = invoke_subgraph(ctfp8_region_0, %h1, %w1, …)
    %q1 = linear(%h1, dequantize(%w1, …))               %h2 = getitem(%r1, 0)
    …

This is done to the graph that dynamo made of the whole model, so a model needs no preparation, and what cannot be a region
stays where it is. A layer is cut where it writes to memory, such as a cache: the write stays in the graph around it, where
Inductor sees what it is to and does it in place, and each piece is a region of its own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from ..compat import invoke_subgraph
from ..graph import arguments, is_traced_marker, module_name, parameter_name
from ..report import Entry, Report
from .pieces import Piece, key_of, layers_of, pieces_of, with_parameters, write_out_sizes
from .region_calls import outputs_of, replace_by_calls

#: Fewer layers are compiled one by one: what they cost is little, and calls of a region are not fused with what is around them.
LEAST = 4


@dataclass(frozen=True)
class Regions:
    """What became of a graph's repeated layers.

    Attributes:
        said: in the report; empty where nothing repeats.
        names: of each further instance of a region: by a name in what is compiled, the name there.
        order: all names, as they were in the graph.
        count: how many regions there are.
        stacks: of each call, by the names of its region's nodes, in which modules the nodes it stands for were traced.
    """

    said: str = ""
    names: tuple[Mapping[str, str], ...] = ()
    order: tuple[str, ...] = ()
    stacks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    count: int = 0

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
    write_out_sizes(gm.graph)
    layers = layers_of(gm.graph, LEAST)
    if len(layers) < LEAST:
        return Regions()
    order = tuple(dict.fromkeys(name for node in gm.graph.nodes for name in _names(node)))
    alike: dict[Any, list[Piece]] = defaultdict(list)
    for piece in with_parameters(gm.graph, [piece for layer in layers.values() for piece in pieces_of(layer)]):
        alike[key_of(piece)].append(piece)
    names: list[Mapping[str, str]] = []
    stacks: dict[str, Mapping[str, Any]] = {}
    regions = 0
    for pieces in alike.values():
        if len(pieces) >= LEAST and (outputs := outputs_of(pieces)):
            names += [_renamed(pieces[0], piece) for piece in pieces[1:]]
            stacks |= replace_by_calls(gm, f"ctfp8_region_{regions}", pieces, outputs)
            regions += 1
    what = f"{len(layers)} repeated layers"
    if not regions:
        return Regions(f"{what} compiled one by one: they differ")
    gm.graph.lint()
    return Regions(f"{what} compiled as {regions} region{'s' * (regions > 1)}", tuple(names), order, stacks, regions)


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


def _names(node: fx.Node) -> Iterator[str]:
    """What a report may call a node by."""
    if is_traced_marker(node):
        yield parameter_name(node)
    elif node.op in ("call_function", "call_method") and node.meta.get("nn_module_stack"):
        yield module_name(node)


def _renamed(one: Piece, other: Piece) -> Mapping[str, str]:
    pairs = (
        (a, b) for n, m in zip(one.nodes, other.nodes, strict=True) for a, b in zip(_names(n), _names(m), strict=True)
    )
    return dict(pairs)
