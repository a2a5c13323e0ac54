"""What ranks send each other, made less: FP8 values instead of activations, and each token's norm on one rank instead of on all.

`gather_fp8`: a row is quantized where it is, and its FP8 values and scale travel; bit for bit the same, half the bytes of bf16.

    before                                              after
    %w = wait(all_gather(%x))                           %q, %a = ctfp8.quantize_per_token(%x)
    %q, %a = ctfp8.quantize_per_token(%w)               %q = wait(all_gather(%q)), %a = wait(all_gather(%a))

`scatter_tokens` (sequence parallelism): between two sums over ranks each rank keeps some of the tokens.

    %y = wait(all_reduce(%x))                           %y = wait(reduce_scatter(%x))
    %h = add(%residual, %y)                             %h = add(%residual, %y)              of this rank's tokens
    %n = norm(%h)                                       %n = norm(%h)
    … quantize(%n)                                      … quantize(wait(all_gather(%n))), which `gather_fp8` turns round

Both are off unless asked for (`ctfp8.collectives`): no GPU has shown yet that they gain.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
import torch.distributed as dist
from torch import fx

from ..compat import resolve_process_group
from ..graph import arguments, before, call, value
from ..lowering.scaled import QUANTIZE

aten = torch.ops.aten
prims = torch.ops.prims
#: Of each output row, computed from the rows of the inputs alone; reductions are over the last dimension.
_BY_ROW = {
    aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.neg.default,
    aten.pow.Tensor_Scalar, aten.rsqrt.default, aten.sqrt.default, aten.reciprocal.default, aten.mean.dim, aten.sum.dim_IntList,
    aten.clone.default, aten.alias.default, aten._to_copy.default, aten.to.dtype, prims.convert_element_type.default,
}  # fmt: skip
_REDUCTIONS = (aten.mean.dim, aten.sum.dim_IntList)
_RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


def gather_fp8(graph: fx.Graph) -> int:
    """Quantizes before all-gathers along rows instead of behind them, in place; returns how many."""
    done = 0
    for node in [n for n in graph.nodes if n.op == "call_function" and n.target in QUANTIZE]:
        rows = arguments(node)[0]
        wait = arguments(rows)[0] if rows.target in _RESHAPES else rows
        gather = arguments(wait)[0] if _is(wait, "wait_tensor") else None
        if gather is None or not _is(gather, "all_gather_into_tensor") or any(len(n.users) > 1 for n in {wait, rows}):
            continue
        x, count, group = arguments(gather)
        with before(graph, node):
            if value(x).dim() != 2:
                x = call(graph, aten.reshape.default, x, [-1, value(x).shape[-1]], like=node)
            both = call(graph, node.target, x, *arguments(node)[1:], like=node)
            for user in list(node.users):
                part = call(graph, operator.getitem, both, arguments(user)[1], like=node)
                whole = part
                if (
                    arguments(user)[1] == 0 or node.target is not QUANTIZE[2]
                ):  # a scale for the whole tensor is everywhere
                    whole = _gathered(graph, part, count, group, node)
                user.replace_all_uses_with(whole, propagate_meta=False)
                graph.erase_node(user)
        graph.erase_node(node)
        done += 1
    _clean(graph)
    return done


def _gathered(graph: fx.Graph, part: fx.Node, count: int, group: str, like: fx.Node) -> fx.Node:
    """All ranks' rows. gloo has no float8: there FP8 values travel as bytes."""
    dtype = value(part).dtype
    as_bytes = value(part).device.type == "cpu" and dtype.itemsize == 1
    if as_bytes:
        part = call(graph, aten.view.dtype, part, torch.uint8, like=like)
    whole = call(graph, _op("all_gather_into_tensor"), part, count, group, like=like)
    whole = call(graph, _op("wait_tensor"), whole, like=like)
    return call(graph, aten.view.dtype, whole, dtype, like=like) if as_bytes else whole


def _clean(graph: fx.Graph) -> None:
    """Dead code, collectives too: to torch.fx they have effects."""
    for node in reversed(list(graph.nodes)):
        if not node.users and (getattr(node.target, "namespace", "") == "_c10d_functional" or not node.is_impure()):
            graph.erase_node(node)


def scatter_tokens(graph: fx.Graph) -> int:
    """Turns all-reduces into reduce-scatters over tokens, in place, where what follows is by token; returns how many.

    The number of tokens has to be fixed and divisible by the number of ranks; else nothing is done.
    """
    parts = _Parts(graph)
    done = sum(parts.add(node) for node in list(graph.nodes))
    parts.gather()
    _clean(graph)
    return done


