"""A cast is refused before anything of what it was asked for is cast: of a model, of any part of it, of an artifact."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import DATA, fp8_config, quantize
from torch import nn

import ctfp8_compile as ctfp8
from ctfp8_compile.model.freeze import dequantize_

CASTS = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "double": lambda m: m.double(),
    "to(dtype)": lambda m: m.to(torch.float16),
    "to(device, dtype)": lambda m: m.to("cpu", torch.float16),
    "type": lambda m: m.type(torch.float16),
}


class Nested(nn.Module):
    """What is not FP8 comes first, so that a cast meets it before the weight."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.block = nn.ModuleDict(
            {"norm": nn.LayerNorm(32), "inner": nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))}
        )
        self.head = nn.Linear(32, 8)

    def forward(self, x):
        return self.head(self.block["inner"](self.block["norm"](self.norm(x))))


def nested():
    state = dict(Nested().state_dict())
    state["block.inner.1.weight"], state["block.inner.1.weight_scale"] = quantize(
        state["block.inner.1.weight"], "channel"
    )
    return ctfp8.load_state_dict(Nested(), state, fp8_config())


def dtypes(module):
    return {name: tensor.dtype for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("part", ["", "block", "block.inner", "block.inner.1"])
@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("made", [nested, lambda: copy.deepcopy(nested())], ids=["loaded", "copied"])
def test_a_part_is_refused_whole(part, cast, made):
    model = made()
    before = dtypes(model)
    with pytest.raises(ctfp8.UsageError, match="this model holds float8_e4m3fn weights"):
        CASTS[cast](model.get_submodule(part))
    assert dtypes(model) == before


@pytest.mark.parametrize("cast", CASTS)
def test_what_holds_no_fp8_weight_is_cast(cast):
    model = nested()
    CASTS[cast](model.head)
    assert model.head.weight.dtype != torch.float32
    assert model.block["norm"].weight.dtype == torch.float32
    CASTS[cast](dequantize_(model).block)
    assert model.block["inner"][1].weight.dtype == model.head.weight.dtype


def test_a_layer_of_a_transformers_model():
    model = ctfp8.from_pretrained(DATA / "llama/FP8_DYNAMIC")
    before = dtypes(model)
    for layer in (model.model, model.model.layers[0], model.model.layers[0].self_attn):
        with pytest.raises(ctfp8.UsageError, match="changing its dtype"):
            layer.to(torch.float32)
    assert dtypes(model) == before
    model.model.layers[0].to("cpu")


@pytest.mark.parametrize("cast", CASTS)
def test_an_artifact(cast, tmp_path):
    model, x = nested(), torch.randn(3, 32)
    ctfp8.export(model, (x,), path=tmp_path / "m.pt2")
    artifact = ctfp8.load(tmp_path / "m.pt2")
    want = artifact(x)
    with pytest.raises(ctfp8.UsageError, match="the dtypes of an artifact's weights and scales are part of its graph"):
        CASTS[cast](nn.Sequential(artifact)[0])
    with pytest.raises(ctfp8.UsageError, match=r"loaded for cpu.*ctfp8.load\(path, device='meta'\)"):
        artifact.to("meta")
    assert torch.equal(artifact.to("cpu")(x), want)
