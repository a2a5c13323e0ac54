"""`quant_method: quark`: AMD Quark's.

weight        float8_e4m3fn [N, K]
weight_scale  bf16 or float32, [] (fp8) or [N] (ptpc)
input_scale   [], where activations are static
k_proj.output_scale, v_proj.output_scale, or k_proj.k_scale: of an FP8 cache
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import SchemeError
from . import patterns
from .format import Format, block_weights, choice, config_of_groups, fp8_weights, group, names, table


def read(config: Mapping[str, Any]) -> Format:
    groups = {}
    for number, (pattern, words) in enumerate(table(config, "layer_quant_config").items()):
        if table(words, "weight"):
            groups[f"group_{number + 1}"] = group([patterns.glob(pattern)], *_scheme(words))
    unquantized = [p for p, words in table(config, "layer_quant_config").items() if not table(words, "weight")]
    for kind, words in table(config, "layer_type_quant_config").items():
        if kind.rpartition(".")[2] in ("Linear", "") and table(words, "weight"):
            groups["group_0"] = group(["Linear"], *_scheme(words))
    if "group_0" not in groups and table(config, "global_quant_config"):
        groups["group_0"] = group(["Linear"], *_scheme(table(config, "global_quant_config")))
    ignore = [patterns.glob(name) for name in (*names(config, "exclude"), *unquantized)]
    cache = table(config, "kv_cache_quant_config") or names(table(config, "export"), "kv_cache_group")
    return Format("quark", config_of_groups(groups, ignore, cache=bool(cache)))


def _scheme(words: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Weights and activations of one of Quark's configs."""
    weight, inputs = (table(words, which) for which in ("weight", "input_tensors"))
    for which in filter(None, (weight, inputs)):
        choice(which, "dtype", {"fp8_e4m3": None}, None)
    scheme = str(weight.get("qscheme"))
    if scheme == "per_block":
        weights = block_weights(weight.get("block_size"))
    elif scheme == "per_group":
        weights = block_weights([1, weight.get("group_size")])
    else:
        weights = fp8_weights(choice(weight, "qscheme", {"per_tensor": "tensor", "per_channel": "channel"}, None))
    if not inputs:
        return weights, "none"
    known = {"per_tensor": ("tensor", "tensor_dynamic"), "per_channel": (None, "token"), "per_group": (None, "group")}
    static, dynamic = choice(inputs, "qscheme", known, None)
    activation = dynamic if inputs.get("is_dynamic") else static
    if activation is None:
        raise SchemeError(
            "quantization_config: input_tensors has static scales that are not one per tensor; that is not read."
        )
    return weights, activation
