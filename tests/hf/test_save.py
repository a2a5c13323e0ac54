"""What is saved is what was read: every tensor with its dtype and bits, the config where it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import DATA, IDS, fp8_config, logits
from safetensors.torch import load_file, save_file
from support import architectures
from support.forge import forge
from support.formats import FORMATS, respell
from transformers import AutoConfig, AutoModelForImageTextToText

import ctfp8_compile as ctfp8

FOLDERS = sorted(
    str(file.parent.relative_to(DATA)) for file in DATA.glob("**/config.json") if "dense" not in file.parts
)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same(before: Path, after: Path) -> None:
    a, b = tensors(before), tensors(after)
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert (tensor.dtype, tensor.shape) == (b[name].dtype, b[name].shape), name
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), b[name].reshape(-1).view(torch.uint8)), name
    configs = [json.loads((folder / "config.json").read_text()) for folder in (before, after)]
    assert configs[0].get("quantization_config") == configs[1].get("quantization_config")


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.filterwarnings("ignore")
def test_every_file_under_tests_data(name, tmp_path):
    ctfp8.save_pretrained(ctfp8.from_pretrained(DATA / name), tmp_path)
    assert_same(DATA / name, tmp_path)
    side = "hf_quant_config.json"
    assert (tmp_path / side).exists() == (DATA / name / side).exists()


@pytest.mark.parametrize(("scheme", "format"), [(scheme, name) for scheme, names in FORMATS.items() for name in names])
def test_every_format(scheme, format, tmp_path):
    respell(DATA / "llama" / scheme, tmp_path / "in", format)
    ctfp8.save_pretrained(ctfp8.from_pretrained(tmp_path / "in"), tmp_path / "out")
    assert_same(tmp_path / "in", tmp_path / "out")


@pytest.mark.long
@pytest.mark.parametrize("architecture", sorted(architectures.ARCHITECTURES))
def test_every_architecture(architecture, tmp_path):
    scheme = architectures.ARCHITECTURES[architecture].schemes[0]
    folder = forge(architecture, scheme, tmp_path / "in").folder
    ctfp8.save_pretrained(ctfp8.from_pretrained(folder), tmp_path / "out")
    assert_same(folder, tmp_path / "out")


def edited(name: str, folder: Path, change) -> Path:
    """A copy of a checkpoint under tests/data whose tensors, and whose config, `change` may edit."""
    shutil.copytree(DATA / name, folder)
    state, config = tensors(folder), json.loads((folder / "config.json").read_text())
    change(state, config)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def extra_layer(state, config):
    """As DeepSeek's files have it: a layer past the last, which the class does not build."""
    for name in [name for name in state if name.startswith("model.layers.0.")]:
        state[name.replace("layers.0", f"layers.{config['num_hidden_layers']}")] = state[name].clone()


def mtp(state, config):
    state["mtp.fc.weight"] = torch.randn(8, 16).bfloat16()
    state["mtp.layers.0.weight"] = torch.randn(8, 16).to(torch.float8_e4m3fn)
    state["mtp.layers.0.weight_scale"] = torch.rand(8, 1)


def wide_norms(state, config):
    for name in [name for name in state if "norm" in name]:
        state[name] = torch.rand(state[name].shape)  # float32 that bfloat16 cannot hold


def half_head(state, config):
    state["lm_head.weight"] = state["lm_head.weight"].half()


CHANGES = [extra_layer, mtp, wide_norms, half_head]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("name", ["llama/FP8_DYNAMIC", "qwen3moe/FP8_BLOCK"])
@pytest.mark.filterwarnings("ignore")
def test_what_the_model_holds_in_another_way_or_not_at_all(name, change, tmp_path):
    folder = edited(name, tmp_path / "in", change)
    model = ctfp8.from_pretrained(folder)
    logits(model)  # weights leave the files
    ctfp8.save_pretrained(model, tmp_path / "out")
    assert_same(folder, tmp_path / "out")
    model.save_pretrained(tmp_path / "again", max_shard_size="100KB")
    assert_same(folder, tmp_path / "again")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_model_in_another_dtype_saves_the_files(dtype, tmp_path):
    ctfp8.save_pretrained(ctfp8.from_pretrained(DATA / "llama/FP8", dtype=dtype), tmp_path)
    assert_same(DATA / "llama/FP8", tmp_path)


def test_what_the_user_changed_is_saved_as_it_is_now(tmp_path):
    """In the dtype that the file has."""
    folder = edited("llama/FP8_DYNAMIC", tmp_path / "in", wide_norms)
    model = ctfp8.from_pretrained(folder)
    with torch.no_grad():
        model.model.norm.weight.fill_(0.75)
        model.model.embed_tokens.weight[3] = 0.5
    ctfp8.save_pretrained(model, tmp_path / "out")
    before, after = tensors(folder), tensors(tmp_path / "out")
    assert torch.equal(after["model.norm.weight"], torch.full_like(before["model.norm.weight"], 0.75))
    assert torch.equal(
        after["model.embed_tokens.weight"][3], torch.full_like(before["model.embed_tokens.weight"][3], 0.5)
    )
    unchanged = "model.layers.0.input_layernorm.weight"
    assert torch.equal(after[unchanged], before[unchanged])


