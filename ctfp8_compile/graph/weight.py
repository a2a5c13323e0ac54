"""A matmul's weight operand, traced back through views to the marker it was dequantized by."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from .nodes import arguments, value

aten = torch.ops.aten

MARKER = torch.ops.ctfp8.dequantize.default
#: The marker of keys or values that a cache keeps as FP8.
CACHED = torch.ops.ctfp8.cached.default


@dataclass(frozen=True)
class Weight:
    """A consumer's weight operand, traced back to its marker through views.

    Attributes:
        marker: the `ctfp8::dequantize` node.
        transposed: the operand is `[..., K, N]`.
        broadcast: a `[N, K]` weight was expanded over batch dimensions.
        matrix: index of the one expert selected, where the marker holds several.
        expert_ids: node with the int expert of each row (`[T]`), where the operand was gathered by row.
    """

    marker: fx.Node
    transposed: bool = False
    broadcast: bool = False
    matrix: Any = None
    expert_ids: fx.Node | None = None

    @property
    def name(self) -> str:
        return parameter_name(self.marker)


def is_marker(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target is MARKER


def is_traced_marker(node: Any) -> bool:
    """Whether a node is a marker in a graph of dynamo's, which has operators as they were called."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in (MARKER, MARKER.overloadpacket)


def is_view(node: fx.Node) -> bool:
    """Whether a node only looks at a weight in another way (see `trace_weight`)."""
    return node.op == "call_function" and node.target in _VIEWS


def is_plumbing(node: fx.Node) -> bool:
    """Whether a node computes nothing: a view, a part of a tuple, a size."""
    return is_view(node) or node.target in (operator.getitem, aten.squeeze.dim, aten.slice.Tensor, aten.sym_size.int)


def trace_weight(node: Any) -> Weight | None:
    """Follows a matmul operand back through transposes, broadcasts, selects and gathers to a marker; None if it has none."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return None
    if node.target is MARKER:
        return Weight(node)
    if node.target not in _VIEWS:
        return None
    inner = trace_weight(arguments(node)[0])
    return None if inner is None else _VIEWS[node.target](node, inner)


def _transpose(node: fx.Node, inner: Weight) -> Weight | None:
    rank = value(node).dim()
    if node.target is aten.permute.default:
        order = [d % rank for d in arguments(node)[1]]
    else:
        order = list(range(rank))
        a, b = (d % rank for d in (arguments(node)[1:3] if len(arguments(node)) > 1 else (0, 1)))
        order[a], order[b] = b, a
    if order == list(range(rank)):
        return inner
    swapped = [*range(rank - 2), rank - 1, rank - 2]
    return replace(inner, transposed=not inner.transposed) if order == swapped else None


def _reshape(node: fx.Node, inner: Weight) -> Weight | None:
    """Only what keeps the matrix: broadcasting it, or folding broadcast dimensions into one."""
    weight_rank = value(inner.marker).dim() - (inner.matrix is not None)
    same_matrix = value(node).shape[-2:] == value(arguments(node)[0]).shape[-2:] if value(node).dim() >= 2 else False
    if not same_matrix or inner.expert_ids is not None:
        return None
    if value(node).dim() == value(arguments(node)[0]).dim() == weight_rank:
        return inner if value(node).shape == value(arguments(node)[0]).shape else None
    return replace(inner, broadcast=True) if weight_rank == 2 else None


def _select(node: fx.Node, inner: Weight) -> Weight | None:
    plain = inner.matrix is None and inner.expert_ids is None and value(inner.marker).dim() == 3
    return replace(inner, matrix=arguments(node)[2]) if plain and arguments(node)[1] == 0 else None


def _gather(node: fx.Node, inner: Weight) -> Weight | None:
    indices = arguments(node)[1]
    plain = inner.matrix is None and inner.expert_ids is None and value(inner.marker).dim() == 3
    if not plain or len(indices) != 1 or indices[0] is None or value(indices[0]).dim() != 1:
        return None
    if value(indices[0]).dtype not in (torch.int64, torch.int32):
        return None
    return replace(inner, expert_ids=indices[0])


def _same(node: fx.Node, inner: Weight) -> Weight:
    return inner


_VIEWS = {
    aten.permute.default: _transpose,
    aten.transpose.int: _transpose,
    aten.t.default: _transpose,
    aten.expand.default: _reshape,
    aten.view.default: _reshape,
    aten.reshape.default: _reshape,
    aten.unsqueeze.default: _reshape,
    aten._unsafe_view.default: _reshape,
    aten.select.int: _select,
    aten.index.Tensor: _gather,
    aten.clone.default: _same,
    aten.alias.default: _same,
    aten.detach.default: _same,
}


#: The model itself, as dynamo writes it: `self` of its forward, or what a wrapper of the forward takes as `*args`
#: (transformers wraps every forward from 5.24 on).
_MODEL = re.compile(r"^\.?L(?:\['(?:self|fn)'\]|\['\w+'\]\[0\]|(?=\[))")
_STEPS = re.compile(r"[\[\].']+")


def name_markers(graph: fx.Graph) -> None:
    """Writes into the module stacks of the markers of dynamo's graph whose weights they are: a weight is read without a call."""
    for node in graph.nodes:
        if is_traced_marker(node) and isinstance(source := node.args[0], fx.Node) and "grapharg" in source.meta:
            stack = node.meta.get("nn_module_stack") or {}
            node.meta["nn_module_stack"] = {**stack, "weight": (source.meta["grapharg"].source.name, "Single")}


def parameter_name(marker: fx.Node) -> str:
    """The model's name of the parameter a marker dequantizes, from the module stack that tracers keep."""
    stack = marker.meta.get("nn_module_stack") or {}
    for path, _ in reversed(list(stack.values())):
        steps = _steps(f".{path}")
        if "parametrizations" in steps:
            at = steps.index("parametrizations")
            return ".".join([*steps[:at], *steps[at + 1 : at + 2]])
    source = arguments(marker)[0]
    return source.name if isinstance(source, fx.Node) else str(source)


def module_name(node: fx.Node) -> str:
    """The model's name of the module in whose forward a node was traced; the node's own name where that is not known."""
    paths = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    return ".".join(_steps(f".{paths[-1]}")) if paths else node.name


def module_path(node: fx.Node) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The modules in whose forwards a node was traced, outermost first: the name of the class, and the steps to the module."""
    for path, kind in (node.meta.get("nn_module_stack") or {}).values():
        yield getattr(kind, "__qualname__", str(kind)), tuple(_steps(f".{path}"))


def _steps(path: str) -> list[str]:
    return [step for step in _STEPS.split(_MODEL.sub("", path)) if step not in ("", "_modules", "__dict__")]
