"""The random FP8 checkpoints that benchmarks load, in the layout llm-compressor writes."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from file_formats import FORMATS, stacked
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

    `format`: one of `file_formats.FORMATS`.
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
    spelling = FORMATS[format]

    def fp8(name: str, rows: int, cols: int) -> None:
        fp8 = torch.randint(0, 120, (rows, cols), dtype=torch.uint8, generator=generator)
        state[f"{name}{spelling.weight}"] = fp8.view(torch.float8_e4m3fn)
        state.update(spelling.beside(name, rows, cols))

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
    if spelling.stacked:
        state = stacked(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(
        json.dumps(config.to_dict() | {"quantization_config": spelling.config(layers)}, default=str)
    )
    return (folder / "model.safetensors").stat().st_size


def write_module(folder: Path, gigabytes: float = 1.0, size: int = 4096) -> int:
    """A ComfyUI file of as many square linears; returns its bytes."""
    spelling = FORMATS["comfyui"]
    generator = torch.Generator().manual_seed(0)
    state: dict[str, torch.Tensor] = {}
    for i in range(max(1, round(gigabytes * 1e9 / size**2))):
        fp8 = torch.randint(0, 120, (size, size), dtype=torch.uint8, generator=generator)
        state[f"model.diffusion_model.{i}.weight"] = fp8.view(torch.float8_e4m3fn)
        state |= spelling.beside(f"model.diffusion_model.{i}", size, size)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return (folder / "model.safetensors").stat().st_size
