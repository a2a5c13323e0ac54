#!/usr/bin/env bash
# transformers 5.24.0 (torch 2.13.0, accelerate 1.15.0): an `fp8` file whose last block of scales is a partial one is dequantized with
# the wrong scales.
#
# A weight of 208 rows in blocks of 128 has two scales: rows 0 to 127, rows 128 to 207. `FineGrainedFP8Config(dequantize=True)`, and the
# plain from_pretrained on a machine without a GPU, take the block's size from the shapes, 208 / 2 = 104: rows 104 to 127 are multiplied
# by the scale of the next block. Nothing is raised or logged, although `weight_block_size` [128, 128] is in the config.
# Seen: rows 104 to 127 wrong, all others exact.
#
# Why it matters: widths that are no multiple of 128 are common (kv_a_proj of DeepSeek-V3 has 576 rows), and the error is a factor,
# the quotient of neighbouring scales. Divide by the block size of the config and round up.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 accelerate==1.15.0
cd "$dir"
OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 venv/bin/python - <<'EOF'
import json
from importlib.metadata import version

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, LlamaConfig, LlamaForCausalLM

sizes = dict(hidden_size=128, intermediate_size=208, num_hidden_layers=1, vocab_size=64)
config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=False)
state = LlamaForCausalLM(config).to(torch.bfloat16).state_dict()
for name in [name for name in state if "_proj" in name]:
    rows, cols = state[name].shape
    scale = torch.rand(-(-rows // 128), -(-cols // 128)) * 0.01 + 0.001
    state[name + "_scale_inv"] = scale
    state[name] = (state[name].float() / 0.001).to(torch.float8_e4m3fn)

name = "model.layers.0.mlp.up_proj.weight"
assert state[name].shape == (208, 128) and state[name + "_scale_inv"].shape == (2, 1)
each_row = state[name + "_scale_inv"].repeat_interleave(128, 0)[:208]
exact = (state[name].float() * each_row).to(torch.bfloat16)

save_file(state, "model.safetensors", metadata={"format": "pt"})
fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic", "modules_to_not_convert": ["lm_head"]}
described = {**config.to_dict(), "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "quantization_config": fp8}
json.dump(described, open("config.json", "w"))
model = AutoModelForCausalLM.from_pretrained(".", quantization_config=FineGrainedFP8Config(dequantize=True))

loaded = model.state_dict()[name]
wrong = (loaded != exact).any(1).nonzero().flatten().tolist()
print("transformers", version("transformers"), name, "wrong rows:", wrong[0], "to", wrong[-1], "of", len(loaded))
assert wrong == list(range(104, 128))
EOF
