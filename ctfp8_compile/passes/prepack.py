"""Scales are prepacked once, in the layout that their kernel reads, and not at each call.

    before                             declared                               in a compiled graph, or an exported program
    %w = dequantize(%q, %s, …)         %t = scales_transposed(%s)             %t = placeholder
                                       %p = permute(%t, [1, 0])               %p = permute(%t, [1, 0])
                                       %w = dequantize(%q, %p, …)             %w = dequantize(%q, %p, …)

`declare` puts operators on parameters alone into a graph, and views behind them that undo what they do; so the graph is right
with any kernel, and the one it is meant for finds its layout under the views. They leave the graph again: a compiled graph is
given their results in the place of the first parameter they are made of (`take_out`, `inductor/prepacked.py`), an exported
program holds them as parameters (`fold`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from ..graph import MARKER, arguments, fake_value
from ..lowering import Problem, choose, kernels_of
from ..ops import BY_ROW, SWIZZLED, TRANSPOSED, UNSWIZZLED
from ..target import Target
from .horizontal_fusion import LINEARS, PACK, add

aten = torch.ops.aten
_MARKERS = (MARKER, MARKER.overloadpacket)
_ON_PARAMETERS = (BY_ROW, TRANSPOSED, SWIZZLED, PACK)


def declare(graph: fx.Graph, target: Target) -> int:
    """Prepacks scales, in place, for the kernels that would take their weights; behind `horizontal_fusion.declare`.

    Returns:
        How many.
    """
    done: set[fx.Node] = set()
    count = 0
    first = next((node for node in graph.nodes if node.op != "placeholder" and node.target not in _ON_PARAMETERS), None)
    for marker in [node for node in graph.nodes if node.op == "call_function" and node.target in _MARKERS]:
        scale = arguments(marker)[1]
        whole = arguments(scale)[0] if scale.target is aten.slice.Tensor else scale
        if whole in done or not (whole.op == "placeholder" or whole.target is PACK):
            continue
        done.add(whole)
        if not (layout := _layout(marker, target)):
            continue
        if first is not None and whole.target is PACK:
            first.prepend(whole)
        with graph.inserting_before(first):
            count += _prepack(graph, marker, whole, layout)
    return count


def _layout(marker: fx.Node, target: Target) -> str:
    weight, scale, _, block, activation, dtype = arguments(marker)
    shape = tuple(fake_value(weight).shape)
    problem = Problem(
        kind="linear" if len(shape) == 2 else "grouped_mm",
        x_dtype=dtype,
        x_shape=(*_rows(marker), shape[-1]),
        weight_shape=shape,
        block=(block[0], block[1]),
        activation=activation,
        bias=False,
        exponents=fake_value(scale).dtype == torch.uint8,
    )
    kernel, _ = choose(kernels_of(target), problem, target)
    return "" if kernel is None else kernel.scale_layout


def _rows(marker: fx.Node) -> tuple[Any, ...]:
    """The sizes of a linear's input, but the last; of any other use, one that is not known."""
    for user in marker.users:
        if user.target in LINEARS:
            return tuple(fake_value(arguments(user)[0]).shape[:-1])
    return (None,)


def _prepack(graph: fx.Graph, marker: fx.Node, whole: fx.Node, layout: str) -> bool:
    """Whether the layout is another than the checkpoint's."""
    users = list(whole.users)
    if layout == "by row":
        rows, block = fake_value(arguments(marker)[0]).shape[-2], arguments(marker)[3]
        scales = fake_value(whole).shape[-2]
        if scales == rows or rows % scales or not all(user.target in _MARKERS for user in users):
            return False
        new = add(graph, BY_ROW, [whole], [rows])
        for user in users:
            user.update_arg(3, [1, block[1]])
    elif layout == "transposed":
        prepacked = add(graph, TRANSPOSED, whole)
        rank = fake_value(whole).dim()
        new = add(graph, aten.permute.default, prepacked, [*range(rank - 2), rank - 1, rank - 2])
    elif layout == "swizzled":
        new = add(graph, UNSWIZZLED, add(graph, SWIZZLED, whole), fake_value(whole).shape[1])
    else:
        return False
    for user in users:
        user.replace_input_with(whole, new)
        if user.target is aten.slice.Tensor:  # of a pack: it has the strides of what it now is a part of
            _, *args = arguments(user)
            with fake_value(new).fake_mode:
                user.meta["val" if "val" in user.meta else "example_value"] = user.target(fake_value(new), *args)
    return True


