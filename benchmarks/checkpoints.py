"""The random FP8 checkpoints that benchmarks load, in the layout llm-compressor writes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, Qwen3MoeConfig


def write_llama(folder: Path, layers: int) -> int:
    """A Llama FP8_DYNAMIC checkpoint of TinyLlama's shapes; returns the bytes of the FP8 weights."""

    hidden, intermediate, vocabulary, heads, kv_heads = 2048, 5632, 32000, 32, 4
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, dtype=torch.bfloat16, tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    state: dict[str, torch.Tensor] = {}
    kv = hidden // heads * kv_heads
    shapes = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
              "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (intermediate, hidden),
              "mlp.up_proj": (intermediate, hidden), "mlp.down_proj": (hidden, intermediate)}  # fmt: skip
    fp8_bytes = 0
    for i in range(layers):
        for name, (rows, cols) in shapes.items():
            fp8 = torch.randint(0, 120, (rows, cols), dtype=torch.uint8, generator=generator)
            state[f"model.layers.{i}.{name}.weight"] = fp8.view(torch.float8_e4m3fn)
            state[f"model.layers.{i}.{name}.weight_scale"] = torch.full((rows, 1), 1e-4, dtype=torch.bfloat16)
            fp8_bytes += rows * cols
        for which in ("input_layernorm", "post_attention_layernorm"):
            state[f"model.layers.{i}.{which}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    state["model.norm.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = torch.randn(vocabulary, hidden, generator=generator).bfloat16()
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    scheme = {
        "targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "strategy": "channel"},
        "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
    }  # fmt: skip
    quantization = {
        "quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": scheme}, "ignore": ["lm_head"],
    }  # fmt: skip
    (folder / "config.json").write_text(
        json.dumps(config.to_dict() | {"quantization_config": quantization}, default=str)
    )
    return fp8_bytes


def write_moe(
    folder: Path, gigabytes: float = 1.0, *, layers: int | None = None, hidden: int = 1024, intermediate: int = 512,
    experts: int = 32, heads: int = 8, top_k: int = 4, format: str = "FP8_DYNAMIC",
) -> int:  # fmt: skip
    """A Qwen3-MoE checkpoint of about that size, one Linear per expert; returns the bytes of the file.

    `format`: one of `FORMATS`.
    """
    per_layer = experts * 3 * hidden * intermediate + 4 * hidden * hidden
    layers = layers or max(1, round(gigabytes * 1e9 / per_layer))
    config = Qwen3MoeConfig(
        vocab_size=1024, hidden_size=hidden, moe_intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, head_dim=hidden // heads, num_experts=experts,
        num_experts_per_tok=top_k, dtype=torch.bfloat16, tie_word_embeddings=False, architectures=["Qwen3MoeForCausalLM"],
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    state: dict[str, torch.Tensor] = {}

    def fp8(name: str, rows: int, cols: int) -> None:
        fp8 = torch.randint(0, 120, (rows, cols), dtype=torch.uint8, generator=generator)
        state[f"{name}.weight"] = fp8.view(torch.float8_e4m3fn)
        if format == "fp8":
            blocks = math.ceil(rows / 128), math.ceil(cols / 128)
            state[f"{name}.weight_scale_inv"] = torch.rand(blocks, generator=generator) * 1e-4 + 1e-5
        elif format == "MXFP8":
            shape = rows, cols // 32
            state[f"{name}.weight_scale"] = torch.randint(112, 115, shape, dtype=torch.uint8, generator=generator)
        else:
            state[f"{name}.weight_scale"] = torch.full((rows, 1), 1e-4, dtype=torch.bfloat16)

    for i in range(layers):
        layer = f"model.layers.{i}"
        for which in "qkvo":
            fp8(f"{layer}.self_attn.{which}_proj", hidden, hidden)
        for e in range(experts):
            fp8(f"{layer}.mlp.experts.{e}.gate_proj", intermediate, hidden)
            fp8(f"{layer}.mlp.experts.{e}.up_proj", intermediate, hidden)
            fp8(f"{layer}.mlp.experts.{e}.down_proj", hidden, intermediate)
        state[f"{layer}.mlp.gate.weight"] = torch.randn(experts, hidden, generator=generator).bfloat16()
        for which in ("self_attn.q_norm", "self_attn.k_norm"):
            state[f"{layer}.{which}.weight"] = torch.ones(hidden // heads, dtype=torch.bfloat16)
        for which in ("input_layernorm", "post_attention_layernorm"):
            state[f"{layer}.{which}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    state["model.norm.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = torch.randn(1024, hidden, generator=generator).bfloat16()
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(
        json.dumps(config.to_dict() | {"quantization_config": FORMATS[format](layers)}, default=str)
    )
    return (folder / "model.safetensors").stat().st_size


def _compressed_tensors(form: str, weights: dict[str, Any], inputs: dict[str, Any]) -> dict[str, Any]:
    fp8 = {"num_bits": 8, "type": "float", "symmetric": True}
    scheme = {"format": form, "targets": ["Linear"], "weights": fp8 | weights, "input_activations": fp8 | inputs}
    return {
        "quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed",
        "config_groups": {"group_0": scheme}, "ignore": ["lm_head", "re:.*mlp.gate$"], "kv_cache_scheme": None,
        "global_compression_ratio": None, "sparsity_config": {}, "transform_config": {}, "version": "0.19.0",
    }  # fmt: skip


_MX = {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}

#: What `write_moe` can write: the quantization config, given the number of layers.
FORMATS: dict[str, Callable[[int], dict[str, Any]]] = {
    "FP8_DYNAMIC": lambda layers: _compressed_tensors(
        "float-quantized", {"strategy": "channel"}, {"strategy": "token", "dynamic": True}
    ),
    "MXFP8": lambda layers: _compressed_tensors("mxfp8-quantized", _MX, {**_MX, "dynamic": True}),
    "fp8": lambda layers: {
        "quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head", *(f"model.layers.{i}.mlp.gate" for i in range(layers))],
    },
}  # fmt: skip
