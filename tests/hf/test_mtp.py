"""Layers for multi-token prediction in FP8: what they draft, what is generated with them, what is saved, and what is refused."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_same_bits, relative_error
from safetensors.torch import load_file, save_file
from support.mtp import MTP_ARCHITECTURES, SCHEMES, Made, make_mtp
from torch import Tensor
from transformers import AutoConfig

import ctfp8_compile as ctfp8
from ctfp8_compile.checkpoint.contents import look
from ctfp8_compile.hf.mtp import mtp_layers
from ctfp8_compile.model.parametrization import quantized_parameters
from ctfp8_compile.ops import FP8

modeling_layers = pytest.importorskip("transformers.modeling_layers")
if not hasattr(modeling_layers, "MtpModel"):
    pytest.skip("transformers drafts with MTP layers from 5.24 on", allow_module_level=True)
from transformers.cache_utils import MtpCache  # noqa: E402
from transformers.modeling_layers import MtpModel  # noqa: E402

IDS = torch.tensor([[3, 17, 99, 5, 64, 21, 8]])
GREEDY = {"max_new_tokens": 12, "do_sample": False}
QUICK = {("deepseek_v3", "fp8"), ("glm4_moe", "MXFP8")}
CASES = [
    pytest.param(name, scheme, layers, marks=[] if quick else [pytest.mark.long])
    for name, spec in MTP_ARCHITECTURES.items()
    for scheme in SCHEMES
    for layers in (1, 2)
    if layers <= spec.most
    for quick in [
        (scheme == "FP8_DYNAMIC" and layers == min(2, spec.most)) or ((name, scheme) in QUICK and layers == 1)
    ]
]
#: transformers takes no token back from states of linear attention
STATEFUL = {"bailing_hybrid"}


def drafts(model: Any, layers: Any) -> tuple[Tensor, Tensor]:
    """The tokens that MTP layers draft behind a text, and their logits."""
    with torch.no_grad():
        hidden = model(IDS, output_hidden_states=True, use_cache=False).hidden_states[-1][:, :-1]
        positions = torch.arange(1, IDS.shape[1])[None]
        cache = MtpCache(config=model.config.get_mtp_config())
        return layers(IDS[:, 1:], hidden, None, positions, cache)[:2]


def reference(made: Made) -> tuple[Tensor, Tensor]:
    """The drafts of transformers' own layers, in float64, from the numbers that the FP8 file says."""
    model = made.auto_class.from_pretrained(made.reference, dtype=torch.float64, experts_implementation="eager")
    config = model.config.get_text_config()
    numbers = range(config.num_hidden_layers, config.num_hidden_layers + config.num_mtp_layers)
    own = {pattern for pattern in model._keys_to_ignore_on_load_unexpected or () if "mtp" in pattern}
    # its patterns name the layers by the numbers that published models have
    model._keys_to_ignore_on_load_unexpected = own or {rf"layers\.{i}\." for i in numbers}
    return drafts(model, MtpModel.from_pretrained(model, device_map={"": "cpu"}))


def fp8_sources(layers: Any) -> list[str]:
    """Names in the file of the FP8 weights that MTP layers hold."""
    return [
        d.info.names[source]
        for name, _, d in quantized_parameters(layers)
        if not name.startswith(("embed_tokens", "shared_head"))
        for source in d.info.layout.sources
    ]


@pytest.mark.parametrize(("name", "scheme", "layers"), CASES)
def test_drafts_and_tokens_of_every_architecture(name: str, scheme: str, layers: int, tmp_path: Path) -> None:
    made = make_mtp(name, scheme, tmp_path, layers)
    model = ctfp8.from_pretrained(made.folder, made.auto_class, dtype=torch.float32)
    read = MtpModel.from_pretrained(model, device_map={"": "cpu"})
    assert sorted(fp8_sources(read)) == sorted(made.names)
    (ids, logits), (want_ids, want) = drafts(model, read), reference(made)
    assert torch.equal(ids, want_ids)
    assert relative_error(logits, want) < 1e-5
    if name in STATEFUL:
        with pytest.raises(ctfp8.UsageError, match="keeps states of linear attention"):
            model.generate(IDS, **GREEDY, use_mtp=True)
    else:
        want_text = model.generate(IDS, **GREEDY)
        assert torch.equal(model.generate(IDS, **GREEDY, use_mtp=True), want_text)
    ctfp8.save_pretrained(model, tmp_path / "saved")
    assert_same_bits(made.folder, tmp_path / "saved")


