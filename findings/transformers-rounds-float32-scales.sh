#!/usr/bin/env bash
# transformers 5.24.0, compressed-tensors 0.20.0 (torch 2.13.0): float32 scales of an FP8 checkpoint are rounded to bfloat16 on loading.
#
# `weight_scale` is float32 in the file and a bfloat16 buffer in the loaded model, as all that is not FP8 gets the model's dtype. The
# dequantized weights are those of the rounded scales, bit for bit, so about a quarter of all weights are one bfloat16 step beside
# `(fp8.float() * scale).to(bfloat16)`. Nothing is logged. Seen: 22 % of a matrix differ, 0 % from the one with rounded scales.
#
# Why it matters: a scale's relative error of 2^-9 is common to a whole row, so it does not average out as rounding of single weights
# does; and a reference made by transformers is not what the file says. Compare weights with a tolerance, or with rounded scales.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 compressed-tensors==0.20.0 accelerate==1.15.0
cd "$dir"
OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 venv/bin/python - <<'EOF'
import json
from importlib.metadata import version

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
sizes = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=1, vocab_size=64)
config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=False)
state = LlamaForCausalLM(config).to(torch.bfloat16).state_dict()
for name in [name for name in state if "_proj" in name]:
    scale = state[name].float().abs().amax(1, keepdim=True) / 448
    state[name] = (state[name].float() / scale).to(torch.float8_e4m3fn)
    state[name + "_scale"] = scale
save_file(state, "model.safetensors", metadata={"format": "pt"})

weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
quantization = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
}
described = {**config.to_dict(), "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "quantization_config": quantization}
json.dump(described, open("config.json", "w"))
model = AutoModelForCausalLM.from_pretrained(".")
linear = model.model.layers[0].mlp.up_proj
print("transformers", version("transformers"), "compressed-tensors", version("compressed-tensors"))
name = "model.layers.0.mlp.up_proj.weight"
print("scale in the file", state[name + "_scale"].dtype, "loaded", linear.weight_scale.dtype)
assert linear.weight_scale.dtype == torch.bfloat16

model(torch.arange(4)[None])  # dequantizes
fp8, scale = state[name].float(), state[name + "_scale"]
differ = (linear.weight != (fp8 * scale).to(torch.bfloat16)).float().mean().item()
rounded = (linear.weight != (fp8 * scale.to(torch.bfloat16).float()).to(torch.bfloat16)).float().mean().item()
print(f"weights that differ from the file's: {differ:.0%}; from the file's with rounded scales: {rounded:.0%}")
assert 0.1 < differ < 0.5 and rounded == 0
EOF
