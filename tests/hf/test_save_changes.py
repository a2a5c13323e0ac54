"""Saving a model that was changed, prepared, spread or cut down: the model's values where it has its own, the files' bytes elsewhere."""

from __future__ import annotations

import contextlib
import copy
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from conftest import DATA, IDS, fp8_config, logits
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.ranks import on_ranks
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma3ForCausalLM,
    MistralForCausalLM,
)
from transformers.distributed import DistributedConfig

import ctfp8_compile as ctfp8

LLAMA, MOE = DATA / "llama/FP8_DYNAMIC", DATA / "qwen3moe/FP8_DYNAMIC"


def stored(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """By name, what the files say of each tensor, and its bytes."""
    out = {}
    for file in folder.glob("*.safetensors"):
        content = file.read_bytes()
        base = 8 + int.from_bytes(content[:8], "little")
        for name, entry in json.loads(content[8:base]).items():
            if name != "__metadata__":
                begin, end = (base + at for at in entry["data_offsets"])
                out[name] = entry["dtype"], tuple(entry["shape"]), content[begin:end]
    return out


def differing(before: Path, after: Path) -> set[str]:
    """Names of the tensors that are not the same in both; none may be missing in one."""
    a, b = stored(before), stored(after)
    assert a.keys() == b.keys()
    return {name for name in a if a[name] != b[name]}


def write(folder: Path, state: dict[str, torch.Tensor], source: Path, metadata: dict[str, str] | None = None) -> Path:
    """A checkpoint of these tensors, with the config of another one."""
    folder.mkdir(parents=True)
    shutil.copy(source / "config.json", folder)
    save_file(
        {k: t.contiguous() for k, t in state.items()},
        folder / "model.safetensors",
        {"format": "pt", **(metadata or {})},
    )
    return folder


def with_more(source: Path, folder: Path) -> Path:
    """A copy with tensors of many dtypes that no class builds, norms in float32, and a header that says more."""
    state = load_file(source / "model.safetensors")
    state |= {
        "mtp.fc.weight": torch.randn(8, 6).to(torch.float8_e4m3fn),
        "mtp.fc.weight_scale": torch.rand(8, 1),
        "mtp.ids": torch.arange(5),
        "mtp.mask": torch.tensor([True, False, True]),
        "mtp.exponents": torch.arange(3, dtype=torch.uint8).view(torch.float8_e8m0fnu),
        "mtp.half": torch.randn(3).half(),
        "mtp.number": torch.tensor(3.0),
        "mtp.none": torch.empty(0, 4),
    }
    state = {k: torch.rand(t.shape) if "norm" in k else t for k, t in state.items()}
    return write(folder, state, source, {"made by": "hand"})


# --- what was not changed -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [LLAMA, MOE, DATA / "llama/MXFP8"], ids=lambda p: "/".join(p.parts[-2:]))
@pytest.mark.parametrize("way", ["in_memory", "device_map", "deepcopy", "twice", "generate", "float16"])
def test_ways_of_loading(source, way, tmp_path):
    folder = with_more(source, tmp_path / "in")
    arguments = {
        "in_memory": {"in_memory": True},
        "device_map": {"device_map": {"": "cpu"}},
        "float16": {"dtype": torch.float16},
    }
    model = ctfp8.from_pretrained(folder, **arguments.get(way, {}))
    if way == "deepcopy":
        model = copy.deepcopy(model)
    elif way == "generate":
        model.generate(IDS[:1, :4], max_new_tokens=2, do_sample=False)
    elif way == "twice":
        model.save_pretrained(tmp_path / "out", max_shard_size="50KB")
    model.save_pretrained(tmp_path / "out")
    assert differing(folder, tmp_path / "out") == set()
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "made by": "hand"}


def test_a_compiled_model(tmp_path):
    folder = with_more(LLAMA, tmp_path / "in")
    model = ctfp8.from_pretrained(folder)
    ctfp8.compile(model)
    logits(model)
    model.save_pretrained(tmp_path / "out")
    assert differing(folder, tmp_path / "out") == set()


