"""Layers of a key-value cache that keep FP8: what transformers' own layers do with tokens, done with FP8 values.

A token is packed into bytes before the layer stores it, and what the layer gives back is marked to be read as numbers. So static,
sliding and growing layers, `reset`, `crop` and the reordering of beams are transformers'. A model attends to what was rounded,
the new tokens too, as it did when scales were calibrated. With latent attention (DeepSeek) the tokens are what transformers
caches of it: the latent, and the part of a key that has a position, each with a scale of its own.

Layers that keep something else (the states of linear attention, compressed tokens) stay as transformers has them.
"""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary
from transformers import DynamicCache

from ..errors import UsageError
from ..ops import apply
from ..ops.fp8 import quantize_cached_steps
from .cache_scales import Affine, CacheScales
from .compat import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer
from .parallel import key_value_heads

CacheDtype = Literal["auto", "fp8", "bf16"]


def dynamic_cache(model: Any, dtype: CacheDtype = "auto") -> DynamicCache:
    """A growing key-value cache that keeps FP8, for a model that is not compiled.

    Args: as for `static_cache`.
    """
    cache = DynamicCache(config=model.config)
    if keeps_fp8(model, dtype):
        keep_fp8(model, cache.layers, dtype)
    return cache


def keeps_fp8(model: Any, dtype: CacheDtype) -> bool:
    """Whether a cache asked for by this name is FP8: `auto` is where the checkpoint was made for it."""
    if dtype not in get_args(CacheDtype):
        raise UsageError(f"dtype={dtype!r}: a cache is 'fp8', 'bf16' (the model's own dtype) or 'auto'.")
    return dtype == "fp8" or (dtype == "auto" and _scales(model).fp8)


def keep_fp8(model: Any, layers: list[Any], dtype: CacheDtype) -> None:
    """Replaces layers, which hold nothing yet, by such that keep FP8; those that keep no keys and values stay as they are.

    Raises:
        UsageError: FP8 was asked for, and no layer can keep it.
    """
    others = Counter(type(layer).__name__ for layer in layers if _holds(layer) and _fp8_kind(type(layer)) is None)
    which = f"{sum(others.values())} of {len(layers)} layers of the cache of {type(model).__name__} ({', '.join(sorted(others))})"
    if others and sum(others.values()) == sum(map(_holds, layers)) and dtype == "fp8":
        raise UsageError(
            f"{which} keep no keys and values, which is all that is kept in FP8. Make it with dtype='bf16'."
        )
    for i, layer in enumerate(layers):
        if not _holds(layer) or (kind := _fp8_kind(type(layer))) is None:
            continue
        layers[i] = kind.__new__(kind)
        layers[i].__dict__.update(layer.__dict__)
        own = scales_of(model, i)
        layers[i].scales = tuple(affine.scale for affine in own)
        layers[i].biases = tuple(affine.bias for affine in own)
    if others and model not in _told:
        _told[model] = None
        warnings.warn(
            f"{which} keep states, not keys and values: they stay in {model.dtype}; the others are FP8.", stacklevel=3
        )


def scales_of(model: Any, layer: int) -> tuple[Affine, Affine]:
    """How a layer's keys, and its values, are kept as FP8."""
    keys, values = (CacheScales() if _is_latent(model) else _scales(model)).of(layer)
    return _own(model, keys), _own(model, values)


def packed(states: Tensor, affine: Affine) -> Tensor:
    """`[batch, heads, tokens, columns]` as FP8 values in uint8, with each token's scale behind them where it has its own."""
    shifted = states if affine.bias is None else states.float() - affine.bias
    return quantize_cached_steps(apply, shifted, affine.scale)


#: Models whose cache was said to be FP8 in part.
_told: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _holds(layer: Any) -> bool:
    """Whether a layer keeps anything: those that share another's keys, or have no attention, do not."""
    return bool(getattr(layer, "supports_early_init", True)) or not getattr(layer, "is_initialized", False)


def _own(model: Any, affine: Affine) -> Affine:
    """As this rank has them: of its heads, on its device."""
    scale, bias = affine.scale, affine.bias
    if scale is not None:
        if len(scale) > 1:
            heads = key_value_heads(model, len(scale))
            scale = scale[heads.start : heads.stop]
        scale = scale.to(model.device, torch.float32)
    if bias is not None:
        if bias.shape[1] > 1:
            heads = key_value_heads(model, bias.shape[1])
            bias = bias[:, heads.start : heads.stop]
        bias = bias.to(model.device, torch.float32)
    return Affine(scale, bias)


def _scales(model: Any) -> CacheScales:
    return getattr(getattr(model, "hf_quantizer", None), "cache", None) or CacheScales()


def _is_latent(model: Any) -> bool:
    """Whether a model caches latents: a checkpoint's scales are of heads, which they are not."""
    return getattr(model.config.get_text_config(decoder=True), "kv_lora_rank", None) is not None


class _Fp8:
    """`scales` and `biases` of keys and values, as in `Affine`."""

    scales: tuple[Tensor | None, Tensor | None]
    biases: tuple[Tensor | None, Tensor | None] = (None, None)

    def begin(self, keys: Tensor, values: Tensor) -> None:
        """`lazy_initialization` for tokens as the model makes them."""
        self.lazy_initialization(*self._packed(keys, values))  # type: ignore[attr-defined]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        stored = super().update(*self._packed(key_states, value_states), *args, **kwargs)  # type: ignore[misc]
        keys, values = (
            _read(t, scale, bias, key_states.dtype)
            for t, scale, bias in zip(stored, self.scales, self.biases, strict=True)
        )
        return keys, values

    def _packed(self, *states: Tensor) -> list[Tensor]:
        affines = map(Affine, self.scales, self.biases)
        return [packed(t, affine) for t, affine in zip(states, affines, strict=True)]


def _read(stored: Tensor, scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    if bias is None:
        return torch.ops.ctfp8.cached(stored, scale, dtype)
    return (torch.ops.ctfp8.cached(stored, scale, torch.float32) + bias).to(dtype)


class StaticFp8Layer(_Fp8, StaticLayer):
    pass


class _StaticSlidingFp8(_Fp8, StaticSlidingWindowLayer):
    pass


class _DynamicFp8(_Fp8, DynamicLayer):
    pass


class _DynamicSlidingFp8(_Fp8, DynamicSlidingWindowLayer):
    pass


_WHOLE: tuple[Any, ...] = (StaticLayer, DynamicLayer)
_SLIDING: tuple[Any, ...] = (StaticSlidingWindowLayer, DynamicSlidingWindowLayer)
#: By class, its FP8 one, or None; made as they are met.
_KINDS: dict[type, Any] = {
    StaticLayer: StaticFp8Layer,
    StaticSlidingWindowLayer: _StaticSlidingFp8,
    DynamicLayer: _DynamicFp8,
    DynamicSlidingWindowLayer: _DynamicSlidingFp8,
}


def _fp8_kind(cls: Any) -> Any:
    """A class of layers that does the same with FP8; None where that keeps other things than tokens.

    Layers that keep something beside their keys and values (a state of linear attention, an index) keep that as it is.
    """
    if cls not in _KINDS:
        same = getattr(cls, "update", None) in [known.update for known in (*_WHOLE, *_SLIDING)]
        _KINDS[cls] = type(f"Fp8{cls.__name__}", (_Fp8, cls), {"_layer_type": None}) if same else None
    return _KINDS[cls]