@pytest.fixture(scope="module")
def glm(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_mtp("glm4_moe", "FP8_DYNAMIC", tmp_path_factory.mktemp("glm"), 2)


def loaded(made: Made, **kwargs: Any) -> Any:
    return ctfp8.from_pretrained(made.folder, made.auto_class, **{"dtype": torch.float32, **kwargs})


def test_dequantized_models_draft_with_dequantized_layers(glm: Made) -> None:
    model = loaded(glm, dequantize=True)
    layers = MtpModel.from_pretrained(model)
    assert not any(p.dtype == FP8 for p in layers.parameters())
    (ids, logits), (want_ids, want) = drafts(model, layers), reference(glm)
    assert torch.equal(ids, want_ids)
    assert relative_error(logits, want) < 1e-5
    assert torch.equal(model.generate(IDS, **GREEDY, use_mtp=True), model.generate(IDS, **GREEDY))


def test_layers_are_read_once_and_are_no_part_of_the_model(glm: Made) -> None:
    model = loaded(glm)
    before = set(model.state_dict())
    model.generate(IDS, **GREEDY, use_mtp=True)
    first = mtp_layers(model)
    model.generate(IDS, **GREEDY, use_mtp=True)
    assert mtp_layers(model) is first
    assert set(model.state_dict()) == before
    assert first.embed_tokens is model.get_input_embeddings()
    assert first.shared_head is model.lm_head
    other = copy.deepcopy(model)
    assert torch.equal(other.generate(IDS, **GREEDY, use_mtp=True), model.generate(IDS, **GREEDY))
    assert mtp_layers(other).embed_tokens is other.get_input_embeddings()
    assert mtp_layers(other) is not first


def test_sampling_and_processors(glm: Made) -> None:
    model = loaded(glm)
    torch.manual_seed(0)
    out = model.generate(IDS, max_new_tokens=20, do_sample=True, temperature=0.7, top_k=20, use_mtp=True)
    assert out.shape == (1, IDS.shape[1] + 20)
    want = model.generate(IDS, **GREEDY, repetition_penalty=1.5)
    assert torch.equal(model.generate(IDS, **GREEDY, repetition_penalty=1.5, use_mtp=True), want)


def test_a_plain_model_is_transformers_own_affair(glm: Made) -> None:
    """What is taken over is the loading for models of ours only."""
    loaded(glm)
    model = glm.auto_class.from_pretrained(glm.reference, dtype=torch.float32)
    model._keys_to_ignore_on_load_unexpected = [r"layers\.[23]\."]
    assert isinstance(MtpModel.from_pretrained(model), MtpModel)
    assert torch.equal(model.generate(IDS, **GREEDY, use_mtp=True), model.generate(IDS, **GREEDY))


def rewritten(made: Made, folder: Path, change: Any, config: dict[str, Any] | None = None) -> Made:
    """A copy of a checkpoint of which `change` may alter the tensors."""
    folder.mkdir()
    state = load_file(made.folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    said = json.loads((made.folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**said, **(config or {})}))
    return Made(folder, made.reference, made.auto_class, made.names)


def test_mtp_layers_that_a_recipe_left_in_bf16(glm: Made, tmp_path: Path) -> None:
    """As llm-compressor, which does not know them, leaves them: copied from the original file."""
    numbers = load_file(glm.reference / "model.safetensors")

    def plain(state: dict[str, Tensor]) -> None:
        for name in glm.names:
            state[name] = numbers[name].to(torch.bfloat16)
            del state[name + "_scale"]

    model = loaded(rewritten(glm, tmp_path / "plain", plain))
    layers = mtp_layers(model)
    assert fp8_sources(layers) == []
    assert relative_error(drafts(model, layers)[1], reference(glm)[1]) < 2e-2
    assert torch.equal(model.generate(IDS, **GREEDY, use_mtp=True), model.generate(IDS, **GREEDY))


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_several_files_and_static_activations(glm: Made, static: bool, tmp_path: Path) -> None:
    state = load_file(glm.folder / "model.safetensors")
    said = json.loads((glm.folder / "config.json").read_text())
    if static:
        group = said["quantization_config"]["config_groups"]["group_0"]
        group["input_activations"] |= {"strategy": "tensor", "dynamic": False}
        weights = [name for name in state if state[name].dtype == FP8]
        state |= {name.removesuffix("weight") + "input_scale": torch.tensor([0.05]) for name in weights}
    shards: list[dict[str, Tensor]] = [{}, {}, {}]
    for i, name in enumerate(sorted(state)):
        shards[i % 3][name] = state[name]
    index: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05}-of-00003.safetensors"
        save_file(shard, tmp_path / file, {"format": "pt"})
        index |= dict.fromkeys(shard, file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (tmp_path / "config.json").write_text(json.dumps(said))
    model = ctfp8.from_pretrained(tmp_path, dtype=torch.float32)
    layers = mtp_layers(model)
    assert sorted(fp8_sources(layers)) == sorted(glm.names)
    schemes = {d.info.scheme.activation for n, _, d in quantized_parameters(layers) if n.startswith("layers")}
    assert schemes == {"tensor" if static else "token"}
    assert relative_error(drafts(model, layers)[1], reference(glm)[1]) < 1e-5
    assert torch.equal(model.generate(IDS, **GREEDY, use_mtp=True), model.generate(IDS, **GREEDY))


def _drop(pattern: str) -> Any:
    def change(state: dict[str, Tensor]) -> None:
        for name in [name for name in state if re.search(pattern, name)]:
            del state[name]

    return change


def _nan(state: dict[str, Tensor]) -> None:
    state["model.layers.2.eh_proj.weight"].view(torch.uint8)[0, 0] = 0x7F


BAD = {
    "no such layer": (_drop(r"layers\.[23]\."), "no file of this model holds a layer for multi-token prediction"),
    "one layer of two": (_drop(r"layers\.3\."), r"need layers\.1\.\S+, but no tensor of the checkpoint provides it"),
    "a norm is missing": (_drop(r"layers\.2\.enorm"), r"need layers\.0\.enorm\.weight"),
    "an expert is missing": (_drop(r"layers\.2\.mlp\.experts\.1\.up"), r"layers\.0\.mtp_block\.mlp\.experts"),
    "a scale is missing": (_drop(r"layers\.2\.eh_proj\.weight_scale"), r"layers\.2\.eh_proj\.weight"),
    "NaN": (_nan, r"model\.layers\.2\.eh_proj\.weight: holds NaN"),
}


@pytest.mark.parametrize("case", BAD)
def test_damaged_layers_are_named_and_the_model_goes_on_without(case: str, glm: Made, tmp_path: Path) -> None:
    change, message = BAD[case]
    model = loaded(rewritten(glm, tmp_path / "bad", change))
    with pytest.raises(ctfp8.Ctfp8Error, match=message):
        model.generate(IDS, **GREEDY, use_mtp=True)
    assert model.generate(IDS, **GREEDY).shape[1] == IDS.shape[1] + 12


def test_files_that_changed_since(glm: Made, tmp_path: Path) -> None:
    made = rewritten(glm, tmp_path / "gone", lambda state: None)
    model = loaded(made)
    (made.folder / "model.safetensors").unlink()
    with pytest.raises(ctfp8.UsageError, match="has changed|is gone"):
        model.generate(IDS, **GREEDY, use_mtp=True)


def test_a_class_that_builds_no_mtp_layers(tmp_path: Path) -> None:
    """As Qwen3.5's and Qwen3-Next's files are: a sentence, and a save keeps the tensors."""
    from support.forge import forge

    forged = forge("qwen3_5_moe", "FP8_DYNAMIC", tmp_path / "in")
    file = tmp_path / "in/model.safetensors"
    state = load_file(file)
    more = {"mtp.fc.weight": torch.randn(16, 32).to(FP8), "mtp.fc.weight_scale": torch.ones(16, 1, dtype=torch.bfloat16),
            "mtp.norm.weight": torch.ones(16, dtype=torch.bfloat16)}  # fmt: skip
    save_file(state | more, file, {"format": "pt"})
    model = ctfp8.from_pretrained(forged.folder, forged.auto_class)
    with pytest.raises(
        ctfp8.UsageError, match=r"mtp\.fc\.weight is of a layer .*\(3 tensors in all\), but transformers builds none"
    ):
        model.generate(IDS, **GREEDY, use_mtp=True)
    ctfp8.save_pretrained(model, tmp_path / "out")
    assert_same_bits(tmp_path / "in", tmp_path / "out")
    assert look(forged.folder).mtp_fp8_weights == 1


def test_inspect_and_explain_count_them(glm: Made) -> None:
    found = look(glm.folder)
    assert found.mtp_fp8_weights == len(glm.names)
    state = load_file(glm.folder / "model.safetensors")
    assert found.mtp_bytes == sum(t.nbytes for name, t in state.items() if re.match(r"model\.layers\.[23]\.", name))
    report = ctfp8.explain(loaded(glm), (IDS,), {"use_cache": False}, "cuda:sm90")
    own = [e.name for e in (*report.rewritten, *report.kept) if e.name.startswith("mtp.")]
    assert len(own) == len(set(own)) == 2 * 10
    assert not [e for e in report.kept if e.name.startswith("mtp.")]


def test_the_table_in_the_docs_names_every_architecture() -> None:
    page = (Path(__file__).parents[2] / "docs/architectures.md").read_text()
    table = page.partition("<!-- drafts -->")[2].partition("<!-- /drafts -->")[0]
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")][1:]
    assert rows[: len(MTP_ARCHITECTURES)] == list(MTP_ARCHITECTURES)
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    for name in MTP_ARCHITECTURES:
        text = AutoConfig.for_model(name).get_text_config()
        assert hasattr(text, "num_mtp_layers"), name
    assert "step3p7" in CONFIG_MAPPING


def test_kinds_of_layers_that_a_config_does_not_say(tmp_path: Path) -> None:
    made = make_mtp("bailing_hybrid", "FP8_DYNAMIC", tmp_path)
    config = json.loads((made.folder / "config.json").read_text())
    (made.folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if "mtp_" not in k}))
    with pytest.raises(ctfp8.UsageError, match=r"cannot build the layers .* Name their kinds in config\.json"):
        mtp_layers(loaded(made))


