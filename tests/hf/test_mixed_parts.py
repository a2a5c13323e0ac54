"""Experts of one parameter that are stored in different ways: FP8 and plain, FP8 of two schemes, FP8 and INT4."""

from __future__ import annotations

import json
import re
import shutil
import warnings

import pytest
import torch
from conftest import DATA, FP8_PARAMETERS, IDS, assert_same_bits, logits, quantize, relative_error
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import ctfp8_compile as ctfp8
from ctfp8_compile.checkpoint.contents import look
from ctfp8_compile.model.parametrization import quantized_parameters
from ctfp8_compile.ops import FP8

LAYER = re.compile(r"model\.layers\.0\.(mlp|block_sparse_moe)\.experts")
#: transformers knows Mixtral's experts by their first names only.
FIRST_NAMES = (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2"))


def _value(state, name):
    """FP8 value × scale, float32, of per-channel, per-tensor and 128 x 128 scales."""
    weight, scale = state[name].float(), state[name + "_scale"].float()
    if scale.numel() > 1 and scale.shape[-1] * scale.shape[0] != weight.shape[0]:
        rows, cols = weight.shape
        scale = scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :cols]
    return weight * scale


def _first(name):
    for ours, theirs in FIRST_NAMES if "block_sparse_moe" in name else ():
        name = name.replace(ours, theirs)
    return name


def made(tmp_path, name, change):
    """The checkpoint with other parts, and transformers' own model with the same weights dequantized, float32."""
    folder = tmp_path / "in"
    shutil.copytree(DATA / name, folder)
    state, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    change(state, config["quantization_config"])
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    plain = {}
    for key, tensor in state.items():
        if tensor.dtype in (FP8, torch.int8):
            plain[_first(key)] = _value(state, key)
        elif not key.endswith(("_scale", "_zero_point")):
            plain[_first(key)] = tensor.float()
    shutil.copytree(folder, tmp_path / "plain")
    save_file(plain, tmp_path / "plain" / "model.safetensors", {"format": "pt"})
    config.pop("quantization_config")
    (tmp_path / "plain" / "config.json").write_text(json.dumps(config))
    return folder, AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32).eval()


def _names(state, *ends):
    return [n for n in state if LAYER.match(n) and n.endswith(tuple(f"{end}.weight" for end in ends))]


def _plainly(state, names):
    for name in names:
        state[name] = _value(state, name).bfloat16()
        state.pop(name + "_scale")
        state.pop(name.replace("weight", "input_scale"), None)


def _some_experts(state, config):
    _plainly(state, _names(state, "experts.1.gate_proj", "experts.1.up_proj", "experts.1.down_proj"))


def _gates(state, config):
    _plainly(state, _names(state, "gate_proj"))


def _one_matrix(state, config):
    _plainly(state, _names(state, "experts.2.down_proj"))


def _dequantized_with_scale(state, config):
    for name in _names(state, "experts.1.gate_proj", "experts.1.up_proj", "experts.1.down_proj"):
        state[name] = _value(state, name).bfloat16()


def _again(state, names, strategy):
    for name in names:
        state[name], state[name + "_scale"] = quantize(_value(state, name), strategy)


def _int8(state, config):
    for name in (names := _names(state, "gate_proj", "experts.2.down_proj")):
        value = _value(state, name)
        scale = value.abs().amax(1, keepdim=True) / 127
        state[name], state[name + "_scale"] = (value / scale).round().to(torch.int8), scale
        state.pop(name.replace("weight", "input_scale"), None)
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    targets = [name.removesuffix(".weight") for name in names]
    config["config_groups"]["int8"] = {"targets": targets, "weights": weights, "format": "int-quantized"}
    config["config_groups"]["group_0"]["format"] = "float-quantized"
    config["format"] = "mixed-precision"


def _per_tensor(state, config):
    _again(state, _names(state, "experts.1.gate_proj", "experts.3.down_proj"), "tensor")


def _in_blocks(state, config):
    _again(state, _names(state, "up_proj"), "block")


def _per_channel(state, config):
    _again(state, _names(state, "experts.0.up_proj", "experts.0.gate_proj"), "channel")


