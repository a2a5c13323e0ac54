"""How continuous batching keeps keys and values in its pages: in the model's dtype, or as FP8, as the other caches of ours do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from .cache_scales import Affine
from .fp8_cache import CacheDtype, keeps_fp8, packed, scales_of

_ASKED = "_ctfp8_pages"
#: By layer, how keys and values are kept, as scales and biases: what a graph takes.
Layers = tuple[tuple[tuple[Tensor | None, Tensor | None], tuple[Tensor | None, Tensor | None]], ...]


def paged_cache(model: Any, dtype: CacheDtype = "auto") -> None:
    """Says how `model.generate_batch` keeps keys and values from now on; until it is called, in the model's dtype.

        ctfp8.paged_cache(model, "fp8")
        model.generate_batch(prompts, continuous_batching_config=room)   # half the memory for as many tokens

    Args:
        model: a causal language model of transformers.
        dtype: `"fp8"` keeps them as FP8, with the checkpoint's scales if it was calibrated for that, else with one for each
            token and head. `"bf16"` keeps the model's dtype. `"auto"` is FP8 if the checkpoint has scales.

    Raises:
        UsageError: it is none of these.
    """
    keeps_fp8(model, dtype)
    model.__dict__[_ASKED] = dtype


def is_fp8(model: Any, why: str | None) -> bool:
    """Whether pages are FP8.

    Args:
        why: why the model's steps stay transformers' own, whose pages are in the model's dtype; None where they are ours.

    Raises:
        UsageError: FP8 was asked for, and they cannot be.
    """
    asked: CacheDtype = model.__dict__.get(_ASKED, "bf16")
    if why is not None and asked == "fp8":
        raise UsageError(
            f"the pages of {type(model).__name__} cannot be FP8: {why}. Keep them in its dtype: --cache bf16, "
            "ctfp8.paged_cache(model, 'bf16')."
        )
    return why is None and keeps_fp8(model, asked)


def layers_of(model: Any) -> Layers:
    """How each layer's keys and values are kept as FP8."""
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    own = [scales_of(model, i) for i in range(count)]
    return tuple(((k.scale, k.bias), (v.scale, v.bias)) for k, v in own)


def attend(
    attention: Callable[..., Tensor], states: tuple[Tensor, Tensor, Tensor], layers: Layers | None, layer: int
) -> Tensor:
    """Attention with keys and values as they are kept.

    A bias of keys adds the same to a query's product with each of them, which softmax takes back; one of values is added to
    what their weighted sum is.

    Args:
        attention: takes a query, keys, values and the latter two's scales; gives `[1, tokens, heads, columns]`.
        states: query, keys and values, `[1, heads, tokens, columns]`.
        layers: of FP8 pages; None where pages are in the model's dtype.
    """
    query, key, value = states
    if layers is None:
        return attention(query, key, value, None, None)
    keys, values = (Affine(*own) for own in layers[layer])
    out = attention(query, packed(key, keys), packed(value, values), keys.scale, values.scale)
    if values.bias is None:
        return out
    bias = values.bias if values.bias.shape[1] == 1 else values.bias.repeat_interleave(out.shape[2] // key.shape[1], 1)
    return (out.float() + bias.transpose(1, 2)).to(out.dtype)


class Bytes:
    """What transformers makes pages for instead of the model: tokens of so many bytes a head."""

    def __init__(self, model: Any, layers: Layers):
        self._model = model
        self.dtype = torch.uint8
        self.config = copy.deepcopy(model.config.get_text_config())
        width = getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads
        self.config.head_dim = width + any(scale is None for layer in layers for scale, _ in layer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)
