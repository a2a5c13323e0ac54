"""FP8 weights with zero points: what compressed-tensors makes of them, bit for bit, said with its bytes; the file comes back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from compressed_tensors.quantization.utils import calculate_qparams
from conftest import assert_same_bits
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import ctfp8_compile as ctfp8

STRATEGIES = {"tensor": {}, "channel": {}, "group": {"group_size": 32}, "block": {"block_structure": [32, 32]}}
PLAIN = QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy="channel")


def limits(weight: Tensor, args: QuantizationArgs) -> tuple[Tensor, Tensor]:
    if args.strategy == "tensor":
        return weight.min().view(1), weight.max().view(1)
    if args.strategy == "channel":
        return weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    high = 32 if args.strategy == "block" else 1
    tiles = weight.unflatten(-1, (-1, 32)).unflatten(0, (-1, high))
    return tiles.amin((1, 3)), tiles.amax((1, 3))


def write(folder: Path, args: QuantizationArgs, shifted: str) -> dict[str, Tensor]:
    """A checkpoint whose weights that end so have zero points; returns what all of them stand for."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                                  num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    exact = dict(state)
    for name in [name for name in state if name.endswith("proj.weight")]:
        own = args if name.endswith(f"{shifted}.weight") else PLAIN
        weight = state[name] + 0.02
        scale, zero = calculate_qparams(*limits(weight, own), own)
        state[name] = quantize(weight, scale, zero, own, dtype=torch.float8_e4m3fn)
        state[f"{name}_scale"] = scale
        if not own.symmetric:
            assert zero.float().any()
            state[f"{name}_zero_point"] = zero
        exact[name] = dequantize(state[name], scale, zero, args=own).to(torch.bfloat16)
    groups = {"shifted": {"targets": [f"re:.*{shifted}$"], "weights": json.loads(args.model_dump_json(exclude_none=True))},
              "plain": {"targets": ["Linear"], "weights": json.loads(PLAIN.model_dump_json(exclude_none=True))}}  # fmt: skip
    written = json.loads((folder / "config.json").read_text())
    written["quantization_config"] = {"quant_method": "compressed-tensors", "format": "float-quantized",
                                      "config_groups": groups, "ignore": ["lm_head"]}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(written))
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return exact


@pytest.mark.parametrize("shifted", ["proj", "down_proj"])
@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_read_as_compressed_tensors_reads_them(strategy: str, shifted: str, tmp_path: Path) -> None:
    args = QuantizationArgs(num_bits=8, type="float", symmetric=False, strategy=strategy, **STRATEGIES[strategy])
    exact = write(tmp_path / "in", args, shifted)
    count = 14 if shifted == "proj" else 2
    numbers = sum(w.numel() for n, w in exact.items() if n.endswith(f"{shifted}.weight"))
    words = (
        rf"{count} weights, such as .*, are FP8 with zero points: dequantized to bfloat16 .* take {2 * numbers:,} bytes"
    )
    with pytest.warns(UserWarning, match=words):
        model = ctfp8.from_pretrained(tmp_path / "in")
    for name, value in exact.items():
        assert torch.equal(model.get_submodule(name.removesuffix(".weight")).weight, value), name
    ctfp8.save_pretrained(model, tmp_path / "out")
    assert_same_bits(tmp_path / "in", tmp_path / "out")


def test_strict_refuses_what_it_costs(tmp_path: Path) -> None:
    write(tmp_path, QuantizationArgs(num_bits=8, type="float", symmetric=False, strategy="channel"), "down_proj")
    with pytest.raises(ctfp8.SchemeError, match="FP8 with zero points.*strict=True"):
        ctfp8.from_pretrained(tmp_path, strict=True)
