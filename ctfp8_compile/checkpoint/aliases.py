"""Other names of a Linear: programs that run several as one write their targets against the fused name, or the other way."""

from __future__ import annotations

import re

#: Fused names, and what is in them.
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "w13": ("w1", "w3"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
    "query_key_value": ("query", "key", "value"),
}


def aliases(module: str) -> list[str]:
    """The fused name of an unfused module, the unfused ones of a fused module, and both without the number of an expert."""
    stem, dot, leaf = module.rpartition(".")
    leaves = [fused for fused, parts in FUSED.items() if leaf in parts]
    leaves += FUSED.get(leaf, ())
    found = [f"{stem}{dot}{name}" for name in leaves]
    merged = [re.sub(r"\.experts\.\d+\.", ".experts.", name) for name in (module, *found)]
    return [name for name in dict.fromkeys((*found, *merged)) if name != module]
