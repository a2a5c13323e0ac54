"""`float8_e8m0fnu` in machine code: torch 2.15 names a C++ type for it that none of its headers brings."""

from __future__ import annotations

import pytest
import torch
from conftest import fp8_config, quantize
from torch import nn

import ctfp8_compile as ctfp8
from ctfp8_compile.aot.exponents import as_bytes, others_refused
from ctfp8_compile.compat import CppCompileError

E8M0 = torch.float8_e8m0fnu
X = torch.linspace(-2, 2, 3 * 64).view(3, 64)


def _exponents(count: int) -> torch.Tensor:
    return torch.arange(120, 120 + count, dtype=torch.uint8).view(E8M0)


class Scaled(nn.Module):
    """Buffers, a parameter and a constant of powers of two, one below another, one read twice, one under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 32)
        self.inner = nn.Module()
        self.register_buffer("steps", _exponents(32), persistent=False)
        self.inner.register_buffer("steps", _exponents(64)[::2].clone(), persistent=False)
        self.register_buffer("tied", self.steps, persistent=False)
        self.constant = _exponents(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x) * self.steps.float() + self.inner.steps.float()
        return y - self.steps.view(torch.uint8).float() + self.tied.float() * self.constant.float()


class Given(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 32)

    def forward(self, x: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * steps.float()


class Made(Given):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).abs().to(E8M0)


def _quantized(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    weight, scale = quantize(torch.randn(32, 64))
    state = {"linear.weight": weight, "linear.weight_scale": scale, "linear.bias": torch.randn(32)}
    return ctfp8.load_state_dict(model, state, fp8_config())


def test_constants_are_bytes_and_mean_the_same():
    model = Scaled()
    graph = torch.export.export(model, (X,)).module(check_guards=False)
    as_bytes(graph)
    read = [getattr(graph.get_submodule(str(n.target).rpartition(".")[0]), str(n.target).rpartition(".")[2])
            for n in graph.graph.find_nodes(op="get_attr")]  # fmt: skip
    assert not [t for t in read if t.dtype == E8M0]
    assert sum(t.dtype == torch.uint8 for t in read) >= 3
    graph.graph.lint()
    assert torch.equal(graph(X), model(X))


@pytest.mark.long
def test_machine_code_with_constants_of_powers_of_two(tmp_path, kernel_everywhere):
    model, path = _quantized(Scaled()), tmp_path / "m.pt2"
    ctfp8.export(model, (X,), path=path, package="aoti")
    got, want = ctfp8.load(path, trust=True)(X), model(X)
    assert (got - want).norm() < 1e-5 * want.norm()


@pytest.mark.long
@pytest.mark.parametrize(("kind", "args"), [(Given, (X, _exponents(32))), (Made, (X,))])
def test_other_tensors_of_them_run_or_are_refused(tmp_path, kernel_everywhere, kind, args):
    model, path = _quantized(kind()), tmp_path / "m.pt2"
    refused = ""
    try:
        ctfp8.export(model, args, path=path, package="aoti")
    except ctfp8.UsageError as error:
        refused = str(error)
    if refused:
        assert "does not compile inputs, or tensors computed, of float8_e8m0fnu" in refused
        assert not path.exists()
        ctfp8.export(model, args, path=path)  # the cure
    got, want = ctfp8.load(path, trust=True)(*args).float(), model(*args).float()
    assert (got - want).norm() < 1e-5 * want.norm()


@pytest.mark.parametrize("said", ["C++", "a table"])
@pytest.mark.parametrize("at", ["it", "an inner exception", "a cause"])
def test_what_the_compiler_does_not_know_is_one_sentence(at, said):
    error: Exception = KeyError(E8M0)  # torch 2.13's
    if said == "C++":
        error = CppCompileError(["g++"], "error: 'Float8_e8m0fnu' in namespace 'at' does not name a type")
    if at == "an inner exception":
        inner, error = error, RuntimeError("InductorError")
        error.inner_exception = inner
    elif at == "a cause":
        inner, error = error, RuntimeError("wrapped")
        error.__cause__ = inner
    with (
        pytest.raises(ctfp8.UsageError, match=r"uint8 and view them inside, or export a program \(package=None\)"),
        others_refused(),
    ):
        raise error
    with pytest.raises(CppCompileError, match="another"), others_refused():
        raise CppCompileError(["g++"], "another error")
