"""`quant_method: auto-round`: Intel AutoRound's own (its `llm_compressor` export writes compressed-tensors).

packing_format          weight_scale             scale is
auto_round:fp8          weight_scale_inv         float32 [ceil(N/128), ceil(K/128)]
auto_round:fp8_static   weight_scale, input_…    float32 [N], [1]
MXFP8                   weight_scale             U8 [N, K/32]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import SchemeError
from . import fp8, patterns
from .format import MX_WEIGHTS, Format, block_weights, choice, config_of_groups, fp8_weights, group, names, table


def read(config: Mapping[str, Any]) -> Format:
    groups = {"group_0": group(_targets(config), *_scheme(config))}
    kept = list(map(patterns.prefix, names(config, "modules_to_not_convert")))
    for number, (layer, changes) in enumerate(table(config, "extra_config").items()):
        words = {**config, **(changes if isinstance(changes, Mapping) else {})}
        target = patterns.found(layer) if any(c in layer for c in "*+?^$[(|\\") else layer
        if int(words.get("bits") or 16) >= 16:
            kept.append(target)
        elif _scheme(words) != _scheme(config) or not _is_inside(layer, config):
            groups[f"group_{number + 1}"] = group([target], *_scheme(words))
    return Format("auto-round", config_of_groups(groups, kept), fp8.SUFFIXES)


def _targets(config: Mapping[str, Any]) -> list[str]:
    """What is quantized: every linear of the blocks named, or of the model."""
    blocks = _blocks(config)
    return [patterns.inside(block) for block in blocks] or ["Linear"]


def _blocks(config: Mapping[str, Any]) -> list[str]:
    blocks = config.get("block_name_to_quantize") or []
    blocks = blocks.split(",") if isinstance(blocks, str) else blocks
    return names({"block_name_to_quantize": blocks}, "block_name_to_quantize")


def _is_inside(layer: str, config: Mapping[str, Any]) -> bool:
    return not _blocks(config) or any(layer.startswith(f"{block}.") for block in _blocks(config))


def _scheme(config: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Weights and activations, by AutoRound's words."""
    if config.get("bits") != 8:
        raise SchemeError(
            f"quantization_config: bits={config.get('bits')!r} of an AutoRound file are not read, only FP8's 8."
        )
    choice(config, "fmt", {"e4m3": None}, "e4m3")
    kind = str(config.get("data_type"))
    if not kind.startswith(("fp", "mx_fp")):
        raise SchemeError(
            f"quantization_config: data_type={kind!r} of an AutoRound file is not read, only fp and mx_fp."
        )
    quantized = int(config.get("act_bits") or 16) < 16
    if kind.startswith("mx_fp"):
        return dict(MX_WEIGHTS), "mx" if quantized else "none"
    size = config.get("weight_block_size") or config.get("group_size")
    if isinstance(size, (list, tuple)):
        weights, dynamic = block_weights(size), "group"
    elif size == 0:
        weights, dynamic = fp8_weights("tensor"), "token"
    elif size in (-1, None):
        weights, dynamic = fp8_weights("channel"), "token"
    else:
        weights, dynamic = block_weights([1, size]), "token"
    if not quantized:
        return weights, "none"
    return weights, dynamic if config.get("act_dynamic", True) else "tensor"
