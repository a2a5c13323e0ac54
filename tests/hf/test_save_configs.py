"""The config of a checkpoint that is loaded and saved: its dtype, the parts of a larger model, whose head is tied."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import DATA, fp8_config, logits
from safetensors.torch import load_file, save_file
from support.saved import differing, write
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma3ForCausalLM,
    MistralForCausalLM,
)

import ctfp8_compile as ctfp8

LLAMA = DATA / "llama/FP8_DYNAMIC"

GEMMA = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 2, "head_dim": 32}  # fmt: skip
SIGLIP = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
          "patch_size": 4}  # fmt: skip
LARGER = {  # a larger model, and the class of its text part
    "gemma3": (
        {"text_config": GEMMA, "vision_config": SIGLIP, "mm_tokens_per_image": 4, "image_token_index": 255},
        Gemma3ForCausalLM,
    ),
    "mistral3": (
        {
            "text_config": GEMMA | {"model_type": "mistral"},
            "vision_config": SIGLIP | {"model_type": "pixtral"},
            "tie_word_embeddings": False,
        },
        MistralForCausalLM,
    ),
}


@pytest.mark.parametrize("kind", list(LARGER))
@pytest.mark.parametrize("old", [True, False], ids=["language_model.model", "model.language_model"])
def test_a_text_class_finds_its_tensors_in_a_larger_models_files(kind, old, tmp_path):
    """transformers has no renaming for these classes, under the names of either age."""
    sizes, text_class = LARGER[kind]
    folder = tmp_path / "in"
    whole = AutoModelForImageTextToText.from_config(AutoConfig.for_model(kind, **sizes), dtype=torch.bfloat16)
    whole.save_pretrained(folder)
    file = folder / "model.safetensors"
    state = load_file(file)
    if not old:
        names = {n: re.sub(r"^language_model\.model\.", "model.language_model.", n) for n in state}
        state = {re.sub(r"^(language_model)\.(lm_head)", r"\2", names[n]): t for n, t in state.items()}
    for name in [n for n in state if "language_model" in n and n.endswith("proj.weight")]:
        scale = state[name].float().abs().amax(1, keepdim=True) / 448
        state[f"{name}_scale"], state[name] = scale, (state[name].float() / scale).to(torch.float8_e4m3fn)
    save_file(state, file, {"format": "pt"})
    said = json.loads((folder / "config.json").read_text())
    said["quantization_config"] = {**fp8_config(), "ignore": ["re:.*vision.*", "re:.*projector.*", "re:.*lm_head"]}
    (folder / "config.json").write_text(json.dumps(said))
    model = ctfp8.from_pretrained(folder, text_class)
    assert isinstance(model, text_class)
    assert not [name for name in model.state_dict() if "vision" in name]
    assert torch.equal(logits(model), logits(ctfp8.from_pretrained(folder, AutoModelForImageTextToText)))
    model.save_pretrained(tmp_path / "out")
    assert differing(folder, tmp_path / "out") == set()
    written = json.loads((tmp_path / "out/config.json").read_text())
    for key in ("model_type", "architectures", "vision_config", "quantization_config"):
        assert written[key] == said[key]
    with torch.no_grad():
        model.model.norm.weight[0] = 3
    model.save_pretrained(tmp_path / "changed")
    norm = "language_model.model.norm.weight" if old else "model.language_model.norm.weight"
    assert differing(folder, tmp_path / "changed") == {norm}
    assert torch.equal(logits(ctfp8.from_pretrained(tmp_path / "changed", text_class)), logits(model))


TEXT = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 32, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "layer_types": ["linear_attention", "full_attention"],
        "tie_word_embeddings": False}  # fmt: skip
VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 4, "out_hidden_size": 64,
          "num_position_embeddings": 16}  # fmt: skip


@pytest.mark.parametrize("where", ["", "text_config"])
def test_a_text_model_of_a_larger_one_is_saved_as_all_of_it(where, tmp_path):
    """transformers loads Qwen3.5 for text as a class without the vision tower: tensors and config have it again."""
    config = AutoConfig.for_model("qwen3_5", text_config=TEXT, vision_config=VISION)
    AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "in")
    file = tmp_path / "in/model.safetensors"
    state = load_file(file)
    for name in [n for n in state if "self_attn" in n and n.endswith("proj.weight")]:
        scale = state[name].float().abs().amax(1, keepdim=True) / 448
        state[f"{name}_scale"], state[name] = scale, (state[name].float() / scale).to(torch.float8_e4m3fn)
    save_file(state, file, {"format": "pt"})
    quantization = {**fp8_config(), "ignore": ["re:.*visual.*", "lm_head"]}
    said = json.loads((tmp_path / "in/config.json").read_text())
    (said[where] if where else said)["quantization_config"] = quantization
    (tmp_path / "in/config.json").write_text(json.dumps(said))
    model = ctfp8.from_pretrained(tmp_path / "in", AutoModelForCausalLM)
    assert not [name for name in model.state_dict() if "visual" in name]
    model.save_pretrained(tmp_path / "out")
    assert differing(tmp_path / "in", tmp_path / "out") == set()
    text = (tmp_path / "out/config.json").read_text()
    written = json.loads(text)
    assert "ctfp8" not in text
    assert written["model_type"] == "qwen3_5"
    assert written["architectures"] == said["architectures"]
    for part in ("", "text_config"):
        held = (written[part] if part else written).get("quantization_config")
        assert held == (quantization if part == where else None)
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        assert torch.equal(logits(ctfp8.from_pretrained(tmp_path / "out", auto)), logits(model))


TIED = {  # larger models whose text class has a head of its own, to be tied as the top of the config says
    "mistral3": (
        {"text_config": GEMMA | {"model_type": "mistral"}, "vision_config": SIGLIP | {"model_type": "pixtral"}},
        MistralForCausalLM,
    ),
    "qwen3_5": ({"text_config": TEXT, "vision_config": VISION}, AutoModelForCausalLM),
}


def larger(kind: str, folder: Path, tied: bool, table: bool = False) -> Path:
    """A larger model whose text config says that it is not tied; `table`: its embeddings are FP8, too."""
    sizes, _ = TIED[kind]
    config = AutoConfig.for_model(kind, **sizes, tie_word_embeddings=tied)
    config.get_text_config().tie_word_embeddings = False
    AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    assert tied != any("lm_head" in name for name in state)
    fp8 = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight", *["embed_tokens.weight"] * table)
    for name in [n for n in state if n.endswith(fp8) and "language_model" in n]:
        scale = state[name].float().abs().amax(1, keepdim=True) / 448
        state[f"{name}_scale"], state[name] = scale, (state[name].float() / scale).to(torch.float8_e4m3fn)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    said = json.loads((folder / "config.json").read_text())
    quantization = fp8_config()
    quantization["config_groups"]["group_0"]["targets"] = ["re:.*self_attn.*_proj", *["Embedding"] * table]
    said["quantization_config"] = {**quantization, "ignore": ["re:.*vis.*", "re:.*projector.*", "re:.*lm_head"]}
    (folder / "config.json").write_text(json.dumps(said))
    return folder


@pytest.mark.parametrize("kind", list(TIED))
@pytest.mark.parametrize("table", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_a_text_class_is_tied_where_the_larger_one_is(kind, table, tmp_path):
    """Its own part of the config does not say so, and the file has no head."""
    folder = larger(kind, tmp_path / "in", True, table)
    model = ctfp8.from_pretrained(folder, TIED[kind][1])
    assert "Conditional" not in type(model).__name__
    want = logits(ctfp8.from_pretrained(folder, AutoModelForImageTextToText))
    assert torch.equal(logits(model), want)
    model.tie_weights()
    assert torch.equal(logits(model), want)
    model.save_pretrained(tmp_path / "out")
    assert differing(folder, tmp_path / "out") == set()
    before, after = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "out"))
    for config in (before, after):
        assert config["tie_word_embeddings"]
        assert not config["text_config"]["tie_word_embeddings"]
    for auto in (TIED[kind][1], AutoModelForImageTextToText):
        assert torch.equal(logits(ctfp8.from_pretrained(tmp_path / "out", auto)), want)
    plain = ctfp8.from_pretrained(folder, TIED[kind][1], dequantize=True)
    plain.save_pretrained(tmp_path / "plain")
    stock = type(plain).from_pretrained(tmp_path / "plain").eval()
    assert torch.equal(logits(stock), logits(plain))


@pytest.mark.parametrize("kind", list(TIED))
@pytest.mark.filterwarnings("ignore")
def test_a_text_class_keeps_the_head_that_the_file_has(kind, tmp_path):
    """Whatever the top of the config says; a file without one, of which nothing says that it is tied, is not complete."""
    folder = larger(kind, tmp_path / "in", False)
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(said | {"tie_word_embeddings": True}))
    model = ctfp8.from_pretrained(folder, TIED[kind][1])
    model.tie_weights()
    assert not torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)
    assert torch.equal(logits(model), logits(ctfp8.from_pretrained(folder, AutoModelForImageTextToText)))
    model.save_pretrained(tmp_path / "out")
    assert differing(folder, tmp_path / "out") == set()
    state = {n: tensor for n, tensor in load_file(folder / "model.safetensors").items() if "lm_head" not in n}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(said))
    with pytest.raises(ctfp8.CheckpointError, match=r"needs lm_head\.weight, but no tensor"):
        ctfp8.from_pretrained(folder, TIED[kind][1])


@pytest.mark.parametrize("kind", list(TIED))
@pytest.mark.parametrize("said", ["float8_e4m3fn", "torch.float8_e4m3fn", "torch.bfloat16"])
@pytest.mark.parametrize("where", [{"text_config"}, {"", "text_config"}, {"text_config", "vision_config"}])
@pytest.mark.filterwarnings("ignore")
def test_a_float8_dtype_in_a_part_of_a_config(kind, said, where, tmp_path):
    folder = larger(kind, tmp_path / "in", False)
    config = json.loads((folder / "config.json").read_text())
    for part in where:
        (config[part] if part else config)["dtype"] = said
    (folder / "config.json").write_text(json.dumps(config))
    for auto in (TIED[kind][1], AutoModelForImageTextToText):
        model = ctfp8.from_pretrained(folder, auto)
        assert model.dtype == torch.bfloat16
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16, torch.float8_e4m3fn}
        model.save_pretrained(tmp_path / "out")
        assert "float8_e4m3fn" not in (tmp_path / "out/config.json").read_text()
        ctfp8.from_pretrained(tmp_path / "out", auto)
    config["text_config"]["dtype"] = "bf16"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ctfp8.CheckpointError, match=r"text_config\.dtype in config.json is 'bf16'"):
        ctfp8.from_pretrained(folder, TIED[kind][1])


def test_the_legacy_key_stays_where_it_was(tmp_path):
    shutil.copytree(LLAMA, tmp_path / "in")
    said = json.loads((tmp_path / "in/config.json").read_text())
    said["compression_config"] = {"quantization_config": said.pop("quantization_config")}
    (tmp_path / "in/config.json").write_text(json.dumps(said))
    ctfp8.from_pretrained(tmp_path / "in").save_pretrained(tmp_path / "out")
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["compression_config"] == said["compression_config"]
    assert "quantization_config" not in written
    ctfp8.from_pretrained(tmp_path / "in", dequantize=True).save_pretrained(tmp_path / "plain")
    written = json.loads((tmp_path / "plain/config.json").read_text())
    assert not {"compression_config", "quantization_config"} & set(written)


@pytest.mark.parametrize("wide", ["norms", "scales"])
@pytest.mark.parametrize("asked", [{}, {"dtype": "auto"}, {"dtype": None}, {"torch_dtype": "auto"}])
def test_a_dtype_that_nobody_says(wide, asked, tmp_path):
    """Neither float32 norms nor float32 scales, of which a file has many, make a bfloat16 model a float32 one."""
    state = load_file(LLAMA / "model.safetensors")
    state = {k: t.float() if k.endswith("_scale") or (wide == "norms" and "norm" in k) else t for k, t in state.items()}
    folder = write(tmp_path / "in", state, LLAMA)
    said = json.loads((folder / "config.json").read_text())
    del said["dtype"]
    (folder / "config.json").write_text(json.dumps(said))
    model = ctfp8.from_pretrained(folder, **asked)
    assert model.dtype == model.config.dtype == torch.bfloat16
    model = ctfp8.from_pretrained(folder, dtype=torch.float32)
    assert model.dtype == torch.float32
    model.save_pretrained(tmp_path / "out")
    assert differing(folder, tmp_path / "out") == set()
    assert ctfp8.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


@pytest.mark.parametrize("argument", ["dtype", "torch_dtype"])
@pytest.mark.parametrize(
    "asked",
    ["float8_e4m3fn", torch.float8_e4m3fn, torch.float8_e5m2, "float8_e8m0fnu", torch.int8, {"": "float8_e5m2"}],
)
def test_a_dtype_that_nothing_is_computed_in_is_refused(argument, asked):
    words = rf"^{argument}=(float8_\w+|int8): nothing is computed in it.*give bfloat16, float16 or float32"
    for dequantize in (False, True):
        with pytest.raises(ctfp8.UsageError, match=words):
            ctfp8.from_pretrained(LLAMA, dequantize=dequantize, **{argument: asked})


@pytest.mark.parametrize("asked", ["bf16", "fp8", "", "nn", "Tensor", 16, {"": "bf16"}])
def test_a_dtype_that_torch_does_not_have_is_refused(asked):
    with pytest.raises(ctfp8.UsageError, match=r"^dtype=.* is no dtype of torch\. Give bfloat16"):
        ctfp8.from_pretrained(LLAMA, dtype=asked)


def test_a_dtype_as_torch_prints_it():
    assert ctfp8.from_pretrained(LLAMA, dtype="torch.float32").dtype == torch.float32


def said_dtype(folder: Path, key: str, said: object) -> Path:
    """A copy of a small checkpoint whose config says this dtype."""
    shutil.copytree(LLAMA, folder)
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config | {key: said}))
    return folder


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize(
    "said", ["bf16", "fp8", "BFloat16", "torch.torch.bfloat16", "auto", "", "nn", "Tensor", 16, [1]]
)
def test_a_config_of_a_dtype_that_torch_does_not_have_is_refused(key, said, tmp_path):
    words = rf"in: {key} in config.json is {re.escape(repr(said))}, which is no dtype of torch\. Write bfloat16"
    with pytest.raises(ctfp8.CheckpointError, match=words):
        ctfp8.from_pretrained(said_dtype(tmp_path / "in", key, said))


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize(("said", "want"), [("torch.bfloat16", torch.bfloat16), ("torch.float16", torch.float16),
                                            ("half", torch.float16), ("torch.float32", torch.float32)])  # fmt: skip
def test_a_config_that_says_its_dtype_as_torch_prints_it(key, said, want, tmp_path):
    folder = said_dtype(tmp_path / "in", key, said)
    model = ctfp8.from_pretrained(folder)
    assert model.dtype == model.config.dtype == want
    assert model.config.name_or_path == str(folder)
    model.save_pretrained(tmp_path / "out")
    assert differing(folder, tmp_path / "out") == set()
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == str(want).removeprefix("torch.")


@pytest.mark.parametrize("said", ["float8_e4m3fn", "torch.float8_e4m3fn", "torch.float8_e5m2", "int8", "torch.int8"])
@pytest.mark.parametrize("plain", [torch.bfloat16, torch.float16])
def test_a_float8_dtype_in_a_config_is_that_of_the_other_tensors(said, plain, tmp_path):
    state = load_file(LLAMA / "model.safetensors")
    state = {k: t.to(plain) if t.dtype == torch.bfloat16 and "scale" not in k else t for k, t in state.items()}
    folder = write(tmp_path / "in", state, LLAMA)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": said}))
    model = ctfp8.from_pretrained(folder)
    assert model.dtype == model.config.dtype == plain
    model.save_pretrained(tmp_path / "out")
    assert differing(folder, tmp_path / "out") == set()
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == str(plain).removeprefix("torch.")
