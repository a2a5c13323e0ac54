"""What `ctfp8.export` writes is ATen that converters to other runtimes know: no prims, no tensor inside the graph."""

from __future__ import annotations

import pytest
import torch
from conftest import DATA, IDS, fp8_config, quantize
from support.programs import draw
from torch import nn
from torch.export import Dim

import ctfp8_compile as ctfp8
from ctfp8_compile.compat import OpOverload

TARGETS = ["cpu", "cuda:sm90", "cuda:sm89+scaled_mm", "cuda:sm80", "xpu"]


class Layers(nn.Module):
    """A table, two linears that read one input, and one behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(64, 256)
        self.one, self.two = (nn.Linear(256, 160, bias=False) for _ in range(2))
        self.out = nn.Linear(160, 64, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        return self.out(self.one(x) * self.two(x))


def _layers(strategy: str, activation: str | None) -> nn.Module:
    torch.manual_seed(0)
    model, state = Layers().bfloat16().eval(), {}
    config = fp8_config(strategy, activation)
    config["config_groups"]["group_0"]["targets"] = ["Linear", "Embedding"]
    for name, weight in model.named_parameters():
        state[name], state[f"{name}_scale"] = quantize(weight.float(), strategy)
        if activation == "tensor" and "table" not in name:
            state[name.replace("weight", "input_scale")] = torch.tensor([0.02])
    return ctfp8.load_state_dict(model, state, config)


def _program(path):
    """A file's own graph, as `torch.export.load` gives it."""
    program = torch.export.load(path)
    return program, {
        n.target for n in program.graph.nodes if n.op == "call_function" and isinstance(n.target, OpOverload)
    }


def _check(path, target, besides=()):
    program, operators = _program(path)
    assert "prims" not in {op.namespace for op in operators}
    if target == "cpu":
        assert {str(op) for op in operators if op.namespace != "aten"} == set(besides)
    assert not [
        n for n in program.graph.nodes if n.op == "get_attr"
    ]  # each tensor is a parameter, a buffer or a constant
    return program


@pytest.mark.quick("cpu", "mx-mx-cuda:sm90", "channel-token-xpu")
@pytest.mark.ci("cuda:sm90")
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("strategy", "activation"),
    [("channel", "token"), ("channel", None), ("tensor", "tensor"), ("block", "group"), ("mx", "mx")],
)
def test_every_scheme_and_target(strategy, activation, target, tmp_path):
    model = _layers(strategy, activation)
    shapes = {"ids": {0: Dim("batch"), 1: Dim("tokens")}}
    ctfp8.export(model, (IDS,), path=tmp_path / "m.pt2", target=target, dynamic_shapes=shapes)
    program = _check(tmp_path / "m.pt2", target)
    assert torch.float8_e4m3fn in {p.dtype for p in program.state_dict.values()}
    if target == "cpu":
        assert torch.equal(program.module()(IDS[:1]), model(IDS[:1]))
        assert torch.allclose(ctfp8.load(tmp_path / "m.pt2")(IDS[:1]), model(IDS[:1]), atol=0.02, rtol=0.05)


@pytest.mark.quick(0, 3)
@pytest.mark.parametrize("seed", range(6))
def test_forms_of_matmuls_that_rules_know_or_do_not(seed, tmp_path):
    case = draw(seed)
    ctfp8.export(case.module, case.inputs(3), path=tmp_path / "m.pt2", target="cpu")
    program = _check(tmp_path / "m.pt2", "cpu")
    assert torch.equal(program.module()(*case.inputs(3)), case.module(*case.inputs(3)))


@pytest.mark.quick("fp8")
@pytest.mark.parametrize("cache", ["auto", "fp8"])
def test_a_decoder_with_its_cache(cache, tmp_path):
    """An FP8 cache waits, under its marker, for the attention of the machine that loads the file."""
    model = ctfp8.from_pretrained(DATA / "llama/FP8_DYNAMIC")
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    decoder = ctfp8.StaticCacheDecoder(model, 1, 24, dtype=cache)
    shapes = ({1: Dim("tokens", max=24)}, None)
    ctfp8.export(decoder, (IDS[:1, :8], torch.tensor(0)), path=tmp_path / "m.pt2", dynamic_shapes=shapes)
    _check(tmp_path / "m.pt2", "cpu", ["ctfp8.cached.default"] if cache == "fp8" else [])
