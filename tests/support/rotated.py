"""Makes tiny rotated FP8 checkpoints with compressed-tensors' own transform code, each with the dense model that is its truth."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from compressed_tensors.transform import TransformArgs, TransformConfig, TransformScheme, apply_transform_config
from conftest import quantize
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

_FP8 = {"num_bits": 8, "type": "float", "symmetric": True}


def _around(location: str, targets: list[str], inverse_first: bool = False) -> list[TransformArgs]:
    """A transform at a place, and its inverse in the weight: together they change nothing but what is rounded."""
    weight = TransformArgs(
        targets=targets, ignore=["lm_head"], location=f"weight_{location}", inverse=not inverse_first
    )
    return [TransformArgs(targets=targets, ignore=["lm_head"], location=location, inverse=inverse_first), weight]


def _attention() -> list[TransformArgs]:
    return [TransformArgs(targets=["re:.*self_attn$"], location=location) for location in ("q_attn", "k_cache")]


_WIDE = {"precision": torch.float64}
CASES: dict[str, dict[str, TransformScheme]] = {
    "R4": {"R4": TransformScheme(type="hadamard", apply=_around("input", ["re:.*down_proj$"]), **_WIDE)},
    "R4 of blocks, float32": {
        "R4": TransformScheme(type="hadamard", head_dim=32, apply=_around("input", ["re:.*down_proj$"]))
    },
    "inverse input": {
        "v": TransformScheme(
            type="random-hadamard", apply=_around("input", ["re:.*mlp.*_proj$"], inverse_first=True), **_WIDE
        )
    },
    "u and v": {
        "u": TransformScheme(type="random-hadamard", apply=_around("output", ["Linear"], inverse_first=True), **_WIDE),
        "v": TransformScheme(type="random-hadamard", randomize=True, apply=_around("input", ["Linear"])),
    },
    "two on one input": {
        "a": TransformScheme(type="hadamard", head_dim=16, apply=_around("input", ["re:.*o_proj$"])),
        "b": TransformScheme(type="random-hadamard", apply=_around("input", ["re:.*o_proj$"])),
    },
    "two on one output": {
        "a": TransformScheme(
            type="hadamard", head_dim=16, apply=_around("output", ["re:.*k_proj$"], inverse_first=True)
        ),
        "b": TransformScheme(type="random-hadamard", apply=_around("output", ["re:.*k_proj$"], inverse_first=True)),
    },
    "R3": {"R3": TransformScheme(type="hadamard", head_dim=32, apply=_attention())},
}


@dataclass(frozen=True)
class Rotated:
    """A checkpoint folder, its tensors, the model that it was made of, in float64, and that with compressed-tensors' hooks."""

    folder: Path
    state: dict[str, Tensor]
    dense: LlamaForCausalLM
    hooked: LlamaForCausalLM


def rotated(folder: Path, groups: dict[str, TransformScheme], dtype: torch.dtype = torch.bfloat16) -> Rotated:
    """Rotates a random Llama, with biases, quantizes its Linears per channel, and writes it; shared matrices once."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        vocab_size=128, max_position_embeddings=64, attention_bias=True, dtype=dtype,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype).eval()
    for name, parameter in model.named_parameters():
        if "proj" in name:
            torch.nn.init.normal_(parameter, std=0.5 if name.endswith("bias") else 0.08)
    dense = copy.deepcopy(model).double()
    transforms = TransformConfig(config_groups=groups)
    apply_transform_config(model, transforms)
    state: dict[str, Tensor] = {}
    written: set[int] = set()
    for name, tensor in model.state_dict().items():
        if name.endswith("proj.weight"):
            fp8, scale = quantize(tensor.float(), "channel")
            state |= {name: fp8, f"{name}_scale": scale.reshape(-1, 1)}
            model.get_parameter(name).data = (fp8.float() * scale.reshape(-1, 1)).to(dtype)
        elif tensor.data_ptr() not in written:
            written.add(tensor.data_ptr())
            state[name] = tensor.clone()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**_FP8, "strategy": "channel", "dynamic": False},
                "input_activations": {**_FP8, "strategy": "token", "dynamic": True},
            }
        },
        "transform_config": json.loads(transforms.model_dump_json()),
    }
    words = {**config.to_dict(), "architectures": ["LlamaForCausalLM"], "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(words))
    return Rotated(folder, state, dense, model)
