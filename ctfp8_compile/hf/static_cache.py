"""Key-value caches of a fixed size: for compiled generation, and inside an exported model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, StaticCache

from ..errors import UsageError
from .cache_shapes import cache_shapes
from .compat import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    STATIC_LAYER_TYPE_MAPPING,
    StaticLayer,
    cache_argument,
    get_layer_types_and_kwargs,
)
from .fp8_cache import CacheDtype, StaticFp8Layer, keep_fp8, keeps_fp8
from .one_text import OneText, watch
from .parallel import key_value_heads

_STATE = ("keys", "values", "cumulative_length")


def static_cache(model: Any, batch_size: int = 1, max_length: int = 1024, dtype: CacheDtype = "auto") -> StaticCache:
    """A static key-value cache whose tensors exist already, for a compiled model.

    `StaticCache(config=…, max_cache_len=…)` makes them at the first forward pass. Where that pass is compiled too, the model
    is compiled once without them and a second time with them. `cache.reset()` empties it for another text. Latent attention
    (DeepSeek) and linear attention still begin at the first pass.

        cache = ctfp8.static_cache(model, batch_size=1, max_length=512)
        model.generate(**inputs, cache=cache, max_new_tokens=64)   # transformers before 5.24: past_key_values=cache

    Args:
        model: a causal language model of transformers.
        batch_size, max_length: sequences, and tokens of each, that it holds.
        dtype: `"fp8"` keeps keys and values as FP8, in half the memory: with the checkpoint's scales if it was calibrated
            for that, else with one for each token and head. `"bf16"` keeps the model's dtype. `"auto"` is FP8 if the
            checkpoint has scales.

    Raises:
        UsageError: the model's cache cannot be FP8.
    """
    config = model.config.get_text_config(decoder=True)
    cache = _cache(config, max_length)
    cache.rows, cache.limit = batch_size, max_length
    cache.empty()
    if keeps_fp8(model, dtype):
        keep_fp8(model, cache.layers, dtype)
    watch(model)
    for layer, shape in zip(cache.layers, cache_shapes(model, len(cache.layers)), strict=True):
        if shape is not None and getattr(layer, "supports_early_init", True) and not layer.is_initialized:
            heads = len(key_value_heads(model, shape.heads))
            keys, values = (
                torch.zeros(batch_size, heads, 0, width, dtype=model.dtype, device=model.device)
                for width in (shape.key_width, shape.value_width)
            )
            getattr(layer, "begin", layer.lazy_initialization)(keys, values)
    return cache


def _cache(config: Any, max_length: int) -> OneText:
    cache = OneText.__new__(OneText)
    Cache.__init__(cache, layers_of(config, max_length))
    return cache


def layers_of(config: Any, max_length: int) -> list[Any]:
    """Layers of a cache. Those that transformers has no static kind of are those that grow."""
    types, arguments = get_layer_types_and_kwargs(config)
    kinds = [STATIC_LAYER_TYPE_MAPPING.get(name) or DYNAMIC_LAYER_TYPE_MAPPING[name] for name in types]
    return [kind(max_cache_len=max_length, **own) for kind, own in zip(kinds, arguments, strict=True)]


class StaticCacheDecoder(nn.Module):
    """`logits = decoder(input_ids, position)`, the cache being buffers that each call updates.

    One entry point serves prefill and decode, with the number of tokens as a dynamic dimension:

        decoder = ctfp8.StaticCacheDecoder(model, batch_size=1, max_length=256)
        tokens = torch.export.Dim("tokens", max=256)
        ctfp8.export(decoder, (ids, torch.tensor(0)), path="model.pt2", dynamic_shapes=({1: tokens}, None))

        module = ctfp8.load("model.pt2")
        logits = module(prompt, torch.tensor(0))                    # prefill
        logits = module(token, torch.tensor(prompt.shape[1]))       # decode, and so on

    Two entry points would have to share weights and cache, but torch's archive stores, and its loader allocates, each
    program's tensors on their own: a second program would double the file and leave two caches. Two artifacts would too.
    A program for a fixed number of tokens, should a device want one, is the same export without `dynamic_shapes`.

    Args:
        model: a causal language model of transformers with FP8 weights.
        batch_size, max_length, dtype: of the cache. Its zeros are part of the file.
    """

    def __init__(self, model: Any, batch_size: int = 1, max_length: int = 1024, dtype: CacheDtype = "auto"):
        super().__init__()
        self.model = model
        self.max_length = max_length
        self._argument = cache_argument(model)
        self.cache = static_cache(model, batch_size, max_length, dtype)
        plain = [type(layer) in (StaticLayer, StaticFp8Layer) and layer.is_initialized for layer in self.cache.layers]
        odd = {type(layer).__name__ for layer, fine in zip(self.cache.layers, plain, strict=True) if not fine}
        if odd:
            raise UsageError(
                f"the cache of {type(model).__name__} has layers of type {', '.join(sorted(odd))}, which begin at the first "
                "pass or depend on values: torch.export cannot trace them. Export the model without a cache: "
                "kwargs={'use_cache': False}."
            )
        for i, layer in enumerate(self.cache.layers):
            for name in _STATE:
                self.register_buffer(f"{name}_{i}", getattr(layer, name), persistent=False)
        self.eval()

    @property
    def config(self) -> Any:
        """The model's: by it reports name what they are of."""
        return self.model.config

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StaticCacheDecoder:
        """Moves what the cache's layers know besides the buffers, too."""
        super()._apply(fn, recurse)
        for i, layer in enumerate(self.cache.layers):
            layer.device = getattr(self, f"keys_{i}").device
            if isinstance(layer, StaticFp8Layer):
                layer.scales = tuple(None if scale is None else fn(scale) for scale in layer.scales)  # type: ignore[assignment]
        return self

    def forward(self, input_ids: Tensor, position: Tensor) -> Tensor:
        """Logits of all tokens given.

        Args:
            input_ids: `[batch, tokens]`.
            position: of the first token, int64 without dimensions; 0 begins a new text.
        """
        for i, layer in enumerate(self.cache.layers):
            for name in _STATE:  # torch.export knows only state that is reached through the module
                setattr(layer, name, getattr(self, f"{name}_{i}"))
            layer.cumulative_length.copy_(position)
        positions = position + torch.arange(input_ids.shape[1], device=input_ids.device)
        cache = {self._argument: self.cache}
        out = self.model(input_ids=input_ids, position_ids=positions[None], use_cache=True, **cache)
        return out.logits
