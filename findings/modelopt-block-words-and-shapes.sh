#!/usr/bin/env bash
# nvidia-modelopt 0.47.0 (torch 2.13.0, transformers 5.24.0): three FP8 formats of one exporter, three ways to shape and spell.
#
# export_hf_checkpoint after mtq.quantize of a 256 x 256 linear, seen:
#   FP8_DEFAULT_CFG                    "FP8"                         weight_scale []            input_scale []
#   FP8_PER_CHANNEL_PER_TOKEN_CFG      "FP8_PER_CHANNEL_PER_TOKEN"   weight_scale [256]
#   FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG   "fp8_pb_wo"                   weight_scale [2, 1, 2, 1]
# The last algorithm is in lower case, in both places, and its scales have four dimensions: those of the blocks, with ones between.
# The same fact is in two files: config.json lists `ignore`, hf_quant_config.json `exclude_modules`.
#
# Why it matters: a reader that compares "FP8_PB_WO", or that expects [2, 2] as every other writer of block scales stores it,
# refuses the file. squeeze() is no remedy: a weight of one row of blocks has [1, 1, 2, 1], which is [1, 2] and not [2]. Take dimensions 0 and 2.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 nvidia-modelopt==0.47.0 accelerate==1.15.0 requests==2.34.2 datasets==5.2.0
cd "$dir"
OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 venv/bin/python - <<'EOF'
import json
from importlib.metadata import version

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

sizes = dict(hidden_size=256, intermediate_size=256, num_hidden_layers=1, vocab_size=64)
config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=False)
LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained("dense")
name = "model.layers.0.self_attn.q_proj."
seen = {}
for recipe in ("FP8_DEFAULT_CFG", "FP8_PER_CHANNEL_PER_TOKEN_CFG", "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG"):
    model = LlamaForCausalLM.from_pretrained("dense", dtype=torch.bfloat16)
    mtq.quantize(model, getattr(mtq, recipe), lambda model: model(torch.arange(8)[None]))
    export_hf_checkpoint(model, export_dir=recipe)
    shapes = {key.removeprefix(name): list(value.shape) for key, value in load_file(f"{recipe}/model.safetensors").items() if name in key}
    inside = json.load(open(f"{recipe}/config.json"))["quantization_config"]
    beside = json.load(open(f"{recipe}/hf_quant_config.json"))["quantization"]
    assert shapes.pop("weight") == [256, 256]
    assert inside["quant_algo"] == beside["quant_algo"] and inside["ignore"] == beside["exclude_modules"]
    seen[inside["quant_algo"]] = shapes

print("nvidia-modelopt", version("nvidia-modelopt"))
for algorithm, shapes in seen.items():
    print(algorithm, shapes)
assert seen == {
    "FP8": {"weight_scale": [], "input_scale": []},
    "FP8_PER_CHANNEL_PER_TOKEN": {"weight_scale": [256]},
    "fp8_pb_wo": {"weight_scale": [2, 1, 2, 1]},
}
EOF
