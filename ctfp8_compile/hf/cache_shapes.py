"""What each layer of a model caches: how many heads, and how wide their keys and values are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class CacheShape:
    """Of one layer of a whole model, whatever part of it this rank has."""

    heads: int
    key_width: int
    value_width: int


def cache_shapes(model: Any, layers: int) -> list[CacheShape | None]:
    """By layer; None where it is not known before the first pass, as of latent and linear attention.

    What the attention of a layer projects to decides. Some configs do not say it: windows with heads of their own (MiMo), keys
    that are values, too (Gemma 4), values of another width.
    """
    config = model.config.get_text_config(decoder=True)
    own = getattr(config, "per_layer_config", None) or [config] * layers
    projected = (
        {} if hasattr(config, "new_decoder_architecture") else _projected(model, config)
    )  # Falcon: its config knows
    return [projected[i] if i in projected else _configured(own[i]) if i < len(own) else None for i in range(layers)]


def _projected(model: Any, config: Any) -> dict[int, CacheShape | None]:
    """From the weights of attention, where a layer has one whose keys have a projection of their own."""
    found: dict[int, CacheShape | None] = {}
    for module in model.modules():
        layer, width = (
            getattr(module, "layer_idx", None),
            getattr(module, "head_dim", getattr(module, "head_size", None)),
        )
        if not isinstance(layer, int) or isinstance(layer, bool):
            continue
        if any(hasattr(module, name) for name in ("kv_b_proj", "kv_a_proj_with_mqa")):
            found.setdefault(layer, None)  # latent attention caches no heads
        keys = _outputs(module, "k_proj") or _of_fused(module, config, width)
        if not keys or not isinstance(width, int) or width < 1 or keys % width or layer in found:
            continue
        heads = keys // width
        values = _outputs(module, "v_proj") or keys
        if values % heads == 0:
            found[layer] = CacheShape(heads, width, values // heads)
    return found


def _outputs(module: nn.Module, name: str) -> int | None:
    linear = module._modules.get(name)
    outputs = getattr(linear, "out_features", None)
    return outputs if isinstance(outputs, int) else None


def _of_fused(module: nn.Module, config: Any, width: Any) -> int | None:
    """Of keys, where one projection makes queries, keys and values, of one width."""
    every = next(filter(None, (_outputs(module, name) for name in ("qkv_proj", "query_key_value", "Wqkv"))), None)
    queries = getattr(config, "num_attention_heads", None)
    if not every or not isinstance(width, int) or not isinstance(queries, int):
        return None
    rest = every - queries * width
    return rest // 2 if rest > 0 and rest % (2 * width) == 0 else None


def _configured(config: Any) -> CacheShape | None:
    """From the config of a layer."""
    if any(getattr(config, name, None) is not None for name in ("qk_head_dim", "kv_lora_rank")):
        return None
    queries = getattr(config, "num_attention_heads", None)
    heads = getattr(config, "num_key_value_heads", None) or queries
    if hasattr(config, "new_decoder_architecture"):  # Falcon
        heads = queries if config.new_decoder_architecture else 1 if config.multi_query else config.num_kv_heads
    width = getattr(config, "head_dim", None) or (config.hidden_size // queries if queries else None)
    return CacheShape(heads, width, width) if isinstance(heads, int) and isinstance(width, int) else None
