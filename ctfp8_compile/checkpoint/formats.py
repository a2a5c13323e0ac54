"""Formats of FP8 checkpoints: each config becomes one in compressed-tensors' words, each tensor's name one of ours.

One arithmetic, several spellings. What follows from here (`Schemes`, `Checkpoint`) does not know which it was; names of
tensors as their file spells them, and the config as it was read, are kept for messages and for saving.

| `quant_method` | scales in the file | what its config says |
|---|---|---|
| `compressed-tensors` | `weight_scale`, `input_scale` | groups, targets, ignore |
| `fp8` | `weight_scale_inv` (or `weight_scale`), `activation_scale` (or `input_scale`) | block size, lists of modules |
| `fbgemm_fp8` | `weight_scale` | a bound of the activations' largest value, a list of modules |
| `modelopt` | `weight_scale`, `input_scale` | one of three algorithms, a list with wildcards |
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, SchemeError
from .words import tidy

SIDE_FILE = "hf_quant_config.json"  #: where ModelOpt writes the config if it does not write it to `config.json`

Suffixes = Mapping[str, str]
"""How tensors' names end in a format, and how they end in ours."""


@dataclass(frozen=True)
class Format:
    """A quantization config in compressed-tensors' words.

    Attributes:
        name: the `quant_method` it was read from.
        config: as in a compressed-tensors checkpoint's `config.json`.
        suffixes: see `canonical_names`.
        bound: activations quantized per token count as no larger than this; fbgemm's `activation_scale_ub`.
    """

    name: str
    config: Mapping[str, Any]
    suffixes: Suffixes
    bound: float | None = None


def read_format(quantization_config: Mapping[str, Any]) -> Format:
    """Translates the dict under `quantization_config` in a checkpoint's `config.json`.

    Raises:
        SchemeError: a method that is none of ours, or a field whose value is unknown.
    """
    quantization_config = tidy(quantization_config)
    method = quantization_config.get("quant_method", "compressed-tensors")
    if not isinstance(method, str) or method not in _READERS:
        raise SchemeError(
            f"quantization_config says quant_method={method!r}; only {', '.join(map(repr, _READERS))} checkpoints are read "
            "here. Load it with transformers' own from_pretrained."
        )
    found = _READERS[method](quantization_config)
    return replace(found, suffixes={**IN_ANY_FORMAT, **found.suffixes})


def config_of_folder(folder: Path) -> Mapping[str, Any] | None:
    """The quantization config of a checkpoint folder: of its `config.json`, or of ModelOpt's file beside it.

    Raises:
        SchemeError: ModelOpt's file is not what it writes.
    """
    config = json.loads((folder / "config.json").read_text())
    found: Mapping[str, Any] | None = config.get("quantization_config") or legacy_config(config)
    return found or (read_side_file(folder / SIDE_FILE) if (folder / SIDE_FILE).is_file() else None)


