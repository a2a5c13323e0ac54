"""Saving a model that was changed, prepared, spread or cut down: the model's values where it has its own, the files' bytes elsewhere."""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from conftest import DATA, IDS, fp8_config, logits, relative_error
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.ranks import on_ranks
from support.saved import differing, stored, write
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
)
from transformers.distributed import DistributedConfig

import ctfp8_compile as ctfp8
from ctfp8_compile.hf.parallel import gather, gather_quantized

LLAMA, MOE = DATA / "llama/FP8_DYNAMIC", DATA / "qwen3moe/FP8_DYNAMIC"


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


@pytest.mark.long
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
    with pytest.warns(UserWarning, match=r"tensor model.norm.weight has values that its dtype .*BF16"):
        model.save_pretrained(tmp_path)
    assert differing(LLAMA, tmp_path) == {"model.norm.weight"}
    assert torch.equal(load_file(tmp_path / "model.safetensors")["model.norm.weight"], model.model.norm.weight)


def test_scales_that_the_dtype_of_the_file_does_not_hold(tmp_path):
    state = load_file(LLAMA / "model.safetensors")
    folder = write(tmp_path / "in", {k: t.bfloat16() if k.endswith("_scale") else t for k, t in state.items()}, LLAMA)
    model = ctfp8.from_pretrained(folder)
    model.model.layers[0].mlp.up_proj.parametrizations.weight[0].weight_scale *= 1 + 2**-12
    with pytest.warns(UserWarning, match="scales of weight model.layers.0.mlp.up_proj.weight .*rounded"):
        model.save_pretrained(tmp_path / "out")


def test_parts_that_are_taken_out_are_said(tmp_path):
    model = ctfp8.from_pretrained(LLAMA)
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:1], 1
    with pytest.warns(UserWarning, match=r"16 tensors, such as model.layers.1.*, of the checkpoint are not saved"):
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
assert "torch._inductor.lowering" not in sys.modules  # loading takes no compiler along, which is 45 MB
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


# --- several ranks ------------------------------------------------------------------------------------------------


def on_two(folders: list[Path], out: Path) -> list[tuple[list[str], int]]:
    """Of each model, which parameters are cut, and the largest number of experts that are gathered at a time."""
    found = []
    for folder in folders:
        model = ctfp8.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=2))
        model.save_pretrained(out / folder.name / "same", max_shard_size="100KB")
        with (
            patch("ctfp8_compile.hf.unit.GATHERED", 1),
            patch("ctfp8_compile.hf.held.gather_quantized", wraps=gather_quantized) as seen,
            patch("ctfp8_compile.hf.held.gather", wraps=gather) as rows,
        ):
            model.save_pretrained(out / folder.name / "one by one")
        most = max(
            (len(experts or whole.layout.placements) for (_, _, whole, experts), _ in seen.call_args_list), default=0
        )
        assert max(len(call.args[3]) for call in rows.call_args_list) == 1  # of matrices, tables of embeddings
        with torch.no_grad():
            model.model.norm.weight[0] = 3
            model.lm_head.weight[0] = dist.get_rank() + 1.0
        model.save_pretrained(out / folder.name / "changed")
        found.append((sorted(model.hf_quantizer.cuts), int(most)))
    return found


def with_wide_head(source: Path, folder: Path) -> Path:
    """A copy whose head is in float32 that bfloat16 does not hold."""
    state = load_file(source / "model.safetensors")
    return write(folder, state | {"lm_head.weight": torch.randn(state["lm_head.weight"].shape)}, source)


@pytest.mark.long
def test_two_ranks(tmp_path):
    folders = [
        with_more(LLAMA, tmp_path / "llama"),
        with_more(MOE, tmp_path / "moe"),
        with_wide_head(LLAMA, tmp_path / "wide"),
    ]
    first, second = on_ranks(2, on_two, folders, tmp_path / "out")
    assert first == second
    assert isinstance(first, list)
    for folder, (cuts, most) in zip(folders, first, strict=True):
        assert most == (1 if folder.name == "moe" else 0)
        out = tmp_path / "out" / folder.name
        assert differing(folder, out / "same") == differing(folder, out / "one by one") == set()
        assert differing(folder, out / "changed") == {"model.norm.weight", "lm_head.weight"}
        head = load_file(out / "changed/model.safetensors")["lm_head.weight"]
        assert head.dtype == load_file(folder / "model.safetensors")["lm_head.weight"].dtype
        if "lm_head.weight" in cuts:
            assert head[0].unique().tolist() == [1]
            assert head[len(head) // 2].unique().tolist() == [2]


def all_on_two(folders: list[Path], out: Path) -> list[float]:
    """Relative errors of logits, against one process, in float64. Saves each."""
    errors = []
    for i, folder in enumerate(folders):
        experts = {"ep_size": 2} if "moe" in str(folder) and i % 2 else {}
        spread = DistributedConfig(tp_size=2, **experts)
        one, model = (
            ctfp8.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager", **more)
            for more in ({}, {"distributed_config": spread})
        )
        errors.append(relative_error(logits(model), logits(one)))
        model = ctfp8.from_pretrained(folder, distributed_config=spread)
        with patch("ctfp8_compile.hf.unit.GATHERED", 1 << 14):  # one expert at a time, some rows
            model.save_pretrained(out / str(i))
    return errors


@pytest.mark.long
def test_every_file_under_tests_data_on_two_ranks(tmp_path):
    folders = sorted(file.parent for file in DATA.rglob("config.json") if file.parent.name != "dense")
    ranks = on_ranks(2, all_on_two, folders, tmp_path)
    for errors in ranks:
        assert isinstance(errors, list), errors
        assert max(errors) < 1e-6, dict(zip(folders, errors, strict=True))
    for i, folder in enumerate(folders):
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


@pytest.mark.long
def test_two_ranks_whose_files_are_gone(tmp_path):
    said = on_ranks(2, gone_on_two, with_more(LLAMA, tmp_path / "in"), tmp_path / "out")
    assert all("Load the checkpoint again" in text for text in said)
    assert not list(tmp_path.glob("out/*.safetensors"))
