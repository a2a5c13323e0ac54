"""`quant_method: fp8`: DeepSeek's, and of all who took it over; AutoFP8's, Mistral's and GPTQModel's differ by names of tensors.

    weight            float8_e4m3fn [N, K]
    weight_scale_inv  float32, bf16 or ue8m0; [ceil(N/128), ceil(K/128)], or one number; multiplied, whatever its name says
    activation_scale  one number, where activation_scheme is static

GPTQModel says `weight_scale_semantics: inverse` where a weight is its FP8 value divided by the scale, `[N]`, `[]` or blocks.
transformers' own writer stacks the scales of a layer's experts: `experts.gate_up_proj_scale_inv` `[E, …]` (`checkpoint.stacked`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import SchemeError
from . import patterns
from .format import (
    MX_WEIGHTS,
    Format,
    Suffixes,
    block_weights,
    choice,
    config_of_groups,
    fp8_weights,
    group,
    names,
    table,
)

SUFFIXES: Suffixes = {
    "_activation_scale": "_input_scale",  # of experts in one tensor: `gate_up_proj`, `gate_up_proj_scale_inv`, …
    "_scale_inv": "_scale",
    ".activation_scale": ".input_scale",
    ".qscale_weight": ".weight_scale",
    ".qscale_act": ".input_scale",
    ".scale": ".weight_scale",
}
_E4M3 = dict.fromkeys(["e4m3", "e4m3fn", "float8_e4m3", "float8_e4m3fn", "fp8"])


def read(config: Mapping[str, Any]) -> Format:
    if (config.get("expert_dtype") or "fp8") != "fp8":
        raise SchemeError(f"quantization_config: expert_dtype={config['expert_dtype']!r} is not supported, only 'fp8'.")
    for word in ("fmt", "format"):
        choice(config, word, _E4M3, "e4m3")
    activation = choice(config, "activation_scheme", {"dynamic": "token", "static": "tensor"}, "dynamic")
    exponents = choice(config, "scale_fmt", {"float": False, "float32": False, "fp32": False, "ue8m0": True}, "float")
    block, method = config.get("weight_block_size"), config.get("weight_scale_method")
    if block is not None:
        weights = block_weights(block, exponents)
        mx = exponents and weights.get("group_size") == 32
        activation = activation if activation == "tensor" else "mx" if mx else "group"
    else:
        weights = fp8_weights(choice(config, "weight_scale_method", {"row": "channel", "tensor": "tensor"}, "tensor"))
        weights |= {"scale_dtype": "torch.uint8"} if exponents else {}
    if config.get("weight_scale_semantics") is not None or method is not None:
        activation = "none"  # GPTQModel's are weight-only
    groups = {"group_0": group(["Linear"], weights, activation)}
    if more := names(config, "modules_to_convert"):
        groups["group_1"] = group([patterns.prefix(name) for name in more], fp8_weights("tensor"), "none")
    kept = [*names(config, "modules_to_not_convert"), *names(config, "ignored_layers")]
    ignore = [*map(patterns.prefix, kept), *_without(config)]
    inverse = choice(
        config, "weight_scale_semantics", {"inverse": (".weight_scale",), "multiply": (), "scale": ()}, "scale"
    )
    directed = config.get("weight_scale_semantics") is not None
    return Format("fp8", config_of_groups(groups, ignore), SUFFIXES, inverse=inverse, directed=directed)


def read_mx(config: Mapping[str, Any]) -> Format:
    """`quant_method: mxfp8`: blocks of 1×32 with bytes as scales, `weight_scale` or `weight_scale_inv`."""
    kept = [name for field in ("modules_to_not_convert", "ignored_layers", "ignore") for name in names(config, field)]
    groups = {"group_0": group(["Linear"], MX_WEIGHTS, "mx")}
    return Format("mxfp8", config_of_groups(groups, map(patterns.prefix, kept)), SUFFIXES)


def _without(config: Mapping[str, Any]) -> list[str]:
    """The modules that GPTQModel's `dynamic` leaves out: expressions behind `-:`.

    Raises:
        SchemeError: it quantizes some in another way.
    """
    kept = []
    for expression, changes in table(config, "dynamic").items():
        if not expression.startswith("-:"):
            raise SchemeError(
                f"quantization_config: dynamic quantizes {expression!r} in another way ({changes!r}); that is not read."
            )
        kept.append(patterns.found(expression.removeprefix("-:")))
    return kept
