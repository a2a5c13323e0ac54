"""What dynamo reads of an FP8 weight is what eager code reads, whatever was done to the module since."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import fp8_config, quantize
from torch import nn
from torch.nn.utils import parametrize

import ctfp8_compile as ctfp8
from ctfp8_compile.graph import arguments, is_traced_marker, name_markers, parameter_name
from ctfp8_compile.model.freeze import dequantize_


class _Reader(nn.Module):
    """Reads the weight of another module, as tied embeddings and fused layers do."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(32, 16))

    def forward(self, x):
        return F.linear(x, self.inner[0].weight) + self.inner(x)


@pytest.fixture
def model():
    torch.manual_seed(0)
    module = _Reader()
    state = dict(module.state_dict())
    state["inner.0.weight"], state["inner.0.weight_scale"] = quantize(state["inner.0.weight"])
    return ctfp8.load_state_dict(module, state, fp8_config())


def _scale_twice(model):
    model.inner[0].parametrizations.weight[0].weight_scale = model.inner[0].parametrizations.weight[0].weight_scale * 2


def _another_weight(model):
    stored = model.inner[0].parametrizations.weight
    stored.original = nn.Parameter(stored.original.detach().flip(0), requires_grad=False)


class _Negate(nn.Module):
    def forward(self, weight):
        return -weight


CHANGES = {
    "nothing": lambda model: None,
    "a buffer replaced": _scale_twice,
    "a parameter replaced": _another_weight,
    "moved": lambda model: model.to("cpu"),
    "a parametrization on top": lambda model: parametrize.register_parametrization(model.inner[0], "weight", _Negate()),
    "dequantized": dequantize_,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("deep", [False, True])
def test_a_trace_sees_what_was_changed(model, change, deep):
    x = torch.randn(3, 32)
    torch.compile(model, backend="eager", fullgraph=True)(x)
    subject = copy.deepcopy(model) if deep else model
    before = model(x)
    CHANGES[change](subject)
    compiled = torch.compile(subject, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), subject(x))
    assert torch.equal(model(x), before) or not deep
    assert change in ("nothing", "moved", "dequantized") or not torch.equal(subject(x), before)


def test_tensors_given_for_one_call_are_those_traced(model):
    given = {k: v.flip(0).contiguous() if k.endswith("original") else v for k, v in model.state_dict().items()}
    x = torch.randn(3, 32)
    compiled = torch.compile(lambda: torch.func.functional_call(model, given, (x,)), backend="eager", fullgraph=True)
    assert torch.equal(compiled(), torch.func.functional_call(model, given, (x,)))


def test_a_marker_is_named_by_its_parameter_whoever_reads_it(model):
    names = []

    def look(gm, inputs):
        name_markers(gm.graph)
        names.extend(parameter_name(node) for node in gm.graph.nodes if is_traced_marker(node))
        return gm

    torch.compile(model, backend=look, fullgraph=True)(torch.randn(3, 32))
    assert names == ["inner.0.weight"] * 2


def test_an_exported_model_is_then_compiled(model):
    """torch.export puts dicts of its own into modules while it traces."""
    x = torch.randn(3, 32)
    want = torch.export.export(model, (x,), strict=False).module()(x)
    for dynamic in (False, True):
        assert torch.equal(torch.compile(model, backend="eager", fullgraph=True, dynamic=dynamic)(x), want)
        torch._dynamo.reset()


def test_sizes_of_blocks_are_constants_of_a_dynamic_graph(model):
    seen = []

    def look(gm, inputs):
        seen.extend(arguments(node)[3] for node in gm.graph.nodes if is_traced_marker(node))
        return gm

    torch.compile(model, backend=look, fullgraph=True, dynamic=True)(torch.randn(3, 32))
    assert seen
    assert all(isinstance(size, int) for block in seen for size in block)


def test_a_weight_costs_dynamo_few_guards(model, monkeypatch):
    from torch._dynamo import guards

    managers = []
    make = guards.CheckFunctionManager.__init__

    def kept(self, *args, **kwargs):
        make(self, *args, **kwargs)
        managers.append(self.guard_manager.root)

    def counted():
        managers.clear()
        torch._dynamo.reset()
        torch.compile(model, backend="eager", fullgraph=True)(torch.randn(3, 32))
        return sum(map(_leaves, managers))

    monkeypatch.setattr(guards.CheckFunctionManager, "__init__", kept)
    ours = counted()
    model.inner[0].parametrizations.weight.__class__ = parametrize.ParametrizationList
    assert ours <= counted() - 4


def _leaves(manager):
    children = [
        m for pair in getattr(manager, "get_key_value_managers", dict)().values() for m in pair if m is not None
    ]
    return len(manager.get_leaf_guards()) + sum(map(_leaves, [*children, *manager.get_child_managers()]))