def legacy_config(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The quantization config under compressed-tensors' first key for it, of a `config.json`."""
    found = config.get("compression_config")
    if not isinstance(found, Mapping):
        return None
    inner = found.get("quantization_config", found)
    return {"quant_method": "compressed-tensors", **inner} if isinstance(inner, Mapping) else None


def read_side_file(file: Path) -> Mapping[str, Any]:
    """ModelOpt's config as `quantization_config` would hold it."""
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise SchemeError(f"{file.name} is not valid JSON ({error}). Download the file again.") from error
    if not isinstance(content, dict) or not isinstance(content.get("quantization"), dict):
        raise SchemeError(f"{file.name} has no object 'quantization', which ModelOpt writes there.")
    return {"quant_method": "modelopt", **content}


def write_side_file(folder: Path) -> None:
    """Moves ModelOpt's config from a folder's `config.json` to the file it came from."""
    config = json.loads((folder / "config.json").read_text())
    content = {key: value for key, value in config.pop("quantization_config").items() if key != "quant_method"}
    (folder / SIDE_FILE).write_text(json.dumps(content, indent=4))
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def canonical_names(names: Iterable[str], suffixes: Suffixes) -> dict[str, str]:
    """Our name of each tensor of a file → its name there. A scale is ours where the tensor it scales is in the file.

    Raises:
        CheckpointError: two names of a file mean the same.
    """
    present = list(names)
    known = set(present)
    out: dict[str, str] = {}
    for name in present:
        ours = _canonical(name, suffixes, known)
        if ours in out:
            raise CheckpointError(
                f"{name} and {out[ours]} both give {ours}. The checkpoint was merged from two; save it again."
            )
        out[ours] = name
    return out


def _canonical(name: str, suffixes: Suffixes, present: set[str]) -> str:
    for theirs, ours in suffixes.items():
        if name.endswith(theirs):
            stem = name.removesuffix(theirs)
            weight = stem if ours.startswith("_") else stem + ".weight"
            if weight in present:
                return stem + ours
    return name


# ------------------------------------------------------------------------------------------------------ reading configs


def _compressed_tensors(config: Mapping[str, Any]) -> Format:
    return Format("compressed-tensors", config, {})


def _fp8(config: Mapping[str, Any]) -> Format:
    """DeepSeek's, and of all who took it over; AutoFP8's and Mistral's differ by names of tensors."""
    if config.get("expert_dtype", "fp8") != "fp8":
        raise SchemeError(f"quantization_config: expert_dtype={config['expert_dtype']!r} is not supported, only 'fp8'.")
    if config.get("fmt", "e4m3") not in ("e4m3", "e4m3fn", "float8_e4m3", "float8_e4m3fn"):
        raise SchemeError(f"quantization_config: fmt={config['fmt']!r} is not supported, only 'e4m3'.")
    block = config.get("weight_block_size")
    activation = _choice(config, "activation_scheme", {"dynamic": "token", "static": "tensor"}, "dynamic")
    exponents = _choice(config, "scale_fmt", {"float": False, "float32": False, "fp32": False, "ue8m0": True}, "float")
    if block is None:
        weights = fp8_weights("tensor")
    elif (
        not isinstance(block, (list, tuple)) or len(block) != 2 or not all(isinstance(n, int) and n > 0 for n in block)
    ):
        raise SchemeError(f"quantization_config: weight_block_size={block!r} is not two positive sizes.")
    else:
        rows, cols = block
        weights = (
            fp8_weights("group", group_size=cols) if rows == 1 else fp8_weights("block", block_structure=[rows, cols])
        )
        activation = activation if activation == "tensor" else "mx" if exponents and cols == 32 else "group"
    if exponents:
        weights["scale_dtype"] = "torch.uint8"
    groups = {"group_0": group(["Linear"], weights, activation)}
    if more := _names(config, "modules_to_convert"):
        groups["group_1"] = group([_pattern(name) for name in more], fp8_weights("tensor"), "none")
    kept = [*_names(config, "modules_to_not_convert"), *_names(config, "ignored_layers")]
    return Format("fp8", config_of_groups(groups, map(_pattern, kept)), _FP8_SUFFIXES)


def _fbgemm(config: Mapping[str, Any]) -> Format:
    bound = config.get("activation_scale_ub", 1200.0)
    if not isinstance(bound, (int, float)) or isinstance(bound, bool) or not 0 < bound < float("inf"):
        raise SchemeError(f"quantization_config: activation_scale_ub={bound!r} is not a positive number.")
    groups = {"group_0": group(["Linear"], fp8_weights("channel"), "token")}
    kept = _names(config, "modules_to_not_convert")
    return Format("fbgemm_fp8", config_of_groups(groups, map(_pattern, kept)), {}, float(bound))


def _modelopt(config: Mapping[str, Any]) -> Format:
    inner = config.get("quantization", config)  # `hf_quant_config.json` nests it
    if not isinstance(inner, Mapping):
        raise SchemeError("quantization_config: 'quantization' is not an object.")
    algorithms = {
        "FP8": (fp8_weights("tensor"), "tensor"),
        "FP8_PER_CHANNEL_PER_TOKEN": (fp8_weights("channel"), "token"),
        "FP8_PB_WO": (fp8_weights("block", block_structure=[128, 128]), "none"),
    }
    weights, activation = _choice(inner, "quant_algo", algorithms, None)
    kept = _names(inner, "exclude_modules") or _names(inner, "ignore")
    groups = {"group_0": group(["Linear"], weights, activation)}
    cache = inner.get("kv_cache_quant_algo") or inner.get("kv_cache_scheme")
    return Format("modelopt", config_of_groups(groups, map(_wildcard, kept), cache=bool(cache)), {})


_READERS: Mapping[str, Callable[[Mapping[str, Any]], Format]] = {
    "compressed-tensors": _compressed_tensors,
    "fp8": _fp8,
    "fbgemm_fp8": _fbgemm,
    "modelopt": _modelopt,
}

#: Spellings of scales that mean the same wherever they are: an inverse in name only, it is multiplied.
IN_ANY_FORMAT: Suffixes = {"_scale_inv": "_scale"}

_FP8_SUFFIXES: Suffixes = {
    "_activation_scale": "_input_scale",  # of experts in one tensor: `gate_up_proj`, `gate_up_proj_scale_inv`, …
    "_scale_inv": "_scale",
    ".activation_scale": ".input_scale",
    ".qscale_weight": ".weight_scale",
    ".qscale_act": ".input_scale",
    ".scale": ".weight_scale",
}


def fp8_weights(strategy: str, **more: Any) -> dict[str, Any]:
    """FP8 weights in compressed-tensors' words."""
    return {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, **more}


#: By activation scheme (`scheme.ACTIVATIONS`), compressed-tensors' words for it.
_INPUTS: Mapping[str, Mapping[str, Any] | None] = {
    "none": None,
    "token": {"strategy": "token", "dynamic": True},
    "tensor": {"strategy": "tensor", "dynamic": False},
    "group": {"strategy": "group", "dynamic": True, "group_size": 128},
    "mx": {"strategy": "group", "dynamic": True, "group_size": 32, "scale_dtype": "torch.uint8"},
}


def group(targets: list[str], weights: Mapping[str, Any], activation: str) -> dict[str, Any]:
    """One group of a config; `activation` is one of `scheme.ACTIVATIONS`."""
    words = _INPUTS[activation]
    inputs = None if words is None else {"num_bits": 8, "type": "float", "symmetric": True, **words}
    return {"targets": targets, "weights": dict(weights), "input_activations": inputs}


def config_of_groups(groups: Mapping[str, Any], ignore: Iterable[str], cache: bool = False) -> dict[str, Any]:
    """A config in compressed-tensors' words."""
    config = {"quant_method": "compressed-tensors", "config_groups": dict(groups), "ignore": list(ignore)}
    return config | ({"kv_cache_scheme": fp8_weights("tensor")} if cache else {})


def _choice(config: Mapping[str, Any], field: str, choices: Mapping[Any, Any], default: Any) -> Any:
    value = config.get(field, default)
    if not isinstance(value, (str, type(None))) or value not in choices:
        raise SchemeError(
            f"quantization_config: {field}={value!r} is not supported; known are {', '.join(map(repr, choices))}. "
            "Load the checkpoint with another program, or quantize it again."
        )
    return choices[value]


def _names(config: Mapping[str, Any], field: str) -> list[str]:
    value = config.get(field) or []
    if not isinstance(value, (list, tuple)) or not all(isinstance(name, str) for name in value):
        raise SchemeError(f"quantization_config: {field} is not a list of module names, but {value!r}.")
    return list(value)


def _pattern(name: str) -> str:
    """As transformers reads a module to leave alone: from the start to a dot, or the end of a name; dots are wildcards. What is
    no expression, and has a star, is a pattern as shells have them."""
    try:
        re.compile(name)
    except re.error:
        if "*" in name:
            return _wildcard(name)
    return rf"re:(?:{name})(?:(?<=\.)|(?=\.|$))|.*{re.escape(name)}$"


def _wildcard(name: str) -> str:
    """As ModelOpt reads one: `*` stands for anything, and what lies inside a module named is excluded with it."""
    return f"re:{fnmatch.translate(name)}|{fnmatch.translate(name + '.*')}"