@pytest.mark.parametrize("most", [1, 10_000, "100KB", "1MB", "5GB"])
def test_shards(most, tmp_path):
    """No file is larger than asked, unless one tensor is; the index names each tensor; what an earlier save left is gone."""
    folder, out = with_more(MOE, tmp_path / "in"), tmp_path / "out"
    model = ctfp8.from_pretrained(folder)
    model.save_pretrained(out, max_shard_size="77KB")
    model.save_pretrained(out, max_shard_size=most)
    assert differing(folder, out) == set()
    files = sorted(file.name for file in out.glob("*.safetensors"))
    sizes = {name: [len(data) for _, _, data in stored_in(out / name).values()] for name in files}
    limit = {"100KB": 100_000, "1MB": 10**6, "5GB": 5 * 10**9}.get(most, most)
    assert all(sum(found) <= limit or len([size for size in found if size]) == 1 for found in sizes.values())
    index = out / "model.safetensors.index.json"
    assert index.exists() == (len(files) > 1)
    if index.exists():
        written = json.loads(index.read_text())
        assert written["weight_map"] == {name: file for file in files for name in stored_in(out / file)}
        assert written["metadata"]["total_size"] == sum(map(sum, sizes.values()))
    assert torch.equal(logits(ctfp8.from_pretrained(out)), logits(ctfp8.from_pretrained(folder)))


