"""`quant_method: modelopt`, and its side file `hf_quant_config.json`: NVIDIA ModelOpt's.

weight         float8_e4m3fn [N, K]       experts.gate_up_proj               [E, K, N]  (gpt-oss, Llama 4)
weight_scale   float32 [], [N], 4-D       experts.gate_up_proj_weight_scale  [] or [E]
               blocks, or U8 (MXFP8)
input_scale    float32 []                 experts.gate_up_proj_input_scale
NVFP4 in a mixed file: weight U8 [N, K/2], weight_scale float8_e4m3fn [N, K/16], weight_scale_2 float32 []
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from ...errors import SchemeError
from . import patterns
from .format import MX_WEIGHTS, Format, Suffixes, choice, config_of_groups, fp8_weights, group, names, table

SUFFIXES: Suffixes = {"_weight_scale": "_scale", "_scale_inv": "_scale", ".weight_scale_2": ".weight_global_scale"}

_NVFP4 = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16,
          "scale_dtype": "torch.float8_e4m3fn"}  # fmt: skip
#: By algorithm: weights, and activations.
_ALGORITHMS: Mapping[str, tuple[Mapping[str, Any], str]] = {
    "FP8": (fp8_weights("tensor"), "tensor"),
    "FP8_PER_CHANNEL_PER_TOKEN": (fp8_weights("channel"), "token"),
    "FP8_PB_WO": (fp8_weights("block", block_structure=[128, 128]), "none"),
    "MXFP8": (MX_WEIGHTS, "mx"),
}
_BESIDE: Mapping[str, tuple[Mapping[str, Any], str]] = {"NVFP4": (_NVFP4, "none")}  #: only in a mixed file
_MIXED = "MIXED_PRECISION"


def read(config: Mapping[str, Any]) -> Format:
    inner = config.get("quantization", config)  # `hf_quant_config.json` nests it
    if not isinstance(inner, Mapping):
        raise SchemeError("quantization_config: 'quantization' is not an object.")
    found = choice(inner, "quant_algo", {**_ALGORITHMS, _MIXED: None}, None)
    groups = _mixed(inner) if found is None else {"group_0": group(["Linear"], *found)}
    kept = names(inner, "exclude_modules") or names(inner, "ignore")
    cache = inner.get("kv_cache_quant_algo") or inner.get("kv_cache_scheme")
    return Format(
        "modelopt",
        config_of_groups(groups, map(patterns.wildcard, kept), cache=bool(cache)),
        SUFFIXES,
        packed_by=".weight_scale_2",
        inverse=(".weight_global_scale",),
    )


def _mixed(config: Mapping[str, Any]) -> dict[str, Any]:
    """The groups of a file with several algorithms: by the layers' names, or by the config's own groups."""
    by_algorithm: dict[str, list[str]] = defaultdict(list)
    for layer, words in table(config, "quantized_layers").items():
        by_algorithm[str(words.get("quant_algo") if isinstance(words, Mapping) else words).upper()].append(layer)
    if not by_algorithm:
        for name, words in table(config, "config_groups").items():
            by_algorithm[_algorithm(name, words)] += names(words, "targets")
    if not by_algorithm:
        raise SchemeError(
            f"quantization_config: quant_algo={_MIXED}, but there are no quantized_layers and no config_groups."
        )
    known = {**_ALGORITHMS, **_BESIDE}
    groups = {}
    for number, (algorithm, layers) in enumerate(by_algorithm.items()):
        weights, activation = choice({"quant_algo": algorithm}, "quant_algo", known, None)
        more = {"format": "nvfp4-pack-quantized"} if algorithm == "NVFP4" else {}
        groups[f"group_{number}"] = group(layers, weights, activation, **more)
    return groups


def _algorithm(name: str, words: Any) -> str:
    """Of a group in compressed-tensors' words, which has no name of an algorithm."""
    weights = table(words, "weights") if isinstance(words, Mapping) else {}
    if weights.get("type") == "float" and weights.get("num_bits") == 4 and weights.get("group_size") == 16:
        return "NVFP4"
    if weights.get("type") == "float" and weights.get("num_bits") == 8:
        return "MXFP8" if weights.get("group_size") == 32 else "FP8"
    raise SchemeError(f"quantization_config: config_groups.{name} has weights that are not read ({dict(weights)!r}).")
