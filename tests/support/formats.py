"""Renames a compressed-tensors checkpoint into another format: the same FP8 values and scales, spelled as others spell them.

folder = respell(DATA / "llama/FP8_BLOCK", tmp_path / "out", "fp8")
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

State = dict[str, Tensor]

#: By the scheme of the shared checkpoints, the formats that can say the same.
FORMATS: dict[str, tuple[str, ...]] = {
    "FP8_BLOCK": ("fp8", "fp8-bf16", "fp8-stacked", "fp8-qscale", "modelopt-block"),
    "FP8": ("fp8-static", "fp8-autofp8", "fp8-dynamic-tensor", "modelopt", "modelopt-side-file"),
    "FP8_DYNAMIC": ("fbgemm_fp8", "modelopt-channel"),
    "MXFP8": ("fp8-mx", "fp8-mx-e8m0"),
}


def respell(
    source: Path, out: Path, format: str, change: Callable[[State, dict[str, Any]], None] | None = None
) -> Path:
    """Writes `source` as `format` to `out`; `change` may spoil tensors and quantization config first."""
    out.mkdir(parents=True)
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, out / file.name)
    state = load_file(source / "model.safetensors")
    quantized = [name for name, t in state.items() if t.dtype == torch.float8_e4m3fn]
    plain = sorted(
        name.removesuffix(".weight")
        for name, t in state.items()
        if name not in quantized and name.endswith("weight") and t.dim() == 2 and "embed" not in name
    )
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = quantization = _CONFIGS[format](plain)
    state = _TENSORS.get(format, dict)(state)
    if change:
        change(state, quantization)
    if format == "modelopt-side-file":
        del config["quantization_config"]
        (out / "hf_quant_config.json").write_text(json.dumps(quantization, indent=4))
    (out / "config.json").write_text(json.dumps(config))
    save_file({name: t.contiguous() for name, t in state.items()}, out / "model.safetensors", {"format": "pt"})
    return out


def _fp8(plain: list[str], **more: Any) -> dict[str, Any]:
    return {"activation_scheme": "dynamic", "modules_to_not_convert": plain, "quant_method": "fp8", **more}


def _modelopt(plain: list[str], algorithm: str) -> dict[str, Any]:
    return {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": [*plain, "*absent*"],
            "producer": {"name": "modelopt", "version": "0.35.0"}}  # fmt: skip


_CONFIGS: dict[str, Callable[[list[str]], dict[str, Any]]] = {
    "fp8": lambda plain: _fp8(plain, fmt="e4m3", weight_block_size=[128, 128]),
    "fp8-bf16": lambda plain: _fp8([], ignored_layers=plain, weight_block_size=[128, 128]),
    "fp8-mx": lambda plain: _fp8(plain, weight_block_size=[1, 32], scale_fmt="ue8m0"),
    "fp8-mx-e8m0": lambda plain: _fp8(plain, weight_block_size=[1, 32], scale_fmt="ue8m0"),
    "fp8-stacked": lambda plain: _fp8(plain, weight_block_size=[128, 128], scale_fmt="float"),
    "fp8-qscale": lambda plain: _fp8(plain, weight_block_size=[128, 128]),
    "fp8-static": lambda plain: _fp8(plain, activation_scheme="static", weight_block_size=None),
    "fp8-autofp8": lambda plain: _fp8([], activation_scheme="static", ignored_layers=plain),
    "fp8-dynamic-tensor": lambda plain: _fp8(plain),
    "modelopt": lambda plain: _modelopt(plain, "FP8"),
    "modelopt-channel": lambda plain: _modelopt(plain, "FP8_PER_CHANNEL_PER_TOKEN"),
    "modelopt-block": lambda plain: _modelopt(plain, "FP8_PB_WO"),
    "modelopt-side-file": lambda plain: {
        "producer": {"name": "modelopt", "version": "0.29.0"},
        "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": plain},
    },
    "fbgemm_fp8": lambda plain: {
        "activation_scale_ub": 1200.0, "modules_to_not_convert": plain, "quant_method": "fbgemm_fp8"
    },
}  # fmt: skip


def _renamed(state: State, dtype: torch.dtype | None = torch.float32, **suffixes: str) -> State:
    """`weight_scale="weight_scale_inv"`: those tensors under another name, in `dtype`."""
    out = {}
    for name, tensor in state.items():
        stem, _, leaf = name.rpartition(".")
        if leaf in ("weight_scale", "input_scale"):
            name, tensor = f"{stem}.{suffixes.get(leaf, leaf)}", tensor if dtype is None else tensor.to(dtype)
        out[name] = tensor
    return out


def _scalars(state: State) -> State:
    return {n: t.reshape(()) if n.endswith(("_scale", "_scale_inv")) else t for n, t in state.items()}


def _without_inputs(state: State) -> State:
    return {n: t for n, t in state.items() if not n.endswith("input_scale")}


def _stacked(state: State) -> State:
    """The experts of a layer as one tensor, `gate_up_proj` and `down_proj`, as transformers keeps them."""
    out, found = {}, {}
    for name, tensor in _renamed(state, weight_scale="weight_scale_inv").items():
        match = re.fullmatch(r"(.*)\.(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)_proj\.weight(_scale_inv)?", name)
        if match is None:
            out[name] = tensor
        else:
            layer, expert, which, leaf = match.groups()
            found[f"{layer}.mlp.experts", leaf or "", int(expert), which] = tensor
    for experts, leaf in {key[:2] for key in found}:
        count = 1 + max(key[2] for key in found if key[0] == experts)
        gate, up, down = ([found[experts, leaf, e, which] for e in range(count)] for which in ("gate", "up", "down"))
        merged = torch.stack(
            [torch.cat([g.view(torch.uint8), u.view(torch.uint8)]) for g, u in zip(gate, up, strict=True)]
        )
        out[f"{experts}.gate_up_proj{leaf}"] = merged.view(gate[0].dtype)
        out[f"{experts}.down_proj{leaf}"] = torch.stack([d.view(torch.uint8) for d in down]).view(down[0].dtype)
    return out


_TENSORS: dict[str, Callable[[State], State]] = {
    "fp8": lambda s: _renamed(s, weight_scale="weight_scale_inv"),
    "fp8-mx": lambda s: _renamed(s, None, weight_scale="weight_scale_inv"),
    "fp8-mx-e8m0": lambda s: {
        n: t.view(torch.float8_e8m0fnu) if n.endswith("_scale_inv") else t
        for n, t in _renamed(s, None, weight_scale="weight_scale_inv").items()
    },
    "fp8-bf16": lambda s: _renamed(s, torch.bfloat16, weight_scale="weight_scale_inv"),
    "fp8-stacked": _stacked,
    "fp8-qscale": lambda s: _renamed(s, weight_scale="qscale_weight"),
    "fp8-static": lambda s: _scalars(_renamed(s, weight_scale="weight_scale_inv", input_scale="activation_scale")),
    "fp8-dynamic-tensor": lambda s: _without_inputs(_scalars(_renamed(s, weight_scale="weight_scale_inv"))),
    "modelopt": lambda s: _scalars(_renamed(s)),
    "modelopt-side-file": lambda s: _scalars(_renamed(s)),
    "modelopt-channel": lambda s: {n: t.squeeze(-1) if n.endswith("_scale") else t for n, t in _renamed(s).items()},
    "modelopt-block": lambda s: {n: t[:, None, :, None] if n.endswith("_scale") else t for n, t in _renamed(s).items()},
    "fbgemm_fp8": _renamed,
}
