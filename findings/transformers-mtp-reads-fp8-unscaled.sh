#!/usr/bin/env bash
# transformers 5.24.0, compressed-tensors 0.20.0 (torch 2.13.0): layers for multi-token prediction are read from an FP8 checkpoint
# without their scales.
#
# `generate(use_mtp=True)` builds MtpModel from the same folder, but with no quantizer: an FP8 value becomes a bfloat16 number as it
# is, and the scales beside it are reported as UNEXPECTED. Nothing is raised. Seen: the largest weight of o_proj is 448, where 0.07
# was quantized; the loaded weight equals the FP8 values, unscaled.
#
# Why it matters: the text is right all the same, as each draft is checked by the model, so only the speed, or the rate at which drafts are
# accepted, shows it. Multiply the scales in, or store the layers for multi-token prediction in bfloat16.
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
from transformers import AutoModelForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.modeling_layers import MtpModel

layers = 61  # DeepSeek-V3's number: the layer of this name is the one for multi-token prediction
width = dict(hidden_size=32, intermediate_size=32, moe_intermediate_size=32, vocab_size=64)
heads = dict(num_attention_heads=2, num_key_value_heads=2, q_lora_rank=16, kv_lora_rank=16)
parts = dict(qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16)
experts = dict(n_routed_experts=2, num_experts_per_tok=1, n_group=1, topk_group=1, first_k_dense_replace=layers)
config = DeepseekV3Config(**width, **heads, **parts, **experts, num_hidden_layers=layers, num_nextn_predict_layers=1)
state = DeepseekV3ForCausalLM(config).to(torch.bfloat16).state_dict()

last, mtp = f"model.layers.{layers - 1}.", f"model.layers.{layers}."
state |= {name.replace(last, mtp): value.clone() for name, value in state.items() if name.startswith(last + "self_attn")}
for norm in ("input_layernorm", "post_attention_layernorm", "enorm", "hnorm", "shared_head.norm"):
    state[f"{mtp}{norm}.weight"] = torch.ones(32, dtype=torch.bfloat16)
state[f"{mtp}eh_proj.weight"] = (torch.randn(32, 64) * 0.1).to(torch.bfloat16)
state[f"{mtp}mlp.gate.weight"] = torch.randn(2, 32).to(torch.bfloat16)
state[f"{mtp}mlp.gate.e_score_correction_bias"] = torch.zeros(2)
for module in ("experts.0", "experts.1", "shared_experts"):
    for part in ("gate", "up", "down"):
        state[f"{mtp}mlp.{module}.{part}_proj.weight"] = (torch.randn(32, 32) * 0.02).to(torch.bfloat16)

name = f"{mtp}self_attn.o_proj.weight"
original = state[name].float()
for key in [key for key in state if "_proj" in key and "eh_proj" not in key]:
    scale = state[key].float().abs().amax(1, keepdim=True) / 448
    state[key] = (state[key].float() / scale).to(torch.float8_e4m3fn)
    state[key + "_scale"] = scale.to(torch.bfloat16)
save_file(state, "model.safetensors", metadata={"format": "pt"})
weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
quantization = {"quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed"}
quantization |= {"ignore": ["lm_head", "re:.*eh_proj$"], "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}
described = {**config.to_dict(), "architectures": ["DeepseekV3ForCausalLM"], "dtype": "bfloat16", "quantization_config": quantization}
json.dump(described, open("config.json", "w"))

loaded = MtpModel.from_pretrained(AutoModelForCausalLM.from_pretrained(".")).layers[0].mtp_block.self_attn.o_proj.weight
print("transformers", version("transformers"), name, loaded.dtype)
print(f"largest: loaded {loaded.float().abs().max():.4g}, original {original.abs().max():.4g}")
assert loaded.dtype == torch.bfloat16 and torch.equal(loaded.float(), state[name].float())
EOF
