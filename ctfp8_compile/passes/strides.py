"""Where Inductor would give other strides than eager: a stride that changes costs a model another graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from ..graph import arguments, fake_value


def keep_strides(graph: fx.Graph) -> int:
    """Copies, in place in a graph of dynamo's, what is concatenated with nothing but empty tensors: to a contiguous tensor.

    A growing cache begins empty. Inductor drops what is empty, and keeps the strides of the rest: what a prompt leaves would
    lie as its keys were computed, and what the first token leaves, contiguous: a graph for either.

    Returns:
        How many.
    """
    done = 0
    for node in graph.find_nodes(op="call_function", target=torch.cat):
        parts = arguments(node)[0]
        if not isinstance(parts, (list, tuple)) or node.kwargs.get("out") is not None:
            continue
        values = [n.meta.get("example_value") if isinstance(n, fx.Node) else None for n in parts]
        if not all(isinstance(value, Tensor) for value in values):
            continue
        full = [n for n, value in zip(parts, values, strict=True) if not _is_empty(value)]
        if len(full) != 1 or len(full) == len(parts) or fake_value(full[0]).dtype != fake_value(node).dtype:
            continue
        with graph.inserting_before(node):
            copy = graph.call_function(torch.clone, (full[0],), {"memory_format": torch.contiguous_format})
        copy.meta = dict(node.meta)
        node.replace_all_uses_with(copy, propagate_meta=False)
        graph.erase_node(node)
        done += 1
    return done


def _is_empty(value: Any) -> bool:
    """Of the kind that any tensor may be concatenated with."""
    return value.dim() == 1 and isinstance(value.shape[0], int) and value.shape[0] == 0
