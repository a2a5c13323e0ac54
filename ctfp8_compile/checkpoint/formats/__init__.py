"""Formats of FP8 checkpoints, a module for each writer's spelling: its config in compressed-tensors' words, its names in ours.

To add one: a module with a `read(config) -> Format`, its place in `_READERS`, a row in docs/formats.md, and a file that the
writer wrote under tests/data/writers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...errors import SchemeError
from ..words import tidy
from . import auto_round, fbgemm, fp8, modelopt, quark, torchao
from .format import PLAIN, Format, Suffixes, config_of_groups, fp8_weights, group
from .names import canonical_names

LEGACY = "compression_config"  #: compressed-tensors' first key for it in `config.json`
SIDE_FILE = "hf_quant_config.json"  #: where ModelOpt writes the config, too or instead of in `config.json`


def _compressed_tensors(config: Mapping[str, Any]) -> Format:
    return Format("compressed-tensors", config)


_READERS: Mapping[str, Callable[[Mapping[str, Any]], Format]] = {
    "compressed-tensors": _compressed_tensors,
    "fp8": fp8.read,
    "mxfp8": fp8.read_mx,
    "fbgemm_fp8": fbgemm.read,
    "modelopt": modelopt.read,
    "quark": quark.read,
    "auto-round": auto_round.read,
    "torchao": torchao.read,
}
#: Spellings of scales that mean the same wherever they are: an inverse in name only, it is multiplied; Mistral's.
_IN_ANY_FORMAT: Suffixes = {
    "_scale_inv": "_scale",
    ".qscale_weight": ".weight_scale",
    ".qscale_act": ".input_scale",
}


#: Of a file without a config whose scales are spelled in any of these ways.
SPELLED_ANYHOW = replace(PLAIN, suffixes=_IN_ANY_FORMAT)


def read_format(quantization_config: Mapping[str, Any]) -> Format:
    """Translates the dict under `quantization_config` in a checkpoint's `config.json`.

    Raises:
        SchemeError: a method that is none of ours, or a field whose value is unknown.
    """
    config = tidy(quantization_config)
    method = config.get("quant_method", "compressed-tensors")
    if not isinstance(method, str) or method not in _READERS:
        raise SchemeError(
            f"quantization_config says quant_method={method!r}; only {', '.join(map(repr, _READERS))} checkpoints are read "
            "here. Load it with the package that wrote it, or serve it with vLLM."
        )
    found = _READERS[method](config)
    return replace(found, suffixes={**_IN_ANY_FORMAT, **found.suffixes})


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
    found = config.get(LEGACY)
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


def write_side_file(folder: Path, content: str, alone: bool) -> None:
    """Writes ModelOpt's file back where it was.

    Args:
        alone: `config.json` had no quantization config besides.
    """
    (folder / SIDE_FILE).write_text(content)
    if alone:
        config = json.loads((folder / "config.json").read_text())
        config.pop("quantization_config", None)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


__all__ = [
    "LEGACY",
    "PLAIN",
    "SIDE_FILE",
    "SPELLED_ANYHOW",
    "Format",
    "Suffixes",
    "canonical_names",
    "config_of_folder",
    "config_of_groups",
    "fp8_weights",
    "group",
    "legacy_config",
    "read_format",
    "read_side_file",
    "write_side_file",
]
