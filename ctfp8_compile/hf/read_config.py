"""Reads a model's config, whatever it says its dtype is.

transformers looks a `dtype` up among the attributes of torch, which `torch.float8_e4m3fn` or `bf16` is none of, before anything
else is known of the config.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from ..errors import CheckpointError, UsageError

_KEYS = ("dtype", "torch_dtype")  #: the second is older
_OF_CODE = ("trust_remote_code", "code_revision")


def read_config(path_or_id: str | Path, **hub: Any) -> PretrainedConfig:
    """`AutoConfig.from_pretrained`, where a dtype may be written as torch prints it.

    Args:
        **hub: arguments of it that say where the config is.

    Raises:
        CheckpointError: a dtype is none.
    """
    said, _ = PretrainedConfig.get_config_dict(path_or_id, **{k: v for k, v in hub.items() if k not in _OF_CODE})
    readable = _readable(said, str(path_or_id))
    if readable == said:
        config: PretrainedConfig = AutoConfig.from_pretrained(path_or_id, **hub)
        return config
    with tempfile.TemporaryDirectory() as place:
        for code in Path(path_or_id, hub.get("subfolder", "")).glob("*.py"):
            Path(place, code.name).symlink_to(code.resolve())
        Path(place, "config.json").write_text(json.dumps(readable))
        config = AutoConfig.from_pretrained(place, **{k: hub[k] for k in ("token", *_OF_CODE) if k in hub})
    config.name_or_path = str(path_or_id)
    return config


def dtype_of_name(name: str) -> torch.dtype | None:
    """Of `bfloat16` or `torch.bfloat16`; None: torch has no such dtype."""
    found = getattr(torch, name.removeprefix("torch."), None)
    return found if isinstance(found, torch.dtype) else None


def is_computed_in(dtype: torch.dtype) -> bool:
    """Whether weights may be of it: neither float8, a file's format, nor an integer."""
    return dtype.is_floating_point and dtype.itemsize > 1


def settled_argument(name: str, given: Any) -> Any:
    """The argument `dtype` of a loader as transformers takes it: a dtype, its name, or those by the names of sub-configs.

    Raises:
        UsageError: it is none, or nothing is computed in it.
    """
    if isinstance(given, Mapping):
        return {part: settled_argument(name, one) for part, one in given.items()}
    if given is None or given == "auto":
        return given
    dtype = dtype_of_name(given) if isinstance(given, str) else given
    if not isinstance(dtype, torch.dtype):
        raise UsageError(f"{name}={given!r} is no dtype of torch. Give bfloat16, float16 or float32, or leave it out.")
    said = str(dtype).removeprefix("torch.")
    if not is_computed_in(dtype):
        raise UsageError(
            f"{name}={said}: nothing is computed in it. FP8 weights stay as they are in the file whatever dtype is; it says "
            "what the others are loaded in, and what FP8 weights are dequantized to. Leave it out, or give bfloat16, "
            "float16 or float32."
        )
    return given if given is dtype else said


def _readable(said: Mapping[str, Any], where: str, part: str = "") -> dict[str, Any]:
    """A config, or the part of one, with its dtypes as transformers writes them."""
    out = dict(said)
    for key in _KEYS:
        if key in said:
            out[key] = _name(said[key], where, f"{part}{key}")
    kind = CONFIG_MAPPING[said["model_type"]] if said.get("model_type") in CONFIG_MAPPING else None
    for name in getattr(kind, "sub_configs", {}):
        if isinstance(said.get(name), Mapping):
            out[name] = _readable(said[name], where, f"{part}{name}.")
    return out


def _name(said: Any, where: str, key: str) -> Any:
    if isinstance(said, Mapping):
        return {part: _name(one, where, key) for part, one in said.items()}
    if said is None:
        return None
    dtype = dtype_of_name(said) if isinstance(said, str) else None
    if dtype is None:
        raise CheckpointError(
            f"{where}: {key} in config.json is {said!r}, which is no dtype of torch. Write bfloat16, float16 or "
            "float32 there, or take it out."
        )
    return said.removeprefix("torch.")