@dataclass(frozen=True)
class Prepacked:
    """Something that is made of parameters alone.

    Attributes:
        node: what computes it in the graph.
        sources: the placeholders it is made of.
        of: its value from those of its sources.
    """

    node: fx.Node
    sources: tuple[fx.Node, ...]
    of: Computation


@dataclass(frozen=True)
class Computation:
    """What computes a node from parameters; it is still there when the node is not.

    Attributes:
        op: an operator.
        args: its arguments; those that are made of parameters are `Computation`s, or what the parameter is called.
        called: how `args` call parameters.
    """

    op: Any
    args: tuple[Any, ...]
    called: type

    def __call__(self, values: Mapping[Any, Tensor]) -> Tensor:
        result: Tensor = self.op(*self._map(self.args, lambda parameter: values[parameter], lambda one: one(values)))
        return result

    def __reduce__(self) -> Any:
        return _computation_of, (self.op._schema.name, self.op._overloadname, self.args, self.called)

    def calling(self, names: Mapping[Any, Any], called: type) -> Computation:
        """The same, with other names for its parameters."""
        args = self._map(self.args, lambda parameter: names[parameter], lambda one: one.calling(names, called))
        return Computation(self.op, tuple(args), called)

    def parameters(self) -> Iterator[Any]:
        """Its parameters, as it calls them; one that is used several times is named as often."""
        found: list[Any] = []
        self._map(self.args, found.append, lambda one: found.extend(one.parameters()))
        yield from found

    def _map(self, found: Any, parameter: Callable[[Any], Any], inner: Callable[[Computation], Any]) -> Any:
        if isinstance(found, self.called):
            return parameter(found)
        if isinstance(found, Computation):
            return inner(found)
        return [self._map(item, parameter, inner) for item in found] if isinstance(found, (list, tuple)) else found


def _computation_of(op: str, overload: str, args: tuple[Any, ...], called: type) -> Computation:
    namespace, name = op.split("::")
    return Computation(getattr(getattr(getattr(torch.ops, namespace), name), overload or "default"), args, called)


def take_out(graph: fx.Graph) -> list[Prepacked]:
    """Takes what is made of scales alone out of a graph: the first placeholder of each is its value from now on."""
    found = [one for one in _found(graph) if one.node.target is not PACK]
    for one in found:
        first = one.sources[0]
        key = "val" if "val" in first.meta else "example_value"
        first.meta = {**first.meta, key: fake_value(one.node)}
        _replace(graph, one, first)
    return found


def fold(program: ExportedProgram) -> int:
    """Gives a program a parameter for each thing that is made of parameters alone; those it was made of go. Returns how many."""
    signature = program.graph_signature
    specs = {spec.arg.name: spec for spec in signature.input_specs}
    gone = set()
    found = _found(program.graph)
    for one in found:
        first, *others = one.sources
        names = {source: specs[source.name].target for source in one.sources}
        value = one.of({source: program.state_dict.pop(name) for source, name in names.items()})
        name = f"{names[first]}_{'packed' if one.node.target is PACK else 'prepacked'}"
        program.state_dict[name] = (
            nn.Parameter(value, requires_grad=False) if names[first] in signature.parameters else value
        )
        specs[first.name].target = name
        first.meta = {**first.meta, "val": one.node.meta["val"]}
        _replace(program.graph, one, first)
        for source in others:
            gone.add(source.name)
            program.graph.erase_node(source)
    signature.input_specs[:] = [spec for spec in signature.input_specs if spec.arg.name not in gone]
    program.graph_module.recompile()
    return len(found)


def _found(graph: fx.Graph) -> list[Prepacked]:
    nodes = [n for n in graph.nodes if n.target in _ON_PARAMETERS]
    inner = {n for node in nodes for n in node.all_input_nodes}
    return [
        Prepacked(node, tuple(dict.fromkeys(_sources(node))), _computation(node)) for node in nodes if node not in inner
    ]


def _sources(node: fx.Node) -> Iterator[fx.Node]:
    for source in node.all_input_nodes:
        if source.op == "placeholder":
            yield source
        else:
            yield from _sources(source)


def _computation(node: fx.Node) -> Computation:
    inner: Callable[[fx.Node], Any] = lambda n: n if n.op == "placeholder" else _computation(n)  # noqa: E731
    args: Any = fx.node.map_arg(node.args, inner)
    return Computation(node.target, args, fx.Node)


def _replace(graph: fx.Graph, one: Prepacked, first: fx.Node) -> None:
    one.node.replace_all_uses_with(first, propagate_meta=False)
    waiting = [one.node]
    while waiting:
        node = waiting.pop()
        if node.op != "placeholder" and not node.users:
            waiting += node.all_input_nodes
            graph.erase_node(node)
