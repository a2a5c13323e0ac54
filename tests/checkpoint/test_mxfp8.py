"""MXFP8: weights with a byte for each 32 of them, from real llm-compressor checkpoints, kept as stored, bit-exact."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from conftest import DATA, FP8_PARAMETERS, IDS, logits, relative_error
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import ctfp8_compile as ctfp8
from ctfp8_compile.checkpoint.contents import look
from ctfp8_compile.model.parametrization import quantized_parameters

NAMES = ["llama/MXFP8", "qwen3moe/MXFP8"]


def _truth(name):
    """By checkpoint name, what compressed-tensors itself dequantizes a weight to."""
    config = json.loads((DATA / name / "config.json").read_text())["quantization_config"]
    scheme = QuantizationConfig.model_validate(config).config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry("mxfp8-quantized")
    state = load_file(DATA / name / "model.safetensors")
    for key in [k for k in state if k.endswith("weight_scale")]:
        stem = key.removesuffix("weight_scale")
        pair = {leaf: state[stem + leaf] for leaf in ("weight", "weight_scale")}
        yield stem + "weight", compressor.decompress(pair, scheme)["weight"].to(torch.bfloat16)


@pytest.mark.parametrize("name", NAMES)
def test_scales_stay_bytes_and_weights_are_bit_exact(name, load):
    model = load(name)
    found = {path: dequantize for path, _, dequantize in quantized_parameters(model)}
    assert len(found) == FP8_PARAMETERS[name.split("/")[0]]
    assert {d.weight_scale.dtype for d in found.values()} == {torch.uint8}
    assert {d.info.scheme.activation for d in found.values()} == {"mx"}
    compared = 0
    for weight, truth in _truth(name):
        path, index, rows = weight, None, slice(None)
        if ".experts." in weight:
            stem, index, which, _ = weight.rsplit(".", 3)
            half = truth.shape[0]
            path, index = f"{stem}.{'down_proj' if which == 'down_proj' else 'gate_up_proj'}", int(index)
            rows = {"gate_proj": slice(half), "up_proj": slice(half, None)}.get(which, slice(None))
        ours = getattr(model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2])
        assert torch.equal(ours if index is None else ours[index][rows], truth), weight
        compared += 1
    assert compared >= 14


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_close_to_the_dense_twin_eager_compiled_and_exported(name, load, tmp_path):
    dense = logits(AutoModelForCausalLM.from_pretrained(DATA / name.split("/")[0] / "dense").eval())
    model = load(name)
    eager = logits(model)
    assert relative_error(eager, dense) < 0.08
    assert relative_error(logits(torch.compile(model, backend="ctfp8", fullgraph=True)), eager) < 0.01
    ctfp8.export(model, (IDS,), {"use_cache": False}, path=tmp_path / "m.pt2")
    with torch.no_grad():
        out = ctfp8.load(tmp_path / "m.pt2")(IDS, use_cache=False)
    assert relative_error(out.logits if hasattr(out, "logits") else out[0], eager) < 0.01


@pytest.mark.parametrize("name", NAMES)
def test_saving_gives_the_source_back(name, load, tmp_path):
    ctfp8.save_pretrained(load(name), tmp_path)
    before, after = load_file(DATA / name / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert (tensor.dtype, tensor.shape) == (after[key].dtype, after[key].shape), key
        assert torch.equal(tensor.view(torch.uint8), after[key].view(torch.uint8)), key
    quantization = [json.loads((p / "config.json").read_text())["quantization_config"] for p in (DATA / name, tmp_path)]
    assert quantization[0] == quantization[1]


def test_every_weight_has_a_kernel_on_cpu_and_a_reason_elsewhere(load):
    model = load("qwen3moe/MXFP8")
    args = (IDS,), {"use_cache": False}
    assert len(ctfp8.explain(model, *args, target="cpu").rewritten) == FP8_PARAMETERS["qwen3moe"]
    for target in ("cuda:sm80", "cuda:sm90", "xpu"):
        report = ctfp8.explain(model, *args, target=target)
        assert not report.rewritten
        assert all(
            "mx scales" in e.reason or "MXFP8" in e.reason or "FP8 tensor cores" in e.reason for e in report.kept
        )
    program = ctfp8.lower(load("llama/MXFP8"), *args, target="cuda:sm90")  # dequantized in plain ATen
    assert not [n for n in program.graph.nodes if "ctfp8" in str(n.target)]
    with torch.no_grad():
        out = program.module()(IDS, use_cache=False)
    assert relative_error(out.logits if hasattr(out, "logits") else out[0], logits(load("llama/MXFP8"))) < 0.01


def test_dequantize_gives_a_plain_model_and_inspect_the_scheme(load):
    assert torch.equal(
        logits(ctfp8.from_pretrained(DATA / "llama/MXFP8", dequantize=True)), logits(load("llama/MXFP8"))
    )
    assert "group 1x32 power-of-two weights, mx activations" in look(DATA / "llama/MXFP8").schemes


def _edited(tmp_path, change):
    folder = tmp_path / "edited"
    shutil.copytree(DATA / "llama/MXFP8", folder)
    state, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    change(state, config["quantization_config"]["config_groups"]["group_0"])
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_weights_alone_may_be_mxfp8(tmp_path, load):
    folder = _edited(tmp_path, lambda state, group: group.update(input_activations=None))
    model = ctfp8.from_pretrained(folder)
    assert {d.info.scheme.activation for _, _, d in quantized_parameters(model)} == {"none"}
    assert torch.equal(logits(model), logits(load("llama/MXFP8")))


SCALE = "model.layers.1.mlp.up_proj.weight_scale"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda s, g: s[SCALE][3].fill_(255), "up_proj.weight_scale .*scale nan"),
        (lambda s, g: s[SCALE][3].fill_(254), "finite and positive"),
        (lambda s, g: s[SCALE].copy_(254 - s[SCALE]), "look like the reciprocals"),
        (lambda s, g: s.update({SCALE: s[SCALE][:, :2].contiguous()}), "only goes with MXFP8"),
        (lambda s, g: g["input_activations"].update(group_size=64), "activation strategy 'group'"),
    ],
)
def test_what_is_wrong_is_said(change, sentence, tmp_path):
    with pytest.raises((ctfp8.CheckpointError, ctfp8.SchemeError), match=sentence):
        ctfp8.from_pretrained(_edited(tmp_path, change))


def test_scales_of_a_quantized_cache_are_kept(tmp_path):
    with pytest.warns(UserWarning, match="calibrated for a quantized KV cache"):
        model = ctfp8.from_pretrained(DATA / "llama/FP8_DYNAMIC_KV")
    ctfp8.save_pretrained(model, tmp_path)
    before = load_file(DATA / "llama/FP8_DYNAMIC_KV/model.safetensors")
    after = load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(t.view(torch.uint8), after[k].view(torch.uint8)) for k, t in before.items())
