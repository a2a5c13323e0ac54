"""Whole checkpoints whose config contradicts their files, or says nothing: the same logits, one warning, saved as they were."""

from __future__ import annotations

import json
import shutil
import warnings

import pytest
import torch
from conftest import DATA, assert_same_bits, logits
from safetensors.torch import load_file, save_file

import ctfp8_compile as ctfp8
from ctfp8_compile.checkpoint.contents import look
from ctfp8_compile.model.parametrization import quantized_parameters

Q = "model.layers.0.self_attn.q_proj"


def _folder(tmp_path, name, change):
    folder = tmp_path / "in"
    shutil.copytree(DATA / name, folder)
    state, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    change(state, config)
    save_file({n: t.contiguous() for n, t in state.items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _quantization(**fields):
    return lambda state, config: config["quantization_config"].update(fields)


def _weights(**fields):
    return lambda state, config: config["quantization_config"]["config_groups"]["group_0"]["weights"].update(fields)


def _targets(*targets):
    return lambda state, config: config["quantization_config"]["config_groups"]["group_0"].update(targets=list(targets))


def _spell_inverse(state, config):
    for name in [n for n in state if n.endswith("weight_scale")]:
        state[name + "_inv"] = state.pop(name)


def _reshape(*shape):
    def change(state, config):
        for name in [n for n in state if n.endswith("weight_scale")]:
            state[name] = state[name].reshape(shape)

    return change


def _as_fp8(**fields):
    def change(state, config):
        config["quantization_config"] = {"quant_method": "fp8", **fields}

    return change


def _legacy(state, config):
    config["compression_config"] = {"quantization_config": config.pop("quantization_config")}


def _flat_legacy(state, config):
    config["compression_config"] = config.pop("quantization_config")


def _extra(**tensors):
    return lambda state, config: state.update({f"{Q}.{leaf}": tensor for leaf, tensor in tensors.items()})


def _without(leaf):
    return lambda state, config: [state.pop(n) for n in list(state) if n.endswith(leaf)]


DYNAMIC, BLOCK, STATIC, MX = "llama/FP8_DYNAMIC", "llama/FP8_BLOCK", "llama/FP8", "llama/MXFP8"


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        (DYNAMIC, _quantization(ignore=["lm_head", "re:.*q_proj"]), "leaves it out"),
        (BLOCK, _quantization(ignore=["re:.*self_attn.*"]), "leaves it out"),
        ("qwen3moe/FP8_BLOCK", _quantization(ignore=["re:.*experts.*", "lm_head"]), "leaves it out"),
        (DYNAMIC, _targets("re:.*mlp.*"), "nothing of it"),
        (DYNAMIC, _targets("re:.*qkv_proj$", "re:.*gate_up_proj$", "re:.*(o|down)_proj$"), ""),
        (DYNAMIC, _weights(num_bits=4, type="int", strategy="group", group_size=32), "says other weights"),
        (DYNAMIC, _weights(strategy="tensor"), "the shape of the scale channel"),
        (BLOCK, _weights(block_structure=[64, 64]), "the shape of the scale block 128x128"),
        (BLOCK, _weights(block_structure=None, strategy="channel"), "the shape of the scale block 128x128"),
        (STATIC, _weights(strategy="channel"), "the shape of the scale tensor"),
        (MX, _weights(scale_dtype=None), ""),
        (DYNAMIC, _spell_inverse, ""),
        (DYNAMIC, _reshape(-1), ""),
        (DYNAMIC, _reshape(1, -1), ""),
        (STATIC, _reshape(), ""),
        (DYNAMIC, _as_fp8(), "the shape of the scale channel"),
        (BLOCK, _as_fp8(), "the shape of the scale block 128x128"),
        (STATIC, _as_fp8(activation_scheme="static"), ""),
        (BLOCK, _as_fp8(weight_block_size=[128.0, 128.0], fmt=None, modules_to_not_convert=["proj", "*gate"]), "leaves it out"),
        (DYNAMIC, _legacy, ""),
        (BLOCK, _flat_legacy, ""),
        (DYNAMIC, _extra(input_scale=torch.ones(1), output_scale=torch.ones(1)), "superfluous, its scheme uses none"),
        (DYNAMIC, _extra(weight_zero_point=torch.zeros(128, 1, dtype=torch.int8)), "superfluous"),
        (DYNAMIC, lambda s, c: s.update({"lm_head.weight_scale": torch.ones(1)}), "its weight is BF16 in the file"),
        (DYNAMIC, lambda s, c: s.update({"model.layers.5.mlp.up_proj.weight_scale": torch.ones(1)}), "there is no such weight"),
        (STATIC, _without("input_scale"), "no input_scale"),
        (STATIC, lambda s, c: s.pop(f"{Q}.input_scale"), "no input_scale"),
    ],
)  # fmt: skip
def test_the_file_decides(name, change, said, load, tmp_path):
    folder = _folder(tmp_path, name, change)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = ctfp8.from_pretrained(folder)
    found = [str(w.message) for w in caught if "read as its files say" in str(w.message)]
    assert len(found) == bool(said)
    assert said in "".join(found)
    assert torch.equal(logits(model), logits(load(name)))
    ctfp8.save_pretrained(model, tmp_path / "out")
    assert_same_bits(folder, tmp_path / "out")
    assert torch.equal(logits(ctfp8.from_pretrained(tmp_path / "out")), logits(load(name)))
    seen = look(folder)
    assert seen.fp8_bytes == look(DATA / name).fp8_bytes
    assert not [row.what for row in seen.rows if row.fp8 and "weights, " not in row.what]
    if said:
        with pytest.raises(ctfp8.SchemeError, match="do not fit each other.*Leave out strict=True"):
            ctfp8.from_pretrained(folder, strict=True)


def test_what_the_config_says_of_inputs_counts_where_it_only_leaves_a_layer_out(tmp_path):
    folder = _folder(tmp_path, DYNAMIC, _quantization(ignore=["lm_head", "re:.*q_proj"]))
    model = ctfp8.from_pretrained(folder)
    assert {str(d.info.scheme) for _, _, d in quantized_parameters(model)} == {"channel weights, token activations"}
    folder = _folder(tmp_path / "other", DYNAMIC, _targets("re:.*mlp.*"))
    schemes = {n: str(d.info.scheme) for n, _, d in quantized_parameters(ctfp8.from_pretrained(folder))}
    assert schemes[f"{Q}.weight"] == "channel weights, none activations"


@pytest.mark.parametrize("name", [DYNAMIC, BLOCK, STATIC, MX, "qwen3moe/FP8_BLOCK"])
def test_a_file_without_a_config(name, load, tmp_path):
    """The shapes of its scales say how it is quantized, or the user does."""
    folder = _folder(tmp_path, name, lambda s, c: c.pop("quantization_config"))
    with pytest.warns(UserWarning, match="no quantization_config was given; the shapes of scales say"):
        model = ctfp8.from_pretrained(folder)
    assert torch.equal(logits(model), logits(load(name)))
    ctfp8.save_pretrained(model, tmp_path / "out")
    assert_same_bits(folder, tmp_path / "out")
    own = json.loads((DATA / name / "config.json").read_text())["quantization_config"]
    model = ctfp8.from_pretrained(folder, quantization_config=own)
    schemes = [[str(d.info.scheme) for _, _, d in quantized_parameters(m)] for m in (model, load(name))]
    assert schemes[0] == schemes[1]
    with pytest.raises(ctfp8.SchemeError, match="has a quantization_config, so do not pass one"):
        ctfp8.from_pretrained(DATA / name, quantization_config=own)
