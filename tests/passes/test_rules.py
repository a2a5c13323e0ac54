"""Rules: every form in which tracers write a linear or an expert matmul is found, and nothing else is."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import fp8_config, quantize, relative_error
from expecttest import TestCase
from torch import nn

import ctfp8_compile as ctfp8
from ctfp8_compile import lowering
from ctfp8_compile.graph import format_graph, is_marker
from ctfp8_compile.lowering.kernel import KINDS, SCALINGS, Problem, choose
from ctfp8_compile.target import Target

T = torch.bfloat16


pytestmark = pytest.mark.usefixtures("kernel_everywhere")


class Linears(nn.Module):
    def __init__(self, run, bias=True):
        super().__init__()
        self.a = nn.Linear(32, 16, bias=bias, dtype=T)
        self.run = run

    def forward(self, *args):
        return self.run(self.a, *args)


def _loaded(module, strategy="channel"):
    torch.manual_seed(0)
    state = {}
    for name, tensor in module.state_dict().items():
        state[name] = torch.randn_like(tensor)
        if name.endswith("weight"):
            state[name], state[name + "_scale"] = quantize(torch.randn(tensor.shape) * 0.1, strategy)
    return ctfp8.load_state_dict(module, state, fp8_config(strategy))


def _both_ways(module, *args, dynamic=None):
    """Compiles and exports; checks values against eager and returns the two reports."""
    want = module(*args)
    got = torch.compile(module, backend="ctfp8", fullgraph=True, dynamic=dynamic)(*args)
    assert got.shape == want.shape
    assert not want.numel() or relative_error(got, want) < 0.01
    compiled = ctfp8.compiled_reports()[-1]
    program = ctfp8.lower(module, args)
    assert not any(is_marker(n) for n in program.graph.nodes)
    got = program.module()(*args)
    assert got.shape == want.shape
    assert not want.numel() or relative_error(got, want) < 0.01
    return compiled, ctfp8.explain(module, args)


FORMS = {
    "one row": (lambda a, x: a(x), (32,)),
    "matrix": (lambda a, x: a(x), (4, 32)),
    "batch": (lambda a, x: a(x), (2, 4, 32)),
    "rank 4": (lambda a, x: a(x), (2, 3, 4, 32)),
    "not contiguous": (lambda a, x: a(x.transpose(0, 1)), (2, 4, 32)),
    "not contiguous, rank 4": (lambda a, x: a(x.transpose(1, 2)), (2, 3, 4, 32)),
    "matmul with weight.t()": (lambda a, x: x @ a.weight.t(), (4, 32)),
    "addmm": (lambda a, x: torch.addmm(torch.ones(16, dtype=T), x, a.weight.t()), (4, 32)),
    "no rows": (lambda a, x: a(x), (0, 32)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", [True, False])
def test_every_form_of_a_linear(form, bias):
    run, shape = FORMS[form]
    for report in _both_ways(_loaded(Linears(run, bias)), torch.randn(shape, dtype=T)):
        assert [(e.name, e.rule, e.shape) for e in report.rewritten] == [("a.weight", "linear", (16, 32))]
        assert not report.kept


@pytest.mark.parametrize("strategy", ["tensor", "channel", "block"])
def test_every_weight_strategy(strategy):
    compiled, _ = _both_ways(_loaded(Linears(lambda a, x: a(x)), strategy), torch.randn(4, 32, dtype=T))
    assert len(compiled.rewritten) == 1


def test_dynamic_shapes():
    module = _loaded(Linears(lambda a, x: a(x)))
    compiled = torch.compile(module, backend="ctfp8", fullgraph=True, dynamic=True)
    for rows in (3, 5, 17):
        x = torch.randn(2, rows, 32, dtype=T)
        assert relative_error(compiled(x), module(x)) < 0.01
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    batch = torch.export.Dim("batch", min=2, max=64)
    program = ctfp8.lower(module, (torch.randn(4, 32, dtype=T),), dynamic_shapes=(({0: batch},),))
    x = torch.randn(9, 32, dtype=T)
    assert relative_error(program.module()(x), module(x)) < 0.01


def test_a_weight_used_twice_is_one_entry():
    module = _loaded(Linears(lambda a, x: a(x) + a(x * 2)))
    for report in _both_ways(module, torch.randn(4, 32, dtype=T)):
        assert [e.uses for e in report.rewritten] == [2]


def test_a_use_no_rule_knows_stays_right_and_is_explained():
    module = _loaded(Linears(lambda a, x: a(x) * a.weight.sum()))
    for report in _both_ways(module, torch.randn(4, 32, dtype=T)):
        assert not report.rewritten
        assert [e.name for e in report.kept] == ["a.weight"]
        assert "no rule knows this use of a weight: aten.sum" in report.kept[0].reason


BROADCAST = {
    "unsqueezed": (lambda a, x: x @ a.weight.t().unsqueeze(0), (4, 32)),
    "unsqueezed twice": (lambda a, x: x @ a.weight.t()[None, None], (4, 32)),
    "expanded": (lambda a, x: x @ a.weight.t().expand(3, 32, 16), (4, 32)),
    "expanded, one row": (lambda a, x: x @ a.weight.t().expand(3, 32, 16), (32,)),
    "expanded over more than x": (lambda a, x: x @ a.weight.t().expand(3, 2, 32, 16), (2, 4, 32)),
    "expanded over a dimension of one": (lambda a, x: x @ a.weight.t().expand(3, 32, 16), (1, 4, 32)),
    "expanded as x is": (lambda a, x: x @ a.weight.t().expand(3, 32, 16), (3, 4, 32)),
    "bmm": (lambda a, x: torch.bmm(x, a.weight.t().expand(3, 32, 16)), (3, 4, 32)),
}


@pytest.mark.parametrize("form", BROADCAST)
def test_a_weight_broadcast_over_batches_gives_all_of_them(form):
    run, shape = BROADCAST[form]
    _both_ways(_loaded(Linears(run, bias=False)), torch.randn(shape, dtype=T))


@pytest.mark.parametrize("shape", [(1,), (1, 16), (4, 16), (4, 1), (1, 1), ()])
@pytest.mark.parametrize("op", ["linear", "addmm"])
def test_a_bias_of_any_shape_that_broadcasts(op, shape):
    class Biased(Linears):
        def __init__(self):
            super().__init__(None)
            self.b = nn.Parameter(torch.zeros(shape, dtype=T))

        def forward(self, x):
            return F.linear(x, self.a.weight, self.b) if op == "linear" else torch.addmm(self.b, x, self.a.weight.t())

    _both_ways(_loaded(Biased()), torch.randn(4, 32, dtype=T))


def test_a_full_addend_is_not_a_bias():
    module = _loaded(Linears(lambda a, x: torch.addmm(x[:, :16], x, a.weight.t())))
    for report in _both_ways(module, torch.randn(4, 32, dtype=T)):
        assert "aten.addmm" in report.kept[0].reason


def test_a_cast_weight_is_kept_with_a_reason():
    """Under autocast the weight is cast once more, so the matmul's input is not what it dequantizes to."""
    module = _loaded(Linears(lambda a, x: F.linear(x, a.weight.to(torch.float32)), bias=False))
    report = ctfp8.explain(module, (torch.randn(4, 32),))
    assert "_to_copy" in report.kept[0].reason or "to.dtype" in report.kept[0].reason


