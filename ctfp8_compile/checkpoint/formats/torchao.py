"""`quant_method: torchao`: torchao's safetensors, whose header says how each tensor is made of several.

{module}._weight_qdata  float8_e4m3fn [N, K]
{module}._weight_scale  float32 [N, 1] (PerRow) or [1, 1] (PerTensor)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import SchemeError
from . import patterns
from .format import Format, choice, config_of_groups, fp8_weights, group, names, table

_GRANULARITIES = {"PerRow": ("channel", "token"), "PerTensor": ("tensor", "tensor_dynamic")}


def read(config: Mapping[str, Any]) -> Format:
    kinds = table(config, "quant_type")
    words = table(kinds, "default")
    if not words:
        raise SchemeError("quantization_config: quant_type has no 'default', which torchao writes there.")
    groups = {"group_0": group(["Linear"], *_scheme(words))}
    ignore = list(map(patterns.prefix, names(config, "modules_to_not_convert")))
    return Format(
        "torchao",
        config_of_groups(groups, ignore),
        {"._weight_scale": ".weight_scale"},
        {"._weight_qdata": ".weight"},
    )


def _scheme(words: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Weights and activations of one of torchao's configs."""
    known = {"Float8DynamicActivationFloat8WeightConfig": True, "Float8WeightOnlyConfig": False}
    quantized = choice(words, "_type", known, None)
    data = table(words, "_data")
    dtype = table(data, "weight_dtype").get("_data", "float8_e4m3fn")
    choice({"weight_dtype": dtype}, "weight_dtype", {"float8_e4m3fn": None}, None)
    if not quantized:
        return fp8_weights("channel"), "none"
    granularity = data.get("granularity") or [{"_type": "PerTensor"}] * 2
    granularity = granularity if isinstance(granularity, (list, tuple)) else [granularity, granularity]
    (weights, _), (_, activation) = (choice(dict(g), "_type", _GRANULARITIES, None) for g in reversed(granularity))
    return fp8_weights(weights), activation
