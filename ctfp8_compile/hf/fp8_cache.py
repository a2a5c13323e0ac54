"""Layers of a key-value cache that keep FP8: what transformers' own layers do with tokens, done with FP8 values.

A token is packed into bytes before the layer stores it, and what the layer gives back is marked to be read as numbers. So static,
sliding and growing layers, `reset`, `crop` and the reordering of beams are transformers'. A model attends to what was rounded,
the new tokens too, as it did when scales were calibrated. With latent attention (DeepSeek) the tokens are what transformers
caches of it: the latent, and the part of a key that has a position, each with a scale of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import DynamicCache

from ..errors import UsageError
from ..ops import apply
from ..ops.fp8 import quantize_cached_steps
from .compat import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer
from .parallel import key_value_heads

CacheDtype = Literal["auto", "fp8", "bf16"]
_SCALE = re.compile(r"\.(\d+)\.(?:[\w.]*\.)?(k|v)(?:_proj\.(?:k_|v_|output_)?|_)scale")


def dynamic_cache(model: Any, dtype: CacheDtype = "auto") -> DynamicCache:
    """A growing key-value cache that keeps FP8, for a model that is not compiled.

    Args: as for `static_cache`.
    """
    cache = DynamicCache(config=model.config)
    if keeps_fp8(model, dtype):
        keep_fp8(model, cache.layers)
    return cache


def keeps_fp8(model: Any, dtype: CacheDtype) -> bool:
    """Whether a cache asked for by this name is FP8: `auto` is where the checkpoint was calibrated for it."""
    if dtype not in get_args(CacheDtype):
        raise UsageError(f"dtype={dtype!r}: a cache is 'fp8', 'bf16' (the model's own dtype) or 'auto'.")
    return dtype == "fp8" or (dtype == "auto" and bool(_scales(model)))


def keep_fp8(model: Any, layers: list[Any]) -> None:
    """Replaces layers, which hold nothing yet, by such that keep FP8.

    Raises:
        UsageError: a layer keeps something else than keys and values, or the file has scales for some layers only.
    """
    other = sorted({type(layer).__name__ for layer in layers if type(layer) not in _KINDS})
    if other:
        raise UsageError(
            f"the cache of {type(model).__name__} holds more than keys and values ({', '.join(other)}), which is not kept in "
            "FP8. Make it with dtype='bf16'."
        )
    scales = _scales(model)
    for i, layer in enumerate(layers):
        found = [scales.get((i, which)) for which in "kv"]
        if scales and None in found:
            raise UsageError(
                f"the checkpoint has scales of a key-value cache, but not both for layer {i}. Use dtype='bf16'."
            )
        kind = _KINDS[type(layer)]
        layers[i] = kind.__new__(kind)
        layers[i].__dict__.update(layer.__dict__)
        layers[i].scales = tuple(
            None if s is None else _own(model, s.to(model.device, torch.float32).flatten()) for s in found
        )


def _own(model: Any, scale: Tensor) -> Tensor:
    """`[1]` or `[heads]` of the file: those of the heads that this rank has."""
    if len(scale) == 1:
        return scale
    heads = key_value_heads(model, len(scale))
    return scale[heads.start : heads.stop]


def _scales(model: Any) -> Mapping[tuple[int, str], Tensor]:
    """The checkpoint's scales, by layer and `k` or `v`; they are of heads, which a latent cache has not."""
    if getattr(model.config.get_text_config(decoder=True), "kv_lora_rank", None) is not None:
        return {}
    kept = getattr(getattr(model, "hf_quantizer", None), "cache_scales", {})
    return {(int(m[1]), m[2]): scale for name, scale in kept.items() if (m := _SCALE.search(name))}


class _Fp8:
    """`scales` of keys and values, `[1]` or `[heads]`; where they are None each token has its own."""

    scales: tuple[Tensor | None, Tensor | None]

    def begin(self, keys: Tensor, values: Tensor) -> None:
        """`lazy_initialization` for tokens as the model makes them."""
        self.lazy_initialization(*self._packed(keys, values))  # type: ignore[attr-defined]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        stored = super().update(*self._packed(key_states, value_states), *args, **kwargs)  # type: ignore[misc]
        keys, values = (
            torch.ops.ctfp8.cached(t, scale, key_states.dtype) for t, scale in zip(stored, self.scales, strict=True)
        )
        return keys, values

    def _packed(self, *states: Tensor) -> list[Tensor]:
        return [quantize_cached_steps(apply, t, scale) for t, scale in zip(states, self.scales, strict=True)]


class StaticFp8Layer(_Fp8, StaticLayer):
    pass


class _StaticSlidingFp8(_Fp8, StaticSlidingWindowLayer):
    pass


class _DynamicFp8(_Fp8, DynamicLayer):
    pass


class _DynamicSlidingFp8(_Fp8, DynamicSlidingWindowLayer):
    pass


_KINDS: dict[type, Any] = {
    StaticLayer: StaticFp8Layer,
    StaticSlidingWindowLayer: _StaticSlidingFp8,
    DynamicLayer: _DynamicFp8,
    DynamicSlidingWindowLayer: _DynamicSlidingFp8,
}