class Experts(nn.Module):
    """The two forms transformers gives stacked experts, and a selected one."""

    def __init__(self, form):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(4, 16, 32, dtype=T))
        self.form = form

    def forward(self, x, route):
        if self.form == "grouped":
            return torch._grouped_mm(x, self.w.transpose(-2, -1), offs=route)
        if self.form == "gathered":
            return torch.bmm(self.w[route], x.unsqueeze(-1)).squeeze(-1)
        if self.form == "gathered, transposed":
            return torch.bmm(x.unsqueeze(1), self.w.transpose(-2, -1)[route]).squeeze(1)
        return F.linear(x, self.w[2])


def _experts(form):
    torch.manual_seed(0)
    parts = [quantize(torch.randn(16, 32) * 0.1) for _ in range(4)]
    state = {"w": torch.stack([w for w, _ in parts]), "w_scale": torch.stack([s for _, s in parts])}
    return ctfp8.load_state_dict(Experts(form), state, fp8_config())


@pytest.mark.parametrize(
    ("form", "rule", "route"),
    [
        ("grouped", "grouped experts", torch.tensor([3, 3, 8, 10], dtype=torch.int32)),
        ("gathered", "gathered experts", torch.randint(4, (10,), generator=torch.Generator().manual_seed(0))),
        ("gathered, transposed", "gathered experts", torch.randint(4, (10,))),
        ("selected", "linear", torch.zeros(1)),
    ],
)
def test_experts(form, rule, route):
    for report in _both_ways(_experts(form), torch.randn(10, 32, dtype=T), route):
        assert [(e.name, e.rule) for e in report.rewritten] == [("w", rule)]
        assert not report.kept


def test_gate_sentences_reach_the_report(monkeypatch):
    sentence = "K is not a multiple of 16"
    monkeypatch.setattr(lowering.cpu.FusedDequantizeMatmul, "supports", lambda *a: lowering.no(sentence))
    for report in _both_ways(_loaded(Linears(lambda a, x: a(x))), torch.randn(4, 32, dtype=T)):
        assert [(e.name, e.rule, e.reason) for e in report.kept] == [("a.weight", "linear", sentence)]


def test_choose_collects_the_sentences_of_all_kernels():
    class No:
        kinds, scalings = KINDS, SCALINGS

        def __init__(self, why):
            self.why = why

        def supports(self, problem, target):
            return lowering.no(self.why)

        def preferred(self, problem, target):
            return self.why == "b"

    problem = Problem("linear", T, (4, 32), (16, 32), (1, 32), "token", False)
    assert choose((No("a"), No("b"), No("a")), problem, Target("cpu")) == (
        None,
        "b; a",
    )  # what is preferred is asked first


