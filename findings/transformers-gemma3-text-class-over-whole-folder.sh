#!/usr/bin/env bash
# transformers 5.24.0 (torch 2.13.0): Gemma3ForCausalLM opens the folder of a whole Gemma 3, and takes none of its tensors.
#
# The class of the text model reads the `text_config` of a folder that Gemma3ForConditionalGeneration saved, and looks for
# `model.layers.0…`, where the file has `language_model.model.layers.0…`, or `model.language_model.layers.0…` with
# `save_original_format=False`. No name is mapped, so all tensors are initialised at random. Nothing is raised: a warning says that
# the checkpoint seems corrupted, and a logged report has every tensor as MISSING and every one of the file as UNEXPECTED. Seen, for
# both layouts: 29 of 29 tensors missing, 62 of 62 unexpected, other logits with another seed. AutoModelForCausalLM opens the same
# folder as Gemma3ForConditionalGeneration and gives the logits of what was saved, with nothing missing.
#
# Why it matters: published Gemma 3 models from 4B on, and what is quantized from them, are whole ones. Open them with
# AutoModelForCausalLM and take the language model of what it returns, or check `missing_keys` of `output_loading_info=True`.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0
cd "$dir"
OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error venv/bin/python - <<'EOF'
from importlib.metadata import version

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForCausalLM, Gemma3ForConditionalGeneration

heads = dict(num_attention_heads=2, num_key_value_heads=1, head_dim=16)
text = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=64, pad_token_id=0, **heads)
vision = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
tokens = dict(mm_tokens_per_image=4, image_token_index=5, boi_token_index=6, eoi_token_index=7)
whole = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, **tokens)).eval()
whole.save_pretrained("original")
whole.save_pretrained("new", save_original_format=False)

ids = torch.arange(10, 20)[None]


def loaded(cls, folder, seed):
    torch.manual_seed(seed)
    model, info = cls.from_pretrained(folder, output_loading_info=True)
    with torch.no_grad():
        return model, info, model.eval()(ids).logits


print("torch", version("torch"), "transformers", version("transformers"))
with torch.no_grad():
    want = whole(ids).logits
for folder, layer in (("original", "language_model.model.layers.0."), ("new", "model.language_model.layers.0.")):
    stored = load_file(f"{folder}/model.safetensors")
    assert any(name.startswith(layer) for name in stored)
    model, info, first = loaded(Gemma3ForCausalLM, folder, 1)
    *_, second = loaded(Gemma3ForCausalLM, folder, 2)
    missing, unexpected = info["missing_keys"], info["unexpected_keys"]
    print(f"{layer}… as Gemma3ForCausalLM: {len(missing)} of {len(model.state_dict())} tensors missing,", end=" ")
    print(f"{len(unexpected)} of {len(stored)} unexpected; logits of two seeds are {(first - second).abs().max():.2g} apart")
    assert set(missing) == set(model.state_dict()) and set(unexpected) == set(stored)
    assert not torch.equal(first, second)

    model, info, logits = loaded(AutoModelForCausalLM, folder, 1)
    print(f"{layer}… as AutoModelForCausalLM: {type(model).__name__}, {len(info['missing_keys'])} missing")
    assert isinstance(model, Gemma3ForConditionalGeneration) and not info["missing_keys"]
    assert torch.equal(logits, want)
EOF