class _Parts:
    """Values of which this rank keeps its own tokens: `[M / ranks, H]`, with dimensions of size one in front."""

    def __init__(self, graph: fx.Graph):
        self.graph = graph
        self.of: dict[fx.Node, fx.Node] = {}
        self.group = ""
        self.ranks = self.rows = 0

    def add(self, node: fx.Node) -> bool:
        """Takes a node in if it can be; says whether it was an all-reduce."""
        if _is(node, "wait_tensor") and _is(arguments(node)[0], "all_reduce"):
            return self._scatter(node)
        if node.op == "call_function" and any(n in self.of for n in node.all_input_nodes):
            with before(self.graph, node):
                self._follow(node)
        return False

    def _scatter(self, wait: fx.Node) -> bool:
        x, op, group = arguments(arguments(wait)[0])
        rows, ranks = _rows(x), len(dist.get_process_group_ranks(resolve_process_group(group)))
        first = not self.of
        if op != "sum" or rows is None or rows % ranks or value(x).dim() < 2:
            return False
        if not first and (group, ranks, rows) != (self.group, self.ranks, self.rows):
            return False
        self.group, self.ranks, self.rows = group, ranks, rows
        with before(self.graph, wait):
            part = self._call(wait, aten.reshape.default, x, [rows, value(x).shape[-1]])
            part = self._call(wait, _op("reduce_scatter_tensor"), part, "sum", ranks, group)
            part = self._call(wait, _op("wait_tensor"), part)
            self.of[wait] = self._shaped(part, wait, wait)
        return True

    def _follow(self, node: fx.Node) -> None:
        """The node on this rank's rows, if it computes each row by itself."""
        if node.target in _RESHAPES:
            if _rows(node) == self.rows and value(node).shape[-1] == value(arguments(node)[0]).shape[-1]:
                self.of[node] = self._shaped(self.of[arguments(node)[0]], node, node)
            return
        if node.target not in _BY_ROW:
            return
        if node.target in _REDUCTIONS:
            dims, keep = arguments(node)[1], len(arguments(node)) > 2 and arguments(node)[2]
            if [d % value(node).dim() for d in dims] != [value(node).dim() - 1] or not keep:
                return
        whole = [n for n in node.all_input_nodes if n not in self.of]
        if any(_rows(n) not in (1, self.rows) or value(n).dim() > value(node).dim() for n in whole):
            return
        own = {n: self._sliced(n, node) for n in whole if _rows(n) == self.rows}
        args = fx.node.map_arg(node.args, lambda n: self.of.get(n, own.get(n, n)))
        kwargs = fx.node.map_arg(node.kwargs, lambda n: self.of.get(n, own.get(n, n)))
        self.of[node] = call(self.graph, node.target, *args, like=node, **kwargs)

    def _sliced(self, node: fx.Node, like: fx.Node) -> fx.Node:
        """This rank's rows of a value that every rank has."""
        each = self.rows // self.ranks
        rank = dist.get_process_group_ranks(resolve_process_group(self.group)).index(dist.get_rank())
        flat = self._call(like, aten.reshape.default, node, [self.rows, value(node).shape[-1]])
        part = self._call(like, aten.slice.Tensor, flat, 0, rank * each, (rank + 1) * each)
        return self._shaped(part, node, like)

    def _shaped(self, part: fx.Node, whole: fx.Node, like: fx.Node) -> fx.Node:
        """With as many dimensions as the whole."""
        ones = [1] * (value(whole).dim() - 2)
        shape = [*ones, self.rows // self.ranks, value(whole).shape[-1]]
        return self._call(like, aten.reshape.default, part, shape)

    def gather(self) -> None:
        """Puts the whole value back where something other than its rows' own is computed of it."""
        place = {node: i for i, node in enumerate(self.graph.nodes)}
        for node, part in self.of.items():
            users = [user for user in node.users if user not in self.of]
            if not users:
                continue
            with before(self.graph, min(users, key=place.__getitem__)):
                flat = self._call(node, aten.reshape.default, part, [self.rows // self.ranks, value(node).shape[-1]])
                whole = _gathered(self.graph, flat, self.ranks, self.group, node)
                if value(node).dim() != 2:
                    whole = self._call(node, aten.reshape.default, whole, list(value(node).shape))
            node.replace_all_uses_with(whole, delete_user_cb=users.__contains__, propagate_meta=False)

    def _call(self, like: fx.Node, op: Any, *args: Any) -> fx.Node:
        if op is aten.reshape.default:
            x, shape = args
            while x.target in _RESHAPES:  # Inductor's async TP looks for a matmul right beside its collective
                x = arguments(x)[0]
            if list(value(x).shape) == shape:
                return x
            args = (x, shape)
        return call(self.graph, op, *args, like=like)


def _rows(node: Any) -> int | None:
    """The number of rows of a tensor; None where it is dynamic."""
    shape = value(node).shape[:-1]
    return math.prod(shape) if all(isinstance(size, int) for size in shape) else None


def _op(name: str) -> Any:
    return getattr(torch.ops._c10d_functional, name).default


def _is(node: Any, name: str) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target is _op(name)


#: By the value of the option `ctfp8.collectives`, the passes that it asks for.
WAYS: dict[str, tuple[str, ...]] = {
    "as traced": (),
    "fp8": ("gather-fp8",),
    "tokens": ("scatter-tokens", "gather-fp8"),
}
