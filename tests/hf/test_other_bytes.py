"""FP8 files that other tools wrote back in other dtypes: one sentence each, whose cure gives the model's own weights."""

from __future__ import annotations

import shutil

import pytest
import torch
from conftest import DATA
from safetensors.torch import load_file, save_file

import ctfp8_compile as ctfp8
from ctfp8_compile.ops import FP8

SOURCE = DATA / "llama/FP8_DYNAMIC"
NORM = "model.layers.0.input_layernorm.weight"


def _changed(folder, change):
    shutil.copytree(SOURCE, folder)
    state = {name: change(name, tensor) for name, tensor in load_file(SOURCE / "model.safetensors").items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


def _weights(change):
    return lambda name, t: change(t).contiguous() if t.dtype == FP8 else t


@pytest.mark.parametrize(
    ("change", "cure", "message"),
    [
        (_weights(lambda t: t.float().clamp(-240, 240).to(torch.float8_e4m3fnuz)),
         lambda name, t: t.float().to(FP8) if t.dtype == torch.float8_e4m3fnuz else t,
         "AMD's MI300.*Store it as float8_e4m3fn"),
        (_weights(lambda t: t.view(torch.uint8)), lambda name, t: t.view(FP8) if t.dtype == torch.uint8 else t,
         r"bytes, where group 'group_0'.*x\.view\(torch\.float8_e4m3fn\)"),
        (lambda name, t: t.to(FP8) if name == NORM else t, lambda name, t: t.bfloat16() if name == NORM else t,
         "input_layernorm.weight .*FP8, and a vector.*Store it as the original model has it"),
    ],
    ids=["FNUZ", "U8", "FP8 norm"],
)  # fmt: skip
def test_the_cure_works(change, cure, message, tmp_path):
    with pytest.raises((ctfp8.CheckpointError, ctfp8.SchemeError), match=message):
        ctfp8.from_pretrained(_changed(tmp_path / "as-written", change))
    cured = ctfp8.from_pretrained(_changed(tmp_path / "cured", lambda name, t: cure(name, change(name, t))))
    weight = load_file(SOURCE / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"].float().clamp(-240, 240)
    stored = cured.model.layers[0].self_attn.q_proj.parametrizations.weight.original.float()
    clamped = stored.clamp(-240, 240)
    assert (clamped - weight).abs().max() <= 2**-10


def test_fnuz_rounds_only_small_numbers():
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fnuz).float()
    every = every[every.isfinite()]
    again = every.to(FP8).float()
    assert torch.equal(again[every.abs() >= 2**-6], every[every.abs() >= 2**-6])
    assert (again - every).abs().max() <= 2**-10
