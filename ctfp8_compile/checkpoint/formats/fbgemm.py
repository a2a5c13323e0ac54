"""`quant_method: fbgemm_fp8`: transformers' own writer; rows of weights, activations per token with a bound.

weight        float8_e4m3fn [N, K]          experts.gate_up_proj        [E, K, N]   (Llama 4)
weight_scale  float32 [N, 1]                experts.gate_up_proj_scale  [E, 1, N], of down_proj [E, N, 1]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import SchemeError
from . import patterns
from .format import Format, config_of_groups, fp8_weights, group, names


def read(config: Mapping[str, Any]) -> Format:
    bound = config.get("activation_scale_ub", 1200.0)
    if not isinstance(bound, (int, float)) or isinstance(bound, bool) or not 0 < bound < float("inf"):
        raise SchemeError(f"quantization_config: activation_scale_ub={bound!r} is not a positive number.")
    groups = {"group_0": group(["Linear"], fp8_weights("channel"), "token")}
    kept = names(config, "modules_to_not_convert")
    return Format("fbgemm_fp8", config_of_groups(groups, map(patterns.prefix, kept)), bound=float(bound))
