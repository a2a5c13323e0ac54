"""Mistral's own files: read where transformers has a conversion from their names, and otherwise a sentence says what to take."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
import transformers
from conftest import DATA, relative_error
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

import ctfp8_compile as ctfp8
from ctfp8_compile.ops import FP8

IDS = torch.arange(20, 36)[None]
TEXT = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "kv_lora_rank": 32,
    "qk_rope_head_dim": 16, "v_head_dim": 16, "qk_nope_head_dim": 16, "index_topk": 8, "index_head_dim": 16,
    "index_n_heads": 2,
}  # fmt: skip
VISION = {
    "model_type": "pixtral", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "patch_size": 4, "image_size": 16,
}  # fmt: skip
QUANTIZED = re.compile(r"layers\.\d+\.(attention\.w\w+|(feed_forward|shared_experts|experts\.\d+)\.w\d)\.weight")
CONFIG = {
    "quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None,
    "modules_to_not_convert": ["vision_encoder", "output", "patch_merger", "vision_language_adapter"],
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small model in Mistral's names as transformers writes it; its state in FP8, and the float32 values of that."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("source")
    config = transformers.MistralLarge4Config(text_config=TEXT, vision_config=VISION)
    transformers.MistralLarge4ForConditionalGeneration(config).bfloat16().save_pretrained(folder)
    fp8, plain = {}, {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if QUANTIZED.fullmatch(name):
            scale = tensor.float().abs().max() / 448
            fp8[name] = (tensor.float() / scale).to(FP8)
            fp8[name.replace("weight", "qscale_weight")] = scale
            fp8[name.replace("weight", "qscale_act")] = torch.tensor(0.01)
            plain[name] = fp8[name].float() * scale
        else:
            fp8[name], plain[name] = tensor, tensor.float()
    assert any("experts" in name for name in fp8)
    config = json.loads((folder / "config.json").read_text())
    twin = tmp_path_factory.mktemp("twin")
    save_file(plain, twin / "model.safetensors", {"format": "pt"})
    (twin / "config.json").write_text(json.dumps(config))
    model = transformers.MistralLarge4ForConditionalGeneration.from_pretrained(twin, dtype=torch.float32).eval()
    with torch.no_grad():
        return fp8, config, model(IDS).logits


def write(folder, made, files=1, quantization=CONFIG, params=True):
    fp8, config, _ = made
    names = sorted(fp8)
    for number in range(files):
        name = "consolidated.safetensors" if files == 1 else f"consolidated-{number + 1:05}-of-{files:05}.safetensors"
        save_file({n: fp8[n] for n in names[number::files]}, folder / name, {"format": "pt"})
    config = {k: v for k, v in config.items() if k != "quantization_config"}
    (folder / "config.json").write_text(
        json.dumps(config | ({"quantization_config": quantization} if quantization else {}))
    )
    if params:
        (folder / "params.json").write_text("{}")
    return folder


def load(folder):
    return ctfp8.from_pretrained(folder, AutoModelForImageTextToText, dtype=torch.float32)


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("quantization", [CONFIG, None], ids=["config", "no config"])
@pytest.mark.filterwarnings("ignore")
def test_a_folder_of_consolidated_files_gives_the_logits_of_its_twin(files, quantization, made, tmp_path):
    model = load(write(tmp_path, made, files, quantization))
    with torch.no_grad():
        assert relative_error(model(IDS).logits, made[2]) < 1e-6
    in_file = sum(t.numel() for t in made[0].values() if t.dtype == FP8)
    assert sum(p.numel() for p in model.parameters() if p.dtype == FP8) == in_file


@pytest.mark.filterwarnings("ignore")
def test_it_is_saved_bit_for_bit_and_loads_again(made, tmp_path):
    (tmp_path / "in").mkdir()
    model = load(write(tmp_path / "in", made))
    ctfp8.save_pretrained(model, tmp_path / "out")
    saved = load_file(tmp_path / "out/model.safetensors")
    assert saved.keys() == made[0].keys()
    for name, tensor in saved.items():
        assert tensor.dtype == made[0][name].dtype
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), made[0][name].reshape(-1).view(torch.uint8)), name
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "out")(IDS).logits, model(IDS).logits)


@pytest.mark.filterwarnings("ignore")
def test_inspect_reads_it(made, tmp_path):
    from ctfp8_compile.checkpoint.contents import look

    found = look(write(tmp_path, made, 3))
    assert found.files == 3
    assert found.fp8_bytes == sum(t.numel() for t in made[0].values() if t.dtype == FP8)
    assert {row.what for row in found.rows if row.fp8} == {"tensor weights, tensor activations"}


@pytest.mark.filterwarnings("ignore")
def test_of_both_kinds_of_files_those_of_transformers_are_taken(made, load_llama, tmp_path):
    shutil.copytree(DATA / "llama/FP8_DYNAMIC", tmp_path / "both")
    (tmp_path / "mistral").mkdir()
    write(tmp_path / "mistral", made)
    shutil.copy(tmp_path / "mistral/consolidated.safetensors", tmp_path / "both")
    (tmp_path / "both/params.json").write_text("{}")
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        assert torch.equal(ctfp8.from_pretrained(tmp_path / "both")(ids).logits, load_llama(ids).logits)


@pytest.fixture
def load_llama():
    return ctfp8.from_pretrained(DATA / "llama/FP8_DYNAMIC")


@pytest.mark.parametrize("kind", ["llama", "mistral", "ministral3"])
@pytest.mark.filterwarnings("ignore")
def test_models_without_a_conversion_name_the_files_to_take(kind, made, tmp_path):
    folder = write(tmp_path, made)
    config = json.loads((DATA / "llama/FP8_DYNAMIC/config.json").read_text())
    config |= {"model_type": kind, "quantization_config": CONFIG}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ctfp8.CheckpointError,
        match=f"consolidated.safetensors has Mistral's own names.*'{kind}'. Take model.safetensors",
    ):
        ctfp8.from_pretrained(folder)


@pytest.mark.parametrize("through", ["from_pretrained", "inspect"])
def test_without_a_config_the_files_to_take_are_named(through, made, tmp_path):
    from ctfp8_compile.checkpoint.contents import look

    (write(tmp_path, made) / "config.json").unlink()
    with pytest.raises(ctfp8.CheckpointError, match="there is params.json, Mistral's own config, and no config.json"):
        (look if through == "inspect" else ctfp8.from_pretrained)(tmp_path)