def stored_in(file: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """`stored` of one file."""
    with patch.object(Path, "glob", lambda self, pattern: [file]):
        return stored(file.parent)


@pytest.mark.parametrize("name", ["llama/FP8", "llama/FP8_BLOCK", "llama/FP8_DYNAMIC", "qwen3/FP8_DYNAMIC"])
def test_a_prepared_model_is_saved_as_its_files_are(name, tmp_path):
    """transformers rounds float32 scales and norms while it loads: their bits are the files'."""
    folder = with_more(DATA / name, tmp_path / "in")
    state = load_file(folder / "model.safetensors")
    state = {k: t.float() * 1.0001 if k.startswith("model") and k.endswith("_scale") else t for k, t in state.items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    model = ctfp8.prepare(AutoModelForCausalLM.from_pretrained(folder))
    logits(model)
    model.save_pretrained(tmp_path / "out")
    assert differing(folder, tmp_path / "out") == set()
    with torch.no_grad():
        model.model.norm.weight[0] = 3
    model.save_pretrained(tmp_path / "changed")
    assert differing(folder, tmp_path / "changed") == {"model.norm.weight"}


# --- what was -----------------------------------------------------------------------------------------------------


def change_norm(model):
    model.model.layers[0].input_layernorm.weight[1] = 0.5
    return {"model.layers.0.input_layernorm.weight"}


def change_head(model):
    model.lm_head.weight[2] += 1
    return {"lm_head.weight"}


def change_scale(model):
    model.model.layers[1].self_attn.o_proj.parametrizations.weight[0].weight_scale *= 2
    return {"model.layers.1.self_attn.o_proj.weight_scale"}


def change_codes(model):
    model.model.layers[1].self_attn.o_proj.parametrizations.weight.original.view(torch.uint8)[0] = 8
    return {"model.layers.1.self_attn.o_proj.weight"}


def resize(model):
    model.resize_token_embeddings(model.config.vocab_size + 8)
    return {"model.embed_tokens.weight", "lm_head.weight"}


def replace(model):
    model.model.norm = copy.deepcopy(model.model.norm)
    model.model.norm.weight.fill_(0.25)
    return {"model.norm.weight"}


@pytest.mark.parametrize("change", [change_norm, change_head, change_scale, change_codes, resize, replace])
@pytest.mark.parametrize("source", [LLAMA, MOE], ids=lambda p: p.parts[-2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_the_user_changed_is_saved_as_it_is_now_and_nothing_else(source, change, dtype, tmp_path):
    model = ctfp8.from_pretrained(source, dtype=dtype)
    with torch.no_grad():
        changed = change(model)
    wide = dtype == torch.float32 and change in (
        change_head,
        resize,
    )  # values that bfloat16, of the file, does not hold
    with pytest.warns(UserWarning, match="does not hold") if wide else contextlib.nullcontext():
        model.save_pretrained(tmp_path)
    assert differing(source, tmp_path) == changed
    before, after = stored(source), stored(tmp_path)
    assert all(after[name][0] == ("F32" if wide else before[name][0]) for name in changed)
    assert torch.equal(logits(ctfp8.from_pretrained(tmp_path, dtype=dtype)), logits(model))


@pytest.mark.parametrize("projection", ["gate_proj", "down_proj"])
def test_one_plain_expert_of_those_that_are_merged(projection, tmp_path):
    """The model holds them as one parameter, which transformers takes apart again."""
    state = load_file(MOE / "model.safetensors")
    experts = "model.layers.0.mlp.experts."
    plain = {"gate_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[projection]
    for name in [
        name for name in state if name.startswith(experts) and name.endswith(tuple(f"{p}.weight" for p in plain))
    ]:
        state[name] = (state[name].float() * state.pop(f"{name}_scale").float()).bfloat16()
    folder = write(tmp_path / "in", state, MOE)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["ignore"] += [f"re:{experts}.*{p}" for p in plain]
    (folder / "config.json").write_text(json.dumps(config))
    model = ctfp8.from_pretrained(folder)
    model.save_pretrained(tmp_path / "same")
    assert differing(folder, tmp_path / "same") == set()
    with torch.no_grad():
        merged = model.get_parameter(experts + ("down_proj" if projection == "down_proj" else "gate_up_proj"))
        merged[2, 0] += 1
    model.save_pretrained(tmp_path / "out")
    assert differing(folder, tmp_path / "out") == {f"{experts}2.{projection}.weight"}


def test_a_value_that_the_dtype_of_the_file_does_not_hold(tmp_path):
    model = ctfp8.from_pretrained(LLAMA, dtype=torch.float32)
    with torch.no_grad():
        model.model.norm.weight[0] = 1 + 2**-12
    with pytest.warns(UserWarning, match=r"1 tensors, such as model.norm.weight, have values that their dtype .*BF16"):
        model.save_pretrained(tmp_path)
    assert differing(LLAMA, tmp_path) == {"model.norm.weight"}
    assert torch.equal(load_file(tmp_path / "model.safetensors")["model.norm.weight"], model.model.norm.weight)


def test_scales_that_the_dtype_of_the_file_does_not_hold(tmp_path):
    state = load_file(LLAMA / "model.safetensors")
    folder = write(tmp_path / "in", {k: t.bfloat16() if k.endswith("_scale") else t for k, t in state.items()}, LLAMA)
    model = ctfp8.from_pretrained(folder)
    model.model.layers[0].mlp.up_proj.parametrizations.weight[0].weight_scale *= 1 + 2**-12
    with pytest.warns(UserWarning, match="scales of 1 weights, such as model.layers.0.mlp.up_proj.weight, .*rounded"):
        model.save_pretrained(tmp_path / "out")


def test_parts_that_are_taken_out_are_said(tmp_path):
    model = ctfp8.from_pretrained(LLAMA)
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:1], 1
    with pytest.warns(UserWarning, match=r"16 tensors of the checkpoint, such as model.layers.1.*, are not saved"):
        model.save_pretrained(tmp_path)
    assert not [name for name in stored(tmp_path) if "layers.1." in name]
    assert torch.equal(logits(ctfp8.from_pretrained(tmp_path)), logits(model))


def test_what_nothing_would_load_is_refused(tmp_path):
    model = ctfp8.from_pretrained(LLAMA)
    model.model.layers[0].self_attn.q_proj.bias = nn.Parameter(torch.ones(128, dtype=torch.bfloat16))
    with pytest.raises(ctfp8.UsageError, match="q_proj.bias is not a tensor that LlamaForCausalLM has"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            projection = getattr(layer.self_attn, name)
            projection.bias = nn.Parameter(torch.randn(projection.out_features).bfloat16())
    model.config.attention_bias = True
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(ctfp8.from_pretrained(tmp_path / "out")), logits(model))


# --- where, and how far -------------------------------------------------------------------------------------------


def test_a_folder_is_not_written_over_its_own_files(tmp_path):
    folder = with_more(LLAMA, tmp_path / "in")
    (tmp_path / "link").symlink_to(folder)
    model = ctfp8.from_pretrained(folder)
    for out in (folder, tmp_path / "link", tmp_path / "x/../in"):
        with pytest.raises(ctfp8.UsageError, match="mapped from the files there; save to another folder"):
            model.save_pretrained(out)
    linked = ctfp8.from_pretrained(tmp_path / "link")
    with pytest.raises(ctfp8.UsageError, match="save to another folder"):
        linked.save_pretrained(folder)


@pytest.mark.parametrize("argument", [{"state_dict": {}}, {"distributed_checkpoint": True}, {"max_shard_size": "x"}])
def test_arguments_that_are_not_supported(argument, tmp_path):
    with pytest.raises(ctfp8.UsageError, match=next(iter(argument))):
        ctfp8.from_pretrained(LLAMA).save_pretrained(tmp_path / "out", **argument)
    assert not (tmp_path / "out").exists()


def test_a_save_that_fails_leaves_the_one_before_as_it_was(tmp_path):
    model = ctfp8.from_pretrained(LLAMA)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with (
        patch("ctfp8_compile.hf.save_plan.SavePlan._fp8_tensors", side_effect=OSError("no space")),
        pytest.raises(OSError, match="no space"),
    ):
        model.save_pretrained(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("how", ["changed", "gone"])
def test_files_that_are_not_what_they_were(how, tmp_path):
    folder = with_more(LLAMA, tmp_path / "in")
    model = ctfp8.from_pretrained(folder, in_memory=True)
    if how == "gone":
        shutil.rmtree(folder)
    else:
        (folder / "model.safetensors").rename(folder / "old")
        shutil.copy(folder / "old", folder / "model.safetensors")
    words = rf"mtp.* is in the files .*\(8 tensors in all.*model.safetensors (is|has) {how}.*Load the checkpoint again"
    with pytest.raises(ctfp8.UsageError, match=words):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_upload(tmp_path):
    """`push_to_hub=True`: what is uploaded is there by then."""
    seen: dict[str, object] = {}

    def upload(self, folder, repo, before, **kwargs):
        seen.update(repo=repo, files=sorted(file.name for file in Path(folder).iterdir()), **kwargs)

    model = ctfp8.from_pretrained(LLAMA)
    with (
        patch("ctfp8_compile.hf.saving.HfApi") as api,
        patch.object(type(model), "_upload_modified_files", upload),
    ):
        api.return_value.create_repo.return_value.repo_id = "me/model"
        model.save_pretrained(tmp_path / "model", push_to_hub=True, commit_message="m")
    assert seen["repo"] == "me/model"
    assert seen["commit_message"] == "m"
    assert seen["files"] == ["config.json", "generation_config.json", "model.safetensors"]


MEMORY = """
import sys, torch
sys.path.insert(0, {benchmarks!r})
from fresh import Peak
import ctfp8_compile as ctfp8
model = ctfp8.from_pretrained({folder!r}, in_memory=True)
model.save_pretrained({out!r})  # what is imported and made once
memory = Peak()
model.save_pretrained({out!r})
print(memory.stop())
"""


def test_a_model_is_not_in_memory_twice_while_it_is_saved(tmp_path):
    config = AutoConfig.for_model("llama", vocab_size=512, hidden_size=1024, intermediate_size=2048, num_hidden_layers=6,
                                  num_attention_heads=8, num_key_value_heads=8, dtype="bfloat16")  # fmt: skip
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in AutoModelForCausalLM.from_config(config).state_dict().items()}
    state = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    for name in [name for name in state if name.endswith("proj.weight")]:
        state[name], state[f"{name}_scale"] = state[name].to(torch.float8_e4m3fn), torch.ones(shapes[name][0], 1)
    folder = tmp_path / "in"
    folder.mkdir()
    config.quantization_config = {**fp8_config(), "ignore": ["lm_head"]}
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    size = (folder / "model.safetensors").stat().st_size
    benchmarks = str(DATA.parent.parent / "benchmarks")
    script = MEMORY.format(benchmarks=benchmarks, folder=str(folder), out=str(tmp_path / "out"))
    done = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, check=True)
    peak = int(done.stdout.split()[-1])
    assert size > 60e6
    assert peak < size / 4
    assert differing(folder, tmp_path / "out") == set()


# --- configs ------------------------------------------------------------------------------------------------------

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


# --- several ranks ------------------------------------------------------------------------------------------------


def on_two(folders: list[Path], out: Path) -> list[list[str]]:
    cuts = []
    for folder in folders:
        model = ctfp8.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=2))
        model.save_pretrained(out / folder.name / "same", max_shard_size="100KB")
        with patch("ctfp8_compile.hf.unit.GATHERED", 1):
            model.save_pretrained(out / folder.name / "one by one")
        with torch.no_grad():
            model.model.norm.weight[0] = 3
            model.lm_head.weight[0] = dist.get_rank() + 1.0
        model.save_pretrained(out / folder.name / "changed")
        cuts.append(sorted(model.hf_quantizer.cuts))
    return cuts


def with_wide_head(source: Path, folder: Path) -> Path:
    """A copy whose head is in float32 that bfloat16 does not hold."""
    state = load_file(source / "model.safetensors")
    return write(folder, state | {"lm_head.weight": torch.randn(state["lm_head.weight"].shape)}, source)


def test_two_ranks(tmp_path):
    folders = [
        with_more(LLAMA, tmp_path / "llama"),
        with_more(MOE, tmp_path / "moe"),
        with_wide_head(LLAMA, tmp_path / "wide"),
    ]
    first, second = on_ranks(2, on_two, folders, tmp_path / "out")
    assert first == second
    assert isinstance(first, list)
    for folder, cuts in zip(folders, first, strict=True):
        out = tmp_path / "out" / folder.name
        assert differing(folder, out / "same") == differing(folder, out / "one by one") == set()
        assert differing(folder, out / "changed") == {"model.norm.weight", "lm_head.weight"}
        head = load_file(out / "changed/model.safetensors")["lm_head.weight"]
        assert head.dtype == load_file(folder / "model.safetensors")["lm_head.weight"].dtype
        if "lm_head.weight" in cuts:
            assert head[0].unique().tolist() == [1]
            assert head[len(head) // 2].unique().tolist() == [2]


def all_on_two(folders: list[Path], out: Path) -> list[str]:
    said = []
    for i, folder in enumerate(folders):
        try:
            experts = {"ep_size": 2} if "moe" in str(folder) and i % 2 else {}
            model = ctfp8.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=2, **experts))
            with patch("ctfp8_compile.hf.unit.GATHERED", 1):  # one expert at a time
                model.save_pretrained(out / str(i))
            said.append("")
        except Exception as error:  # of a file that is not loaded on several ranks
            said.append(str(error))
    return said


@pytest.mark.long
def test_every_file_under_tests_data_on_two_ranks(tmp_path):
    folders = sorted(file.parent for file in DATA.rglob("config.json") if file.parent.name != "dense")
    said, _ = on_ranks(2, all_on_two, folders, tmp_path)
    refused = {folder.name for folder, text in zip(folders, said, strict=True) if text}
    assert refused == {"hf-fbgemm-llama4", "modelopt-mixed-llama"}  # neither loads with a distributed_config
    for i, folder in enumerate(folders):
        if not said[i]:
            assert differing(folder, tmp_path / str(i)) == set(), folder


def gone_on_two(folder: Path, out: Path) -> str:
    model = ctfp8.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=2), in_memory=True)
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder)
    dist.barrier()
    try:
        model.save_pretrained(out)
    except ctfp8.Ctfp8Error as error:
        return str(error)
    return ""


def test_two_ranks_whose_files_are_gone(tmp_path):
    said = on_ranks(2, gone_on_two, with_more(LLAMA, tmp_path / "in"), tmp_path / "out")
    assert all("Load the checkpoint again" in text for text in said)
    assert not list(tmp_path.glob("out/*.safetensors"))
