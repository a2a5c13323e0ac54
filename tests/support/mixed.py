"""Makes mixed checkpoints of FP8 ones: some modules in another format, written by compressed-tensors' own compressors.

mixed = mix(DATA / "llama/FP8_DYNAMIC", tmp_path / "in", {"W4A16": "re:.*down_proj$"})
mixed.truth["model.layers.0.mlp.down_proj.weight"]     # what compressed-tensors dequantizes it to
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import regex
import torch
from compressed_tensors.compressors import BaseCompressor, compress_module
from compressed_tensors.quantization import (
    QuantizationScheme,
    initialize_module_for_quantization,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

State = dict[str, Tensor]


@dataclass(frozen=True)
class Mixed:
    """A folder, and by name what compressed-tensors itself dequantizes each weight to that is not FP8."""

    folder: Path
    truth: Mapping[str, Tensor]


def mix(
    source: Path,
    out: Path,
    presets: Mapping[str, str],
    change: Callable[[State, dict[str, Any]], None] | None = None,
    scheme_change: Callable[[QuantizationScheme], None] | None = None,
) -> Mixed:
    """Writes `source` with the modules of each pattern in its preset's format; `change` may spoil tensors and config first."""
    shutil.copytree(source, out)
    state, config = load_file(out / "model.safetensors"), json.loads((out / "config.json").read_text())
    quantization = config["quantization_config"]
    truth: State = {}
    for number, (preset, pattern) in enumerate(presets.items(), 1):
        scheme = preset_name_to_scheme(preset, [pattern])
        if scheme_change:
            scheme_change(scheme)
        names = [n for n, t in state.items() if t.dtype == torch.float8_e4m3fn and n.endswith(".weight")
                 and regex.match(pattern.removeprefix("re:"), n.removesuffix(".weight"))]  # fmt: skip
        assert names, pattern
        for name in names:
            module, fp8 = name.removesuffix(".weight"), state[name]
            for own in [key for key in state if key.rpartition(".")[0] == module and not key.endswith(".bias")]:
                del state[own]
            parts = _compress(fp8.float() / 5000, scheme)
            state |= {f"{module}.{leaf}": tensor for leaf, tensor in parts.items()}
            compressor = BaseCompressor.get_value_from_registry(str(getattr(scheme.format, "value", scheme.format)))
            truth[name] = compressor.decompress(parts, scheme)["weight"].detach()
        quantization["config_groups"][f"group_{number}"] = json.loads(scheme.model_dump_json())
    quantization["format"] = "mixed-precision"
    if change:
        change(state, config)
    save_file({name: t.contiguous() for name, t in state.items()}, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text(json.dumps(config))
    return Mixed(out, truth)


def _compress(weight: Tensor, scheme: QuantizationScheme) -> State:
    linear = nn.Linear(*reversed(weight.shape), bias=False, dtype=torch.bfloat16)
    linear.weight.data = weight.to(torch.bfloat16)  # the values do not matter, but that they differ
    initialize_module_for_quantization(linear, scheme)
    args = scheme.weights
    groups = linear.weight.data
    if args.group_size and args.group_size > 0:
        groups = groups.unflatten(-1, (-1, args.group_size))
    low, high = groups.amin(-1), groups.amax(-1)
    if not args.group_size or args.group_size < 0:
        low, high = low.unsqueeze(-1), high.unsqueeze(-1)
    if hasattr(linear, "weight_global_scale"):
        linear.weight_global_scale.data = generate_gparam(linear.weight.data.amin(), linear.weight.data.amax())
    scale, zero = calculate_qparams(low, high, args, global_scale=getattr(linear, "weight_global_scale", None))
    linear.weight_scale.data = scale.to(linear.weight_scale.dtype)
    if hasattr(linear, "weight_zero_point"):
        linear.weight_zero_point.data = zero.to(linear.weight_zero_point.dtype)
    for own, parameter in linear.named_parameters():
        if own.startswith("input_"):
            parameter.data.fill_(1)
    compress_module(linear)
    return {own: tensor.detach().clone() for own, tensor in linear.state_dict().items()}
