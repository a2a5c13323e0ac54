#!/usr/bin/env bash
# transformers 5.24.0, compressed-tensors 0.20.0 (torch 2.13.0): Phimoe's router becomes FP8 although the config ignores it.
#
# transformers renames modules while loading: the file's `block_sparse_moe.gate` is `mlp.router` in the model. The names in
# `ignore` are matched against the model's modules and are not renamed. So a config that ignores `re:.*gate$`, as the writer meant it, makes
# the router an FP8 Linear with a `weight_scale` that no file holds, with arbitrary values: a line MISSING in a logged report. Seen:
#   ignore re:.*gate$                  mlp.router.weight float8_e4m3fn, with weight_scale
#   ignore re:.*gate$, re:.*router$    mlp.router.weight bfloat16
#
# Why it matters: the router decides which experts run, and its numbers are then arbitrary. Who writes such files should ignore both
# names; who reads them should match `ignore` against names as they are in the file.
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
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PhimoeConfig, PhimoeForCausalLM

sizes = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1, vocab_size=64, num_local_experts=2)
config = PhimoeConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=False)
PhimoeForCausalLM(config).to(torch.bfloat16).save_pretrained("fp8")

state = load_file("fp8/model.safetensors")
for name in [name for name in state if any(part in name for part in ("_proj.", ".w1.", ".w2.", ".w3."))]:
    scale = state[name].float().abs().amax(1, keepdim=True) / 448
    state[name] = (state[name].float() / scale).to(torch.float8_e4m3fn)
    state[name + "_scale"] = scale.to(torch.bfloat16)
save_file(state, "fp8/model.safetensors", metadata={"format": "pt"})
assert state["model.layers.0.block_sparse_moe.gate.weight"].dtype == torch.bfloat16

weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
described = json.load(open("fp8/config.json"))
print("transformers", version("transformers"), "compressed-tensors", version("compressed-tensors"))
seen = {}
for ignore in (["lm_head", "re:.*gate$"], ["lm_head", "re:.*gate$", "re:.*router$"]):
    described["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "ignore": ignore,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    json.dump(described, open("fp8/config.json", "w"))
    router = AutoModelForCausalLM.from_pretrained("fp8").model.layers[0].mlp.router
    print("ignore", ignore, {name: value.dtype for name, value in router.state_dict().items()})
    seen[len(ignore)] = router.weight.dtype, hasattr(router, "weight_scale")
assert seen[2] == (torch.float8_e4m3fn, True)
assert seen[3] == (torch.bfloat16, False)
EOF
