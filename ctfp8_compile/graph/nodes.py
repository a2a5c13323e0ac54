"""Building ATen graphs: nodes with fake values, at a place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

from ..compat import detect_fake_mode, enable_python_dispatcher

aten = torch.ops.aten


def value(node: Any) -> Any:
    """The fake tensor (or number) a node stands for."""
    return node.meta.get("val") if isinstance(node, fx.Node) else node


def arguments(node: fx.Node) -> tuple[Any, ...]:
    """A node's arguments; torch.fx's own type of them, a union of nineteen, says no more and asks for a cast at each use."""
    return node.args


def fake_value(node: fx.Node) -> Any:
    """The fake tensor of a node in any tracer's graph; dynamo keeps it under another key."""
    return node.meta["val"] if "val" in node.meta else node.meta["example_value"]


def call(graph: fx.Graph, op: Any, *args: Any, like: fx.Node | None = None, **kwargs: Any) -> fx.Node:
    """Appends `op(*args, **kwargs)` at the graph's insertion point with its fake value; metadata of `like` is kept.

    Shapes, dtypes and strides come from the operator's own meta function, so nothing has to be declared twice. The fake
    arguments are kept as `eager_input_vals`: without them Inductor takes it that a node a pass inserted reads any strides.
    """
    node = graph.call_function(op, args, kwargs)
    if like is not None:
        node.meta = {k: v for k, v in like.meta.items() if k not in ("val", "tensor_meta", "eager_input_vals")}
    fakes = [value(a) for a in fx.node.map_arg(args, lambda n: n)]
    mode = next((f.fake_mode for f in fakes if hasattr(f, "fake_mode")), None) or detect_fake_mode(fakes)
    resolved = fx.node.map_arg(args, value)
    node.meta["eager_input_vals"] = (resolved, kwargs)
    if mode is None:
        node.meta["val"] = op(*resolved, **kwargs)
    else:
        with mode, enable_python_dispatcher():  # as tracers do: some meta functions take dynamic sizes only so
            node.meta["val"] = op(*resolved, **kwargs)
    return node


def sizes(graph: fx.Graph, node: fx.Node, like: fx.Node | None = None) -> list[Any]:
    """A tensor's sizes as arguments for a node: numbers, and nodes where they are dynamic."""
    return [
        size if isinstance(size, int) else call(graph, aten.sym_size.int, node, dim, like=like)
        for dim, size in enumerate(value(node).shape)
    ]


@contextmanager
def before(graph: fx.Graph, node: fx.Node) -> Iterator[None]:
    """Builds new nodes right before `node`."""
    with graph.inserting_before(node):
        yield
