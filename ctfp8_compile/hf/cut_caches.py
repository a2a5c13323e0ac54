"""Growing caches from which drafts are taken back: one graph of a compiled model fits them before and after.

A cache that grows is contiguous after each step, and of a graph made for that, sizes explain strides. What `crop` leaves is a
part of a larger tensor: its strides are of the larger one, and torch asks for its base, too. So a model that is about to be
compiled is shown strides that no size explains, once for each kind of call; dynamo's graph then fits contiguous tensors as
well. AOTAutograd, before Inductor, guards on contiguity besides, so that there both remain.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..inductor.recipe import Compiled
from .compat import DynamicLayer

#: What a layer keeps of its tokens, and their dimension.
_KEPT = {"keys": -2, "values": -2, "indexer_keys": -2, "indexer_position_ids": -1}
#: By compiled function, the kinds of calls that it has met.
_met: WeakKeyDictionary[Compiled, set[Any]] = WeakKeyDictionary()


def cut_later(model: nn.Module, cache: Any) -> None:
    """Says that tokens will be taken back from a cache, if it grows, between the calls of a compiled model."""
    layers = getattr(cache, "layers", None)
    if layers is None or not any(isinstance(layer, DynamicLayer) for layer in layers):
        return
    vars(cache)["_ctfp8_cut"] = True
    if not any(hook is _before for hook in model._forward_pre_hooks.values()):
        model.register_forward_pre_hook(_before, with_kwargs=True)


def _before(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook."""
    cache = next((value for value in kwargs.values() if getattr(value, "_ctfp8_cut", False)), None)
    if cache is None or not isinstance(model.forward, Compiled) or torch.compiler.is_compiling():
        return
    tokens = kwargs.get("input_ids", kwargs.get("inputs_embeds"))
    one = tokens is not None and tokens.shape[1] == 1
    show(model.forward, cache, (one, *sorted(name for name, value in kwargs.items() if value is not None)))


def show(function: Compiled, cache: Any, kind: Any) -> None:
    """Readies a growing cache for a call of a compiled function; `kind` is what that function is compiled for anew."""
    if not cache.get_seq_length():
        return
    met = _met.setdefault(function, set())
    for layer in cache.layers:
        if not isinstance(layer, DynamicLayer):
            continue
        for name, dim in _KEPT.items():
            tokens = getattr(layer, name, None)
            if not isinstance(tokens, Tensor) or not tokens.numel():
                continue
            if kind not in met and tokens.is_contiguous():
                setattr(layer, name, _roomy(tokens, dim))
            elif tokens._base is not None:
                setattr(layer, name, tokens.detach())  # it shares the memory and is not known as a part
    met.add(kind)


def _roomy(tokens: Tensor, dim: int) -> Tensor:
    """A copy with the strides of a tensor with one token more."""
    size = list(tokens.shape)
    size[dim] += 1
    strides = torch.empty(size, device="meta").stride()
    return torch.empty_strided(tokens.shape, strides, dtype=tokens.dtype, device=tokens.device).copy_(tokens)