def test_files_that_are_gone(tmp_path):
    """A model that holds all of its tensors is saved; one whose file held more says what would be lost."""
    model = ctfp8.from_pretrained(edited("llama/FP8_DYNAMIC", tmp_path / "a", half_head), in_memory=True)
    before = tensors(tmp_path / "a")
    shutil.rmtree(tmp_path / "a")
    ctfp8.save_pretrained(model, tmp_path / "out")
    after = tensors(tmp_path / "out")
    assert {n: t.dtype for n, t in before.items()} == {n: t.dtype for n, t in after.items()}
    model = ctfp8.from_pretrained(edited("llama/FP8_DYNAMIC", tmp_path / "b", mtp), in_memory=True)
    shutil.rmtree(tmp_path / "b")
    with pytest.raises(ctfp8.UsageError, match=r"mtp.* not in the model \(3 tensors in all.*Load the checkpoint again"):
        ctfp8.save_pretrained(model, tmp_path / "lost")
    assert not list(tmp_path.glob("lost/*.safetensors"))


def test_a_second_copy_of_a_tied_weight(tmp_path):
    def tie(state, config):
        config["tie_word_embeddings"] = True
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()

    folder = edited("llama/FP8_DYNAMIC", tmp_path / "in", tie)
    model = ctfp8.from_pretrained(folder)
    ctfp8.save_pretrained(model, tmp_path / "out")
    assert_same(folder, tmp_path / "out")
    with torch.no_grad():
        model.model.embed_tokens.weight[0] = 1
    ctfp8.save_pretrained(model, tmp_path / "changed")
    after = tensors(tmp_path / "changed")
    assert torch.equal(after["lm_head.weight"], after["model.embed_tokens.weight"])
    assert after["lm_head.weight"][0].unique().tolist() == [1]


LLAMA = {"model_type": "llama", "vocab_size": 256, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1,
         "num_attention_heads": 2, "num_key_value_heads": 2}  # fmt: skip
VISION = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
          "num_attention_heads": 2, "image_size": 16, "patch_size": 8}  # fmt: skip


@pytest.fixture(scope="module")
def composite(tmp_path_factory):
    """A vision-language checkpoint whose text part is FP8."""
    folder = tmp_path_factory.mktemp("composite")
    config = AutoConfig.for_model(
        "llava", text_config=LLAMA, vision_config=VISION, image_token_index=250, tie_word_embeddings=False
    )
    AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    state = tensors(folder)
    for name in [name for name in state if "language_model" in name and name.endswith("proj.weight")]:
        scale = state[name].float().abs().amax(1, keepdim=True) / 448
        state[f"{name}_scale"], state[name] = scale, (state[name].float() / scale).to(torch.float8_e4m3fn)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("where", [("",), ("text_config",), ("", "text_config")])
def test_a_config_stays_where_it_was(composite, where, tmp_path):
    quantization = {**fp8_config(), "ignore": ["re:.*lm_head", "re:.*vision_tower.*", "re:.*multi_modal_projector.*"]}
    shutil.copytree(composite, tmp_path / "in")
    config = json.loads((tmp_path / "in/config.json").read_text())
    for part in where:
        (config[part] if part else config)["quantization_config"] = quantization
    (tmp_path / "in/config.json").write_text(json.dumps(config))
    model = ctfp8.from_pretrained(tmp_path / "in", AutoModelForImageTextToText)
    ctfp8.save_pretrained(model, tmp_path / "out")
    model.config.save_pretrained(tmp_path / "config")
    for folder in ("out", "config"):
        text = (tmp_path / folder / "config.json").read_text()
        saved = json.loads(text)
        assert "ctfp8" not in text
        held = {part for part in ("", "text_config") if "quantization_config" in (saved[part] if part else saved)}
        assert held == set(where)
    assert_same(tmp_path / "in", tmp_path / "out")
    ctfp8.from_pretrained(tmp_path / "out", AutoModelForImageTextToText)
    plain = ctfp8.from_pretrained(tmp_path / "in", AutoModelForImageTextToText, dequantize=True)
    plain.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in (tmp_path / "plain/config.json").read_text()
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "plain")
    assert torch.equal(stock(input_ids=IDS[:1, :8]).logits, plain(input_ids=IDS[:1, :8]).logits)


@pytest.mark.parametrize("said", [None, "float8_e4m3fn"])
@pytest.mark.filterwarnings("ignore")
def test_a_config_without_a_dtype_takes_that_of_what_is_not_quantized(said, tmp_path):
    def change(state, config):
        for word in ("dtype", "torch_dtype"):
            config.pop(word, None)
        if said:
            config["dtype"] = said

    model = ctfp8.from_pretrained(edited("llama/FP8_BLOCK", tmp_path / "in", change))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16, torch.float8_e4m3fn}
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16


def test_a_folder_without_a_quantization_config(tmp_path):
    """The shapes of scales say how its weights are read; none is invented when it is saved."""
    folder = edited("llama/FP8_BLOCK", tmp_path / "in", lambda state, config: config.pop("quantization_config"))
    with pytest.warns(UserWarning, match="the shapes of scales say: .*block"):
        model = ctfp8.from_pretrained(folder)
    assert torch.equal(logits(model), logits(ctfp8.from_pretrained(DATA / "llama/FP8_BLOCK")))
    ctfp8.save_pretrained(model, tmp_path / "out")
    assert_same(folder, tmp_path / "out")
    quantization = json.loads((DATA / "llama/FP8_BLOCK/config.json").read_text())["quantization_config"]
    given = ctfp8.from_pretrained(folder, quantization_config=quantization)
    assert torch.equal(logits(given), logits(model))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT's use
def test_adapters_are_not_saved_as_a_part_of_the_model(tmp_path):
    peft = pytest.importorskip("peft")
    model = ctfp8.from_pretrained(DATA / "llama/FP8")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ctfp8.UsageError, match=r"q_proj holds an adapter.*peft_model.unload"):
        ctfp8.save_pretrained(model, tmp_path / "base")
    adapted.unload()
    ctfp8.save_pretrained(model, tmp_path / "base")
    assert_same(DATA / "llama/FP8", tmp_path / "base")