@pytest.mark.parametrize("name", ["qwen3moe/FP8_DYNAMIC", "qwen3moe/FP8_BLOCK", "qwen3moe/FP8", "mixtral/FP8_DYNAMIC"])
@pytest.mark.parametrize(
    ("change", "plain"),
    [
        (_some_experts, 2), (_gates, 1), (_one_matrix, 1), (_dequantized_with_scale, 2), (_int8, 2), (_per_tensor, 0), (_in_blocks, 0),
        (_per_channel, 0),
    ],
)  # fmt: skip
def test_parts_that_differ(name, change, plain, tmp_path):
    folder, reference = made(tmp_path, name, change)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = ctfp8.from_pretrained(folder, dtype=torch.float32)
    said = [str(w.message) for w in caught]
    found = [n for n, _, _ in quantized_parameters(model)]
    assert relative_error(logits(model), logits(reference)) < 1e-6
    assert len(found) == FP8_PARAMETERS[name.split("/")[0]] - plain
    assert sum("made of tensors that are stored in different ways" in s for s in said) == bool(plain)
    if plain:
        experts = model.model.layers[0].mlp.experts
        assert (experts.gate_up_proj if change is not _one_matrix else experts.down_proj).dtype == torch.float32
    ctfp8.save_pretrained(ctfp8.from_pretrained(folder), tmp_path / "out")
    assert_same_bits(folder, tmp_path / "out")
    assert look(folder).fp8_bytes < look(DATA / name).fp8_bytes or not plain


def test_a_damaged_part_is_named(tmp_path):
    def change(state, config):
        _plainly(state, _names(state, "experts.1.gate_proj"))
        state[_names(state, "experts.2.gate_proj")[0]].view(torch.uint8)[3, 5] = 0x7F

    with pytest.raises(ctfp8.CheckpointError, match=r"experts\.2\.gate_proj\.weight: holds NaN.*quantize it again"):
        ctfp8.from_pretrained(made(tmp_path, "qwen3moe/FP8_DYNAMIC", change)[0])


@pytest.mark.quick("_some_experts")
@pytest.mark.parametrize("change", [_some_experts, _in_blocks])
def test_a_compiled_model(change, tmp_path):
    folder, reference = made(tmp_path, "qwen3moe/FP8_DYNAMIC", change)
    model = ctfp8.from_pretrained(folder)
    with torch.no_grad():
        got = torch.compile(model, backend="ctfp8", fullgraph=True)(IDS, use_cache=False).logits
    assert relative_error(got, logits(reference)) < 0.03


def test_strict_refuses_and_a_dequantized_model_is_plain(tmp_path):
    folder, reference = made(tmp_path, "qwen3moe/FP8_DYNAMIC", _some_experts)
    with pytest.raises(ctfp8.SchemeError, match="stored in different ways.*strict=True refuses that"):
        ctfp8.from_pretrained(folder, strict=True)
    plain = ctfp8.from_pretrained(folder, dtype=torch.float32, dequantize=True)
    assert relative_error(logits(plain), logits(reference)) < 1e-6
    assert not list(quantized_parameters(plain))


def test_a_changed_parameter_is_not_saved_as_if_it_were_not(tmp_path):
    folder, _ = made(tmp_path, "qwen3moe/FP8_DYNAMIC", _some_experts)
    model = ctfp8.from_pretrained(folder)
    model.model.layers[0].mlp.experts.down_proj.data[0, 0, 0] += 1
    with pytest.raises(ctfp8.UsageError, match="experts.down_proj was dequantized and has changed since"):
        ctfp8.save_pretrained(model, tmp_path / "out")


@pytest.mark.parametrize("some", [("experts.1.",), ("experts.0.", "experts.3.")])
def test_experts_that_calibration_never_saw(some, tmp_path):
    """No static scale of their inputs: those of that parameter are quantized by token."""

    def change(state, config):
        for name in [n for n in state if LAYER.match(n) and n.endswith("input_scale") and any(s in n for s in some)]:
            del state[name]

    folder, reference = made(tmp_path, "qwen3moe/FP8", change)
    with pytest.warns(UserWarning, match="no input_scale, which the scheme wants") as caught:
        model = ctfp8.from_pretrained(folder, dtype=torch.float32)
    assert sum("read as its files say" in str(w.message) for w in caught) == 1
    assert relative_error(logits(model), logits(reference)) < 1e-6
    schemes = {n: d.info.scheme.activation for n, _, d in quantized_parameters(model) if ".experts." in n}
    assert schemes == {n: "token" if "layers.0" in n else "tensor" for n in schemes}
    ctfp8.save_pretrained(ctfp8.from_pretrained(folder), tmp_path / "out")
    assert_same_bits(folder, tmp_path / "out")
