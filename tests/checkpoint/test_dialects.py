"""Checkpoints in every dialect of FP8: the same logits as in compressed-tensors' words, and saved as they were read."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import CHECKPOINTS, DATA, FP8_PARAMETERS, logits
from safetensors.torch import load_file
from support.dialects import DIALECTS, respell

import ctfp8_compile as ctfp8
from ctfp8_compile.model.parametrization import quantized_parameters

CASES = [(name, dialect) for name in CHECKPOINTS for dialect in DIALECTS[name.split("/")[1]]]


@pytest.mark.parametrize(("name", "dialect"), CASES)
def test_a_renamed_checkpoint_gives_the_same_logits_and_is_saved_as_it_was(name, dialect, load, tmp_path):
    folder = respell(DATA / name, tmp_path / "in", dialect)
    model = ctfp8.from_pretrained(folder)
    assert len(list(quantized_parameters(model))) == FP8_PARAMETERS[name.split("/")[0]]
    assert torch.equal(logits(model), logits(load(name)))
    ctfp8.save_pretrained(model, tmp_path / "out")
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert (tensor.dtype, tensor.shape) == (after[key].dtype, after[key].shape), key
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), after[key].reshape(-1).view(torch.uint8)), key
    for file in ("config.json", "hf_quant_config.json"):
        if (folder / file).exists():
            was, now = (json.loads((at / file).read_text()) for at in (folder, tmp_path / "out"))
            quantization = "quantization_config" if file == "config.json" else "quantization"
            assert was.get(quantization) == now.get(quantization)