@pytest.mark.parametrize(("cols", "block"), [(130, 128), (150, 100), (160, 128), (35, 8)])
def test_a_partial_last_block_is_right_when_compiled(cols, block):
    """Of a weight that no rule takes: Inductor's CPU code divides indices wrongly where a last block fills no vector."""
    module = nn.Module()
    module.w = nn.Parameter(torch.zeros(6, cols))
    weight, scale = quantize(torch.randn(6, cols), "block", (128, block))
    ctfp8.load_state_dict(module, {"w": weight, "w_scale": scale}, fp8_config("block", None, (128, block)))
    module.forward = lambda x: x + module.w
    x = torch.randn(6, cols)
    exact = x.double() + weight.double() * scale.double().repeat_interleave(block, 1)[:, :cols]
    assert relative_error(torch.compile(module, backend="ctfp8", fullgraph=True)(x), exact) < 1e-6


class Golden(TestCase):
    def test_linear(self):
        program = ctfp8.lower(_loaded(Linears(lambda a, x: a(x))), (torch.randn(4, 32, dtype=T),))
        self.assertExpectedInline(
            format_graph(program.graph),
            """\
%0 = placeholder : bf16[16]
%1 = placeholder : f8e4m3[16, 32]
%2 = placeholder : f32[16, 1]
%3 = placeholder : bf16[4, 32]
%4 = ctfp8.dequantized_linear(%3, %1, %2, %0, [1, 32]) : bf16[4, 16]
return [%4]""",
        )

    def test_expanded_block_scale(self):
        """A weight no rule takes: plain ATen, block scales repeated to its 160 rows and columns."""
        module = nn.Module()
        module.w = nn.Parameter(torch.zeros(160, 160, dtype=T))
        weight, scale = quantize(torch.randn(160, 160), "block")
        ctfp8.load_state_dict(module, {"w": weight, "w_scale": scale}, fp8_config("block"))
        module.forward = lambda x: x + module.w
        program = ctfp8.lower(module, (torch.randn(160, 160, dtype=T),))
        self.assertExpectedInline(
            format_graph(program.graph),
            """\
%0 = placeholder : f8e4m3[160, 160]
%1 = placeholder : f32[2, 2]
%2 = placeholder : bf16[160, 160]
%3 = slice(%1, 0, 1, 2) : f32[1, 2]
%4 = expand(%3, [32, 2]) : f32[32, 2]
%5 = slice(%1, 0, 0, 1) : f32[1, 2]
%6 = unsqueeze(%5, 1) : f32[1, 1, 2]
%7 = expand(%6, [1, 128, 2]) : f32[1, 128, 2]
%8 = clone(%7) : f32[1, 128, 2]
%9 = reshape(%8, [128, 2]) : f32[128, 2]
%10 = cat([%9, %4], 0) : f32[160, 2]
%11 = slice(%10, 1, 1, 2) : f32[160, 1]
%12 = expand(%11, [160, 32]) : f32[160, 32]
%13 = slice(%10, 1, 0, 1) : f32[160, 1]
%14 = unsqueeze(%13, 2) : f32[160, 1, 1]
%15 = expand(%14, [160, 1, 128]) : f32[160, 1, 128]
%16 = clone(%15) : f32[160, 1, 128]
%17 = reshape(%16, [160, 128]) : f32[160, 128]
%18 = cat([%17, %12], 1) : f32[160, 160]
%19 = _to_copy(%0, dtype=float32) : f32[160, 160]
%20 = mul(%19, %18) : f32[160, 160]
%21 = _to_copy(%20, dtype=bfloat16) : bf16[160, 160]
%22 = add(%2, %21) : bf16[160, 160]
return [%22]""",
        )

    def test_grouped_experts(self):
        offs = torch.tensor([3, 3, 8, 10], dtype=torch.int32)
        program = ctfp8.lower(_experts("grouped"), (torch.randn(10, 32, dtype=T), offs))
        self.assertExpectedInline(
            format_graph(program.graph),
            """\
%0 = placeholder : f8e4m3[4, 16, 32]
%1 = placeholder : f32[4, 16, 1]
%2 = placeholder : bf16[10, 32]
%3 = placeholder : i32[4]
%4 = ctfp8.dequantized_grouped_mm(%2, %0, %1, %3, [1, 32]) : bf16[10, 16]
return [%4]""",
        )

    def test_gathered_experts(self):
        program = ctfp8.lower(_experts("gathered"), (torch.randn(10, 32, dtype=T), torch.zeros(10, dtype=torch.int64)))
        self.assertExpectedInline(
            format_graph(program.graph),
            """\
%0 = placeholder : f8e4m3[4, 16, 32]
%1 = placeholder : f32[4, 16, 1]
%2 = placeholder : bf16[10, 32]
%3 = placeholder : i64[10]
%4 = unsqueeze(%2, -1) : bf16[10, 32, 1]
%5 = squeeze(%4, 2) : bf16[10, 32]
%6 = ctfp8.dequantized_gathered_mm(%5, %0, %1, %3, [1, 32]) : bf16[10, 16]
%7 = unsqueeze(%6, 2) : bf16[10, 16, 1]
%8 = squeeze(%7, -1) : bf16[10, 16]
return [%8]""",
        )
