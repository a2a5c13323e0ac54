"""Repeated layers as regions: the same bits, the same names, and code that does not grow with them."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from conftest import DATA, IDS, fp8_config, quantize, relative_error
from support.architectures import ARCHITECTURES, UNTRACEABLE
from support.forge import forge
from torch import nn
from transformers import DynamicCache

import ctfp8_compile as ctfp8
from ctfp8_compile.compat import compile_fx, invoke_subgraph
from ctfp8_compile.hf.static_cache import cache_argument
from ctfp8_compile.inductor import backend
from ctfp8_compile.passes import regions


class _Declared:
    """A backend that makes regions and runs the graph as it is; keeps what was made."""

    def __init__(self, undone: bool = False):
        self.undone = undone
        self.made: list[regions.Regions] = []
        self.calls: list[Counter[str]] = []

    def __call__(self, gm, inputs):
        self.made.append(regions.declare(gm))
        if self.undone:
            regions.inline(gm, self.made[-1].stacks)
        gm.recompile()
        self.calls.append(Counter(n.args[1] for n in gm.graph.find_nodes(op="call_function", target=invoke_subgraph)))
        return gm


@pytest.fixture
def two_are_enough(monkeypatch):
    monkeypatch.setattr(regions, "LEAST", 2)


CASES = ["llama/FP8_DYNAMIC", "qwen3/FP8_BLOCK", "llama/FP8_DYNAMIC_KV", "mixtral/FP8", "qwen3moe/FP8_DYNAMIC"]


@pytest.mark.quick("qwen3moe/FP8_DYNAMIC")
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("cache", ["static", "growing", "none"])
def test_a_model_computes_the_same_bits(name, cache, two_are_enough):
    model = ctfp8.from_pretrained(DATA / name)
    found = []
    for undone in (True, False):
        torch._dynamo.reset()
        declared = _Declared(undone)
        forward = torch.compile(model.forward, backend=declared, fullgraph=True)
        kept = {"static": ctfp8.static_cache(model, 2, 64), "growing": DynamicCache(config=model.config), "none": None}[
            cache
        ]
        given = {"use_cache": False} if kept is None else {cache_argument(model): kept, "use_cache": True}
        with torch.no_grad():
            outs = [forward(IDS, **given).logits]
            if kept is not None:
                at = torch.full((2, 1), IDS.shape[1])
                outs.append(forward(IDS[:, :1], position_ids=at, **given).logits)
        found.append(torch.cat([o.flatten() for o in outs]))
    assert torch.equal(*found)
    assert all(declared.made)
    assert all(count == 2 for calls in declared.calls for count in calls.values())


@pytest.mark.long
# nor can dynamo trace llava with images: transformers takes a lock there
@pytest.mark.parametrize("architecture", sorted(set(ARCHITECTURES) - UNTRACEABLE - {"llava"}))
def test_every_architecture_computes_the_same_bits(architecture, two_are_enough, tmp_path):
    forged = forge(architecture, "FP8_DYNAMIC", tmp_path)
    model = ctfp8.from_pretrained(forged.folder, forged.auto_class)
    inputs = dict(forged.inputs) if architecture == "bert" else {**forged.inputs, "use_cache": False}
    found = []
    for undone in (True, False):
        torch._dynamo.reset()
        declared = _Declared(undone)
        with torch.no_grad():
            found.append(torch.compile(model.forward, backend=declared, fullgraph=True)(**inputs)[0])
    assert torch.equal(*found)
    # the two layers of this small Jamba are of two classes
    assert declared.made[-1].said.startswith(("2 repeated layers", "3 repeated layers")) or architecture == "jamba"


def test_lengths_vary_within_one_graph(two_are_enough):
    model = ctfp8.from_pretrained(DATA / "llama/FP8_DYNAMIC")
    found = []
    for undone in (True, False):
        torch._dynamo.reset()
        declared = _Declared(undone)
        compiled = torch.compile(model.forward, backend=declared, fullgraph=True, dynamic=True)
        with torch.no_grad():
            found.append([compiled(IDS[:, :n].contiguous(), use_cache=False).logits for n in (20, 13)])
        assert all(declared.made)
    assert all(map(torch.equal, *found))


class _Block(nn.Module):
    def __init__(self, width, how):
        super().__init__()
        self.how = how
        self.up, self.down = nn.Linear(64, width, bias=False), nn.Linear(width, 64, bias=False)
        self.register_buffer("seen", torch.zeros(1, 64))

    def forward(self, x):
        y = self.down(torch.nn.functional.silu(self.up(x)))
        if self.how == "writes":
            self.seen.add_(y.mean(0, keepdim=True))
            y = y + self.seen
        if self.how == "writes to its own":  # with and without the result's being read, through a view, in a half of it
            y = torch.relu(y)
            y.mul_(2)
            y[0] = y[1]
            half, _ = y.chunk(2, -1)
            half += 1
            y /= y.abs().sum()
        if self.how == "writes to its input":
            x += y
            return x
        if self.how == "views":  # two of one memory, from a region to the next
            first, second = y.chunk(2, -1)
            self.seen.add_(y.mean(0, keepdim=True))
            return x + torch.cat([second, first], -1) + self.seen
        return x + y


class _Stack(nn.Module):
    def __init__(self, widths, how="plain"):
        super().__init__()
        self.layers = nn.ModuleList(_Block(width, how) for width in widths)

    def forward(self, x):
        x = x.clone()
        for layer in self.layers:
            x = layer(x)
        return x


def _stack(widths, how="plain"):
    torch.manual_seed(0)
    module = _Stack(widths, how)
    state = dict(module.state_dict())
    for name in [n for n in state if n.endswith("weight")]:
        state[name], state[f"{name}_scale"] = quantize(state[name])
    return ctfp8.load_state_dict(module, state, fp8_config())


@pytest.mark.parametrize(
    ("widths", "how", "calls"),
    [
        ([32] * 4, "plain", [4]),
        ([32] * 4, "views", [4, 4]),
        ([32] * 4, "writes", [4]),
        ([32] * 4, "writes to its own", [4]),
        ([32] * 4, "writes to its input", [4]),
        ([32, 48] * 4, "plain", [4, 4]),
        ([32] * 4 + [48], "plain", [4]),
        ([32, 48, 64, 80], "plain", []),
        ([32] * 3, "plain", []),
    ],
)
@pytest.mark.parametrize("undone", [False, True])
def test_what_is_alike_becomes_a_region(widths, how, calls, undone):
    x = torch.randn(3, 64)
    want = [(model := _stack(widths, how))(x), model(x)][-1]
    declared = _Declared(undone)
    model = _stack(widths, how)
    compiled = torch.compile(model, backend=declared, fullgraph=True)
    assert torch.equal([compiled(x), compiled(x)][-1], want)
    assert sorted(declared.calls[0].values()) == ([] if undone else calls)
    assert declared.made[0].said == (
        f"{len(widths)} repeated layers compiled as {len(calls)} region{'s' * (len(calls) > 1)}" if calls
        else "4 repeated layers compiled one by one: they differ" if len(widths) >= 4 else ""
    )  # fmt: skip


@pytest.mark.long
def test_experts_are_rewritten_within_regions(two_are_enough):
    """Whatever their layers write to: a router's probabilities, a permutation."""
    model = ctfp8.from_pretrained(DATA / "qwen3moe/FP8_DYNAMIC", dtype=torch.float32)
    compiled = torch.compile(model.forward, backend="ctfp8", fullgraph=True, dynamic=True)
    cache = {cache_argument(model): ctfp8.static_cache(model, 2, 64)}
    with torch.no_grad():
        got = compiled(IDS, **cache).logits
        want = model(IDS, use_cache=False).logits
    report = ctfp8.compiled_reports()[-1]
    assert (report.layers, report.kept) == ("2 repeated layers compiled as 2 regions", ())
    assert sum("experts" in entry.name for entry in report.rewritten) == 4
    assert len(report.attention) == 2
    assert relative_error(got, want) < 1e-5