def test_a_model_that_was_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers loaded it (dense layers: it dequantizes experts). Where its files are not known any more: a sentence, not FP8
    values as numbers."""
    spec = MTP_ARCHITECTURES["glm4_moe"]

    def dense(layers: int) -> Any:
        config = spec.config(layers)
        config.first_k_dense_replace = config.num_hidden_layers
        return config

    monkeypatch.setitem(MTP_ARCHITECTURES, "dense", replace(spec, config=dense))
    made = make_mtp("dense", "FP8_DYNAMIC", tmp_path)
    assert torch.equal((whole := loaded(made)).generate(IDS, **GREEDY, use_mtp=True), whole.generate(IDS, **GREEDY))
    model = ctfp8.prepare(made.auto_class.from_pretrained(made.folder, dtype=torch.float32))
    assert sorted(fp8_sources(mtp_layers(model))) == sorted(made.names)
    assert torch.equal(model.generate(IDS, **GREEDY, use_mtp=True), whole.generate(IDS, **GREEDY))
    stock = made.auto_class.from_pretrained(made.folder)
    stock.config._name_or_path = "nowhere"
    model = ctfp8.prepare(stock)
    with pytest.raises(ctfp8.UsageError, match=r"as ctfp8\.prepare took it over"):
        MtpModel.from_pretrained(model)
    assert model.generate(IDS, **GREEDY).shape[1] == IDS.shape[1] + 12
