#!/usr/bin/env bash
# transformers 5.24.0, compressed-tensors 0.20.0, peft 0.21.2 (torch 2.13.0): the first forward pass of a compressed-tensors FP8 model
# changes what it is.
#
# After from_pretrained the weights are FP8; a hook dequantizes them all before the first forward pass. Hence, seen on one model:
#   before it   save_pretrained writes FP8, "quantization_status": "compressed";
#               merging a LoRA adapter raises "Promotion for Float8 Types is not supported"
#   after it    save_pretrained writes bfloat16 weights, with the scales still beside them, "quantization_status": "decompressed";
#               merging works
#
# Why it matters: whether a folder is twice as large, and whether a `weight_scale` beside a weight is to be multiplied into it, depends on
# whether somebody tried the model before saving. A reader must look at the weight's dtype, not at the presence of a scale.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 compressed-tensors==0.20.0 accelerate==1.15.0 peft==0.21.2
cd "$dir"
OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 venv/bin/python - <<'EOF'
import json
from importlib.metadata import version

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

sizes = dict(hidden_size=128, intermediate_size=128, num_hidden_layers=1, vocab_size=64)
config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=False)
state = LlamaForCausalLM(config).to(torch.bfloat16).state_dict()
for name in [name for name in state if "_proj" in name]:
    scale = state[name].float().abs().amax(1, keepdim=True) / 448
    state[name] = (state[name].float() / scale).to(torch.float8_e4m3fn)
    state[name + "_scale"] = scale.to(torch.bfloat16)
save_file(state, "model.safetensors", metadata={"format": "pt"})
weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
quantization = {"quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed"}
quantization |= {"ignore": ["lm_head"], "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}
described = {**config.to_dict(), "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "quantization_config": quantization}
json.dump(described, open("config.json", "w"))


def use(run_first):
    model = AutoModelForCausalLM.from_pretrained(".")
    if run_first:
        model(torch.arange(4)[None])
    model.save_pretrained("saved")
    name = "model.layers.0.self_attn.q_proj.weight"
    file = load_file("saved/model.safetensors")
    status = json.load(open("saved/config.json"))["quantization_config"]["quantization_status"]
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    try:
        adapted.merge_and_unload()
        merged = "merged"
    except RuntimeError as error:
        merged = str(error)
    return str(file[name].dtype), name + "_scale" in file, status, merged


print(*(f"{name} {version(name)}" for name in ("transformers", "compressed-tensors", "peft")))
before, after = use(run_first=False), use(run_first=True)
print("before:", *before)
print("after:", *after)
assert before[:3] == ("torch.float8_e4m3fn", True, "compressed") and "Promotion for Float8 Types is not supported" in before[3]
assert after == ("torch.bfloat16", True, "decompressed", "merged")
EOF
