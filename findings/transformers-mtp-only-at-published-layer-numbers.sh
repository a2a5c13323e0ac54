#!/usr/bin/env bash
# transformers 5.24.0 (torch 2.13.0): a layer for multi-token prediction is found at the layer number of the published model only.
#
# `generate(use_mtp=True)` takes for such layers what matches `_keys_to_ignore_on_load_unexpected` of the model's class. That is
# `model\.layers\.61.*` for DeepseekV3ForCausalLM, and the layers 46 and 92 for Glm4MoeForCausalLM, whatever the config says. The layer
# behind the last one, which the config's num_nextn_predict_layers announces, is not found in a model of another depth. Seen, of a
# DeepSeek-V3 with its layer at `model.layers.<num_hidden_layers>`:
#    2 layers   UNEXPECTED in the report of from_pretrained; RuntimeError: "The following MtpModel weights are missing"
#    2 layers, the pattern replaced by `model\.layers\.2\..*`: drafts, and makes the tokens of the plain model
#   61 layers   drafts, and makes the tokens of the plain model
#   62 layers   ValueError: "does not seem to register any known MTP layer patterns"
#
# Why it matters: a pruned, distilled or small model for tests needs the depth of the published one, or the pattern set by hand.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 accelerate==1.15.0
cd "$dir"
OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error venv/bin/python - <<'EOF'
from importlib.metadata import version

import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, Glm4MoeForCausalLM

width = dict(hidden_size=32, intermediate_size=32, moe_intermediate_size=32, vocab_size=64, eos_token_id=None)
heads = dict(num_attention_heads=2, num_key_value_heads=2, q_lora_rank=16, kv_lora_rank=16)
parts = dict(qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16)
experts = dict(n_routed_experts=2, num_experts_per_tok=1, n_group=1, topk_group=1)


def saved(layers):
    """A model whose last layer has experts, with a copy of that layer behind it as the one for multi-token prediction."""
    own = dict(num_hidden_layers=layers, first_k_dense_replace=layers - 1, num_nextn_predict_layers=1)
    DeepseekV3ForCausalLM(DeepseekV3Config(**width, **heads, **parts, **experts, **own)).save_pretrained(f"{layers}")
    state = load_file(f"{layers}/model.safetensors")
    last, mtp = f"model.layers.{layers - 1}.", f"model.layers.{layers}."
    state |= {name.replace(last, mtp): value.clone() for name, value in state.items() if name.startswith(last)}
    state |= {f"{mtp}{norm}.weight": torch.ones(32) for norm in ("enorm", "hnorm", "shared_head.norm")}
    state[f"{mtp}eh_proj.weight"] = torch.randn(32, 64) * 0.1
    save_file(state, f"{layers}/model.safetensors", metadata={"format": "pt"})


def drafted(layers, pattern=None):
    """What generate ends with: the same tokens as without drafts, or an exception."""
    model, info = DeepseekV3ForCausalLM.from_pretrained(f"{layers}", output_loading_info=True)
    if pattern is not None:
        model._keys_to_ignore_on_load_unexpected = [pattern]
    asked = dict(max_new_tokens=8, do_sample=False)
    ids = torch.arange(1, 9)[None]
    try:
        same = torch.equal(model.generate(ids, use_mtp=True, **asked), model.generate(ids, **asked))
        seen = f"the tokens of the plain model: {same}"
    except (RuntimeError, ValueError) as error:
        seen = f"{type(error).__name__}: {error}"
    print(f"{layers} layers{'' if pattern is None else ', ' + pattern}: {seen[:150]}")
    return seen, info["unexpected_keys"]


torch.manual_seed(0)
print("torch", version("torch"), "transformers", version("transformers"))
print(DeepseekV3ForCausalLM._keys_to_ignore_on_load_unexpected, Glm4MoeForCausalLM._keys_to_ignore_on_load_unexpected)
assert DeepseekV3ForCausalLM._keys_to_ignore_on_load_unexpected == [r"model\.layers\.61.*"]
assert Glm4MoeForCausalLM._keys_to_ignore_on_load_unexpected == [r"model\.layers\.92.*", r"model\.layers\.46.*"]

saved(2)
seen, unexpected = drafted(2)
assert seen.startswith("RuntimeError: The following MtpModel weights are missing")
assert unexpected and all(name.startswith("model.layers.2.") for name in unexpected)
assert drafted(2, r"model\.layers\.2\..*")[0] == "the tokens of the plain model: True"
saved(61)
assert drafted(61)[0] == "the tokens of the plain model: True"
saved(62)
assert "does not seem to register any known MTP layer patterns" in drafted(62)[0]
EOF
