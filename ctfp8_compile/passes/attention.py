"""Attention to a key-value cache becomes one operator that reads the filled part of it, once for all queries of a head.

    before                                                          after
    %e = expand(unsqueeze(%keys, 2), …)      heads repeated         %y = ctfp8.attention(%q, %keys, %values, …, %mask, scale)
    %k = reshape(clone(%e), …)
    %y = scaled_dot_product_attention(%q, %k, %v, %mask)

What shares keys among more queries than tokens, or has fewer queries than keys, is attention to a cache. Which tokens are there
is in the mask's values, so nothing has to be known of the cache; `ctfp8.cached` marks one that is kept as FP8.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..graph import CACHED, arguments, before, call, module_name, op_name, same_strides, value
from ..lowering import attention_gate
from ..report import Entry
from ..target import Target

aten = torch.ops.aten
_ATTENTION = torch.ops.ctfp8.attention.default
_WHOLE = aten.scaled_dot_product_attention.default
_FLASH = aten._scaled_dot_product_flash_attention_for_cpu.default
ATTENTIONS = (_WHOLE, _FLASH)
_RESHAPES = (aten.reshape.default, aten.view.default, aten._unsafe_view.default)


@dataclass(frozen=True)
class _Found:
    """One attention to a cache: `result` is what takes its place; `reason` why nothing does."""

    node: fx.Node
    result: fx.Node
    query: fx.Node
    keys: fx.Node
    values: fx.Node
    mask: fx.Node | None
    scale: float
    reason: str

    def entry(self) -> Entry:
        kernel = "" if self.reason else "fused attention"
        rule = "attention to an FP8 cache" if _stored(self.keys) else "attention to a cache"
        keys, values = (value(_stored(node) or node) for node in (self.keys, self.values))
        shape = tuple(size if isinstance(size, int) else 0 for size in keys.shape)  # 0: any
        read = keys.nbytes + values.nbytes if all(shape) else 0
        before, after = (op_name(self.node),), ("ctfp8.attention",) if kernel else ()
        return Entry(module_name(self.node), rule, kernel, self.reason, shape, (), "none",
                     before=before, after=after, cache_bytes=read)  # fmt: skip


def attention(graph: fx.Graph, target: Target) -> list[Entry]:
    """What would become of each attention to a cache; the graph stays as it is."""
    return [found.entry() for found in _find(graph, target)]


def fuse_attention(graph: fx.Graph, target: Target) -> list[Entry]:
    """Rewrites a graph in place, and says what it did."""
    every = _find(graph, target)
    entries = [found.entry() for found in every]
    for found in every:
        if found.reason:
            continue
        with before(graph, found.node):
            (keys, key_scale), (values, value_scale) = (
                arguments(t)[:2] if _stored(t) else (t, None) for t in (found.keys, found.values)
            )
            new = call(graph, _ATTENTION, found.query, keys, values, key_scale, value_scale, found.mask, found.scale,
                       like=found.result)  # fmt: skip
            if value(found.result).is_contiguous() and not same_strides(value(new), value(found.result)):
                # a query that was put together (partial rotary embeddings): what views the result knows it as it lay
                new = call(graph, aten.clone.default, new, like=found.result, memory_format=torch.contiguous_format)
        found.result.replace_all_uses_with(new, propagate_meta=False)
    dead = [n for found in every if not found.reason for n in (found.result, found.node)]
    for node in dict.fromkeys(dead):
        graph.erase_node(node)
    if dead:
        graph.eliminate_dead_code()
    return entries


def _find(graph: fx.Graph, target: Target) -> list[_Found]:
    return [found for node in graph.nodes if (found := _match(node, target)) is not None]


def _match(node: fx.Node, target: Target) -> _Found | None:
    if node.op != "call_function" or node.target not in ATTENTIONS:
        return None
    named = dict(zip((a.name for a in node.target._schema.arguments), arguments(node), strict=False)) | dict(
        node.kwargs
    )
    query, mask, scale = named["query"], named.get("attn_mask"), named.get("scale")
    heads = value(query).shape[1] if value(query).dim() == 4 else 0
    keys, values = (_unrepeated(named[name]) for name in ("key", "value"))
    if not heads or value(keys).dim() != 4 or not _longer(value(keys).shape[2], value(query).shape[2]):
        return None
    result = node
    if node.target is _FLASH:
        parts = {user.args[1]: user for user in node.users if user.target is operator.getitem}
        if list(parts) != [0]:
            return None
        result = parts[0]
    reason = ""
    if named.get("is_causal") or named.get("dropout_p"):
        reason = "it has dropout, or a causal mask of its own"
    elif not _alike(keys, values) or heads % value(keys).shape[1]:
        reason = "its keys and values differ in their heads, their length or how they are kept"
    elif mask is not None and (value(mask).dim() != 4 or value(mask).shape[3] != value(keys).shape[2]):
        reason = "its mask has not a column for each token of the cache"
    else:
        reason = attention_gate(target, value(query).dtype).why_not
    if target.device != "cpu" and _stored(keys) is None:
        return None  # the device's own attention takes it as it is
    width = value(query).shape[3]
    return _Found(node, result, query, keys, values, mask, 1 / math.sqrt(width) if scale is None else scale, reason)


def _alike(keys: fx.Node, values: fx.Node) -> bool:
    return value(keys).shape[:3] == value(values).shape[:3] and (_stored(keys) is None) == (_stored(values) is None)


def _longer(keys: Any, queries: Any) -> bool:
    """Whether keys are not those of the queries themselves; where sizes are dynamic, if they are not the same size."""
    return keys > queries if isinstance(keys, int) and isinstance(queries, int) else str(keys) != str(queries)


def _stored(node: fx.Node) -> fx.Node | None:
    """What an FP8 cache keeps, where the node is its marker."""
    return arguments(node)[0] if node.target is CACHED else None


def _unrepeated(node: fx.Node) -> fx.Node:
    """Keys or values before each head of them was repeated for the queries that share it."""
    inner: Any = node
    if inner.target not in _RESHAPES:
        return node
    inner = inner.args[0]
    if inner.target is aten.clone.default:
        inner = inner.args[0]
    if inner.target is not aten.expand.default:
        return node
    inner = inner.args[0]
    while inner.target is aten.slice.Tensor and value(inner).shape == value(inner.args[0]).shape:
        inner = inner.args[0]
    if inner.target is not aten.unsqueeze.default or inner.args[1] != 2:
        return node
    inner = inner.args[0]
    batch, heads, length, width = value(inner).shape if value(inner).dim() == 4 else (0, 0, 0, 0)
    shape = tuple(value(node).shape)
    repeats = shape[1] // heads if heads else 0
    return inner if shape == (batch, heads * repeats, length, width) else node