def test_the_report_and_the_bits_are_those_of_the_whole_graph(kernel_everywhere):
    """Through Inductor; what is compiled does not grow with the layers."""
    x = torch.randn(3, 64)
    found = []
    for layers, wanted in ((4, False), (4, True), (6, True)):
        torch._inductor.metrics.reset()
        torch._dynamo.reset()
        model = _stack([32] * layers)
        compiled = torch.compile(model, backend="ctfp8", fullgraph=True, options={"ctfp8.regions": wanted})
        result = [compiled(x), compiled(x)][-1]
        found.append((result, ctfp8.compiled_reports()[-1], torch._inductor.metrics.generated_kernel_count))
    (whole, report, _), (same, again, kernels), (_, longer, as_many) = found
    assert torch.equal(whole, same) or relative_error(same, whole) < 1e-6
    assert again.layers == "4 repeated layers compiled as 1 region"
    assert (report.rewritten, report.kept, report.attention) == (again.rewritten, again.kept, again.attention)
    assert [e.name for e in longer.rewritten] == [f"layers.{i}.{w}.weight" for i in range(6) for w in ("up", "down")]
    assert as_many == kernels


def test_what_torch_does_not_take_as_regions_is_compiled_whole(monkeypatch):
    def refuse(gm, *args, **kwargs):
        if gm.graph.find_nodes(op="call_function", target=invoke_subgraph):
            raise RuntimeError("aliases")
        return compile_fx(gm, *args, **kwargs)

    monkeypatch.setattr(backend, "compile_fx", refuse)
    x = torch.randn(3, 64)
    model = _stack([32] * 4)
    compiled = torch.compile(model, backend="ctfp8", fullgraph=True, options={"ctfp8.regions": True})
    assert relative_error(compiled(x), model(x)) < 1e-5
    assert ctfp8.compiled_reports()[-1].layers == "layers compiled one by one: RuntimeError as regions"
    assert len(ctfp8.compiled_reports()[-1].rewritten) == 8
