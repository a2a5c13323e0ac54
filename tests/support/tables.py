"""Tiny checkpoints whose table of embeddings is FP8, tied to the head or not, beside the float64 model they stand for."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from ctfp8_compile.ops import FP8

VOCAB, HIDDEN = 99, 80
SIZES = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 20, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
#: Rows and columns that share a scale; last groups and blocks are parts of one.
BLOCKS = {"tensor": (VOCAB, HIDDEN), "channel": (1, HIDDEN), "group": (1, 48), "block": (32, 48), "mx": (1, 16)}
#: What the file has of the head: nothing (it is the table), a weight of its own.
HEADS = ("tied", "bf16", "fp8")
_TOKEN = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}


@dataclass(frozen=True)
class Tables:
    folder: Path
    exact: Any


def quantize(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """FP8 values, scales `[ceil(N / block[0]), ceil(K / block[1])]`, and what they stand for, in float32."""
    rows, cols = weight.shape
    high, wide = block
    padded = torch.nn.functional.pad(weight.float(), (0, -cols % wide, 0, -rows % high))
    amax = padded.abs().unflatten(-1, (-1, wide)).unflatten(0, (-1, high)).amax((1, 3))
    scale = amax.clamp_min(1e-12) / 448
    whole = scale.repeat_interleave(high, 0)[:rows].repeat_interleave(wide, 1)[:, :cols]
    fp8 = (weight.float() / whole).clamp(-448, 448).to(FP8)
    return fp8, scale, fp8.float() * whole


def weights(strategy: str) -> dict[str, Any]:
    """compressed-tensors' words for it."""
    own: dict[str, Any] = {"group": {"group_size": 48}, "block": {"block_structure": [32, 48]}}.get(strategy, {})
    return {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, **own}


def write(folder: Path, strategy: str, head: str, kind: str = "llama", shards: int = 1, **settings: Any) -> Tables:
    """A checkpoint with an FP8 table in `model.embed_tokens`, and the model it stands for, in float64."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZES, **settings, "tie_word_embeddings": head == "tied"})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    exact = dict(state)
    for name in [name for name in state if name.endswith(("proj.weight", "embed_tokens.weight", "lm_head.weight"))]:
        if name == "lm_head.weight" and head == "bf16":
            continue
        how = strategy if "embed" in name else "channel"
        state[name], scale, exact[name] = quantize(
            state[name], BLOCKS[how] if "embed" in name else (1, state[name].shape[1])
        )
        state[f"{name}_scale"] = scale.reshape(1) if how == "tensor" else scale
    groups = {
        "table": {"targets": ["Embedding"], "weights": weights(strategy)},
        "rest": {"targets": ["Linear"], "weights": weights("channel"), "input_activations": _TOKEN},
    }
    quantization = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": groups,
                    "ignore": ["lm_head"] if head == "bf16" else []}  # fmt: skip
    written = json.loads((folder / "config.json").read_text()) | {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(written))
    _save(folder, state, shards)
    model.load_state_dict(exact, strict=False)
    model.tie_weights()
    return Tables(folder, model.double())


def _save(folder: Path, state: dict[str, Tensor], shards: int) -> None:
    if shards == 1:
        return save_file(state, folder / "model.safetensors", {"format": "pt"})
    (folder / "model.safetensors").unlink()
    where = {name: f"model-{i % shards}.safetensors" for i, name in enumerate(sorted(state))}
    for file in set(where.values()):
        save_file({n: t for n, t in state.items() if where[n] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return None
