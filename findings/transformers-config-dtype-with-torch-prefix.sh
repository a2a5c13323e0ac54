#!/usr/bin/env bash
# transformers 5.24.0 (torch 2.13.0): a config.json with the dtype as torch prints it is not read.
#
# `str(model.dtype)` is `torch.bfloat16`, and so is the string that comes to mind where JSON takes no torch.dtype. As `dtype`, or as
# `torch_dtype`, of a config.json it ends AutoConfig.from_pretrained and AutoModelForCausalLM.from_pretrained with
# AttributeError("module 'torch' has no attribute 'torch.bfloat16'"), without the file's or the key's name. So does `dtype="auto"`.
# With `dtype=torch.bfloat16` as an argument of from_pretrained the same folder loads; `bfloat16` in the file loads.
#
# Why it matters: who writes a config.json for converted weights should leave the prefix out; who reads one can strip it.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0
cd "$dir"
OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error venv/bin/python - <<'EOF'
import json
from importlib.metadata import version

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, vocab_size=64)
model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)).to(torch.bfloat16)
model.save_pretrained("model")
described = json.load(open("model/config.json"))
assert described.pop("dtype") == "bfloat16"

ways = {
    "AutoConfig": lambda: AutoConfig.from_pretrained("model"),
    "model": lambda: AutoModelForCausalLM.from_pretrained("model"),
    "model, dtype='auto'": lambda: AutoModelForCausalLM.from_pretrained("model", dtype="auto"),
    "model, dtype=torch.bfloat16": lambda: AutoModelForCausalLM.from_pretrained("model", dtype=torch.bfloat16),
}
print("torch", version("torch"), "transformers", version("transformers"))
for key in ("dtype", "torch_dtype"):
    for said in ("bfloat16", str(model.dtype)):
        json.dump({**described, key: said}, open("model/config.json", "w"))
        for way, load in ways.items():
            try:
                seen = load().dtype
            except AttributeError as error:
                seen = repr(error)
            print(f'"{key}": "{said}", {way}: {seen}')
            refused = said != "bfloat16" and way != "model, dtype=torch.bfloat16"
            assert seen == ("AttributeError(\"module 'torch' has no attribute 'torch.bfloat16'\")" if refused else torch.bfloat16)
EOF
