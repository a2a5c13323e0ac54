"""Some experts of a merged parameter are what the whole one has of them, names, weights and scales."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import DATA

import ctfp8_compile as ctfp8
from ctfp8_compile.model.experts import of_experts, runs_of_experts
from ctfp8_compile.model.parametrization import Dequantize, quantized_parameters, stored_weight


@pytest.fixture(params=["qwen3moe/FP8_DYNAMIC", "qwen3moe/FP8_BLOCK", "qwen3moe/FP8", "mixtral/FP8"])
def merged(request):
    model = ctfp8.from_pretrained(DATA / request.param)
    found = [(stored_weight(owner, name.rpartition(".")[2]), how) for name, owner, how in quantized_parameters(model)]
    return [(weight, how) for weight, how in found if weight.dim() == 3]


@pytest.mark.parametrize("at_once", [1, 2, 3, 100])
def test_runs(merged, at_once):
    assert merged
    for weight, how in merged:
        info = how.info
        runs = runs_of_experts(info, at_once * weight[0].numel())
        assert [e for run in runs for e in run] == list(range(len(weight)))
        assert max(map(len, runs)) == min(at_once, len(weight))
        names: list[str] = []
        for run in runs:
            some, here = of_experts(info, run), slice(run.start, run.stop)
            static = None if how.input_scale is None else how.input_scale[here]
            part = Dequantize(some, how.weight_scale[here], static)
            assert some.layout.shape == (len(run), *weight.shape[1:])
            names += some.names.values()
            for source in some.names:
                own, want = some.layout.split_weight(weight[here], source), info.layout.split_weight(weight, source)
                assert torch.equal(own.view(torch.uint8), want.view(torch.uint8))
                assert torch.equal(
                    some.stored_scale(source, part.weight_scale), info.stored_scale(source, how.weight_scale)
                )
                if static is not None:
                    assert torch.equal(part.static_scale(source), how.static_scale(source))
        assert sorted(names) == sorted(info.names.values())


def test_runs_of_little(merged):
    _, how = merged[0]
    assert max(map(len, runs_of_experts(how.info, 1))) == 1


def test_experts_that_cannot_be_told_apart(merged):
    """One tensor of the file, or one scale, is of several."""
    _, how = merged[0]
    info = how.info
    shared = {source: replace(scale, name="all.weight_scale") for source, scale in info.scales.items()}
    assert runs_of_experts(replace(info, scales=shared), 1) == []
    assert runs_of_experts(replace(info, names=dict.fromkeys(info.names, "experts.weight")), 1) == []


def test_a_linear_has_none():
    model = ctfp8.from_pretrained(DATA / "llama/FP8_DYNAMIC")
    assert not [name for name, _, how in quantized_parameters(model) if runs_of_experts(how.info, 1)]
