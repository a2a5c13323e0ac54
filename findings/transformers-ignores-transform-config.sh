#!/usr/bin/env bash
# llmcompressor 0.14.0.1 (with transformers 5.17.0, compressed-tensors 0.19.0, torch 2.13.0): a SpinQuant + FP8 checkpoint is read by
# transformers without the rotations that its activations need, and gives noise.
#
# With R4, SpinQuant multiplies down_proj's weight by a Hadamard matrix and says in `transform_config` that its input is to be
# multiplied as well; the matrix is in the file, once for all layers that share it (`model.layers.0.mlp.down_proj.R4_input.weight`).
# transformers loads such a file and applies nothing. Relative difference of the logits from those of the dense model, seen:
#   R1, R2      0.10 where it was written, 0.10 loaded: these rotations are all in the weights
#   R1, R2, R4  0.10 where it was written, 1.19 loaded
#
# Why it matters: whether the file can be run without knowing about transforms is in one word of its config (`location: input`,
# `output`, `q_attn`, `k_cache` against `weight_input`, `weight_output`), and ignoring it raises nothing.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet torch==2.13.0 llmcompressor==0.14.0.1 transformers==5.17.0 compressed-tensors==0.19.0
cd "$dir"
OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 venv/bin/python - <<'EOF'
import json
from importlib.metadata import version

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform import SpinQuantModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

torch.set_grad_enabled(False)
torch.manual_seed(0)
sizes = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2, vocab_size=64, initializer_range=0.08)
config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=False)
LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained("dense")
ids = torch.arange(8)[None]
dense = AutoModelForCausalLM.from_pretrained("dense")(ids).logits.float()


def difference(logits):
    return ((logits.float() - dense).norm() / dense.norm()).item()


seen = {}
for rotations in (["R1", "R2"], ["R1", "R2", "R4"]):
    model = AutoModelForCausalLM.from_pretrained("dense")
    quantize = QuantizationModifier(targets="Linear", scheme="FP8_DYNAMIC", ignore=["lm_head"])
    oneshot(model=model, recipe=[SpinQuantModifier(rotations=rotations, transform_type="hadamard"), quantize])
    written = difference(model(ids).logits)
    model.save_pretrained("fp8")
    assert json.load(open("fp8/config.json"))["quantization_config"]["transform_config"]["config_groups"].keys() == set(rotations)
    matrices = [name for name in load_file("fp8/model.safetensors") if "R4" in name]
    loaded = difference(AutoModelForCausalLM.from_pretrained("fp8")(ids).logits)
    seen[rotations[-1]] = written, loaded, matrices

print(*(f"{name} {version(name)}" for name in ("llmcompressor", "transformers", "compressed-tensors")))
for rotation, (written, loaded, matrices) in seen.items():
    print(f"up to {rotation}: where it was written {written:.2f}, loaded by transformers {loaded:.2f}, matrices {matrices}")
assert seen["R2"][0] < 0.2 and seen["R2"][1] < 0.2 and not seen["R2"][2]
assert seen["R4"][0] < 0.2 and seen["R4"][1] > 0.8
assert seen["R4"][2] == ["model.layers.0.mlp.down_proj.R4_input.weight"]
EOF
