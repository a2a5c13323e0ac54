"""FP8 layers of a kind share a class, as plain ones do: what looks at a module's class sees one thing, not many."""

from __future__ import annotations

import abc
import copy

import pytest
import torch
from conftest import fp8_config, quantize
from torch import nn
from torch.nn.utils import parametrize

import ctfp8_compile as ctfp8
from ctfp8_compile.model.freeze import dequantize_
from ctfp8_compile.model.parametrization import stored_weight


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Stack(nn.Module):
    def __init__(self, layers: int):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def load(module):
    state = dict(module.state_dict())
    for name in [n for n in state if n.endswith("weight")]:
        state[name], state[f"{name}_scale"] = quantize(state[name])
    return ctfp8.load_state_dict(module, state, fp8_config())


@pytest.fixture
def stack():
    torch.manual_seed(0)
    return load(Stack(12))


@pytest.mark.parametrize("backend", ["ctfp8", "inductor"])
def test_layers_compiled_one_by_one_are_one_graph(stack, backend):
    """More of them than torch compiles of one function."""
    x = torch.randn(3, 32)
    with torch.no_grad():
        want = stack(x)
        for layer in stack.layers:
            layer.compile(backend=backend, fullgraph=True)
        got = stack(x)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-4)


def test_models_of_a_class_are_one_graph():
    models = [load(Stack(1)) for _ in range(10)]
    apply = torch.compile(lambda model, x: model(x), backend="ctfp8", fullgraph=True)
    x = torch.randn(3, 32)
    with torch.no_grad():
        for model in models:
            assert torch.allclose(apply(model, x), model(x), rtol=1e-4, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_class_is_shared_by_what_is_alike_only(stack):
    first, second = stack.layers[0], stack.layers[1]
    assert type(first.up) is type(second.down) is not nn.Linear
    assert isinstance(first.up, nn.Linear)
    assert type(copy.deepcopy(first).up) is type(first.up)
    assert type(nn.Linear(2, 2)) is nn.Linear


def test_one_layer_is_dequantized_and_the_others_stay(stack):
    x, layer = torch.randn(3, 32), stack.layers[0]
    want = stack(x)
    dequantize_(layer)
    assert type(layer.up) is nn.Linear
    assert isinstance(layer.up.weight, nn.Parameter)
    assert stored_weight(stack.layers[1].up, "weight").dtype == torch.float8_e4m3fn
    assert torch.allclose(stack(x), want, rtol=1e-5, atol=1e-5)


class _Double(nn.Module):
    def forward(self, bias):
        return bias * 2


def test_torchs_parametrize_changes_one_layer_and_no_other(stack):
    """It changes the class of the module that it is given, which is that of all."""
    x, (first, second) = torch.randn(3, 32), stack.layers[:2]
    want, bias = stack(x), first.up.bias.clone()
    parametrize.register_parametrization(first.up, "bias", _Double())
    assert torch.equal(first.up.bias, 2 * bias)
    assert isinstance(second.up.bias, nn.Parameter)
    second.up.bias = nn.Parameter(second.up.bias.detach().clone(), requires_grad=False)
    with pytest.raises(TypeError, match="cannot assign 'torch.FloatTensor' as parameter 'bias'"):
        second.up.bias = torch.zeros(64)
    got = stack(x)
    assert not torch.equal(got, want)
    assert torch.allclose(torch.compile(stack, backend="ctfp8", fullgraph=True)(x), got, rtol=1e-4, atol=1e-4)
    parametrize.register_parametrization(second.up, "bias", _Double())
    for layer in (first, second):
        parametrize.remove_parametrizations(layer.up, "bias", leave_parametrized=False)
    assert torch.equal(stack(x), want)
    parametrize.remove_parametrizations(first.up, "weight", leave_parametrized=False)
    assert first.up.weight.dtype == torch.float8_e4m3fn
    assert type(first.up) is nn.Linear
    assert torch.equal(stack.layers[1](x), second(x))
    assert second.up.weight.dtype == torch.float32


class Abstract(nn.Linear, abc.ABC):
    @abc.abstractmethod
    def name(self): ...


class Concrete(Abstract):
    def name(self):
        return "mine"


def test_a_class_with_a_metaclass_of_its_own():
    module = load(nn.Sequential(Concrete(32, 16), Concrete(16, 16)))
    assert type(module[0]) is type(module[1])
    assert module[0].name() == "mine"
    x = torch.randn(3, 32)
    assert torch.allclose(torch.compile(module, backend="ctfp8", fullgraph=True)(x), module(x), rtol=1e-4, atol=1e-4)
