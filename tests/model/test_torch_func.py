"""Transforms of torch.func over a module with FP8 weights, against the same of its float64 twin."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import fp8_config, quantize, relative_error
from torch import func, nn

import ctfp8_compile as ctfp8
from ctfp8_compile.model.freeze import dequantize_

X = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))

TRANSFORMS = {
    "vmap": lambda m, x: func.vmap(m)(x),
    "grad": lambda m, x: func.grad(lambda y: m(y).square().sum())(x),
    "vjp": lambda m, x: func.vjp(m, x)[1](torch.ones(5, 32, dtype=x.dtype))[0],
    "jvp": lambda m, x: func.jvp(m, (x,), (x + 1,))[1],
    "jacrev": lambda m, x: func.jacrev(m)(x[0]),
    "jacfwd": lambda m, x: func.jacfwd(m)(x[0]),
    "hessian": lambda m, x: func.hessian(lambda y: m(y).square().sum())(x[0]),
    "vmap of grad": lambda m, x: func.vmap(func.grad(lambda y: m(y).square().sum()))(x),
    "linearize": lambda m, x: func.linearize(m, x)[1](x),
    "functional_call": lambda m, x: func.functional_call(m, dict(m.named_parameters()), (x,)),
    "gradient of a bias": lambda m, x: func.grad(lambda b: func.functional_call(m, {"0.bias": b}, (x,)).square().sum())(
        m[0].bias.detach()
    ),
}


@pytest.fixture(scope="module", params=["channel", "tensor", "block"])
def modules(request):
    module = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Tanh(), nn.Linear(64, 32, bias=False))
    state = dict(module.state_dict())
    for name in ("0.weight", "3.weight"):
        state[name], state[f"{name}_scale"] = quantize(state[name], request.param)
    module = ctfp8.load_state_dict(module, state, fp8_config(request.param))
    return module, dequantize_(copy.deepcopy(module)).double()


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform(modules, name):
    module, twin = modules
    got, want = TRANSFORMS[name](module, X), TRANSFORMS[name](twin, X.double())
    assert got.dtype == torch.float32
    assert want.abs().max() > 0
    assert relative_error(got, want) < 1e-4


def test_a_transform_of_a_compiled_model(modules):
    module, twin = modules
    compiled = torch.compile(module, backend="ctfp8")
    with torch.no_grad():
        assert relative_error(func.vmap(compiled)(X), twin(X.double())) < 1e-4
        whole = torch.compile(lambda x: func.vmap(module)(x), backend="ctfp8")
        assert relative_error(whole(X), twin(X.double())) < 1e-4
