"""How artifacts are called: as their models were, whatever the signature, the containers and the sizes."""

from __future__ import annotations

import gc
import os

import pytest
import torch
from conftest import fp8_config, quantize
from torch import nn
from torch.export import Dim

import ctfp8_compile as ctfp8

X = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))


def _quantized(module):
    torch.manual_seed(0)
    state = {}
    for name, tensor in module.state_dict().items():
        state[name] = tensor
        if tensor.dim() == 2:
            state[name], state[f"{name}_scale"] = quantize(torch.randn(tensor.shape))
    return ctfp8.load_state_dict(module, state, fp8_config())


def _through_a_file(model, args, path, **how):
    ctfp8.export(model, args, path=path / "m.pt2", **how)
    return ctfp8.load(path / "m.pt2")


def _close(got, want):
    torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-3)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)


class Anything(Two):
    def forward(self, *xs):
        return self.up(xs[0]) + self.down(xs[1]) * xs[2]


class Numbered(Two):
    def forward(self, x):
        return {1: self.up(x), 0: self.down(x)}


class Product(Two):
    """A weight is the input of another linear."""

    def forward(self, x):
        return x @ self.down(self.up.weight).t()


class Concatenated(Two):
    def forward(self, x, y):
        return self.up(x).sum() + self.down(y)


def test_any_number_of_positional_arguments(tmp_path):
    model, args = _quantized(Anything()), (X, X + 1, X * 2)
    module = _through_a_file(model, args, tmp_path)
    _close(module(*args), model(*args))
    with pytest.raises(ctfp8.InputError, match="xs_2 is missing; this artifact takes xs_0, xs_1, xs_2"):
        module(X, X)


def test_a_dict_with_numbers_for_keys_is_read_by_them(tmp_path):
    model = _quantized(Numbered())
    got, want = _through_a_file(model, (X,), tmp_path)(X), model(X)
    assert list(got) == [1, 0]
    _close(got[0], want[0])
    _close(got[1], want[1])


def test_a_weight_as_another_linears_input(tmp_path, kernel_everywhere):
    model = _quantized(Product())
    module = _through_a_file(model, (X,), tmp_path)
    _close(module(X), model(X))
    assert [e.name for e in module.report.rewritten] == ["down.weight"]


def test_a_size_derived_from_another_keeps_its_range(tmp_path):
    half = Dim("half", min=2, max=4)
    model = _quantized(Concatenated())
    alone = _through_a_file(model, (X, X.clone()), tmp_path, dynamic_shapes={"x": {0: 2 * half}, "y": None})
    _close(alone(X.repeat(2, 1), X), model(X.repeat(2, 1), X))
    for rows in (2, 5, 10):
        with pytest.raises(ctfp8.InputError, match=r"x: expected float32\[2\*\w+, 64\] with \w+ from 2 to 4, got"):
            alone(X[:1].expand(rows, 64), X)
    both = _through_a_file(model, (X, X[:2].clone()), tmp_path, dynamic_shapes={"x": {0: 2 * half}, "y": {0: half}})
    _close(both(X.repeat(2, 1), X), model(X.repeat(2, 1), X))
    with pytest.raises(
        ctfp8.InputError, match=r"x: expected float32\[2\*\w+, 64\], got float32\[6, 64\], but \w+ is 4"
    ):
        both(X.repeat(2, 1)[:6], X)


def test_a_graph_that_fails_says_so(tmp_path):
    class Rows(Two):
        def forward(self, x, ids):
            return self.up(x)[ids]

    module = _through_a_file(_quantized(Rows()), (X, torch.tensor([0, 1])), tmp_path)
    with pytest.raises(ctfp8.InputError, match="does not run on these inputs: .*out of"):
        module(X, torch.tensor([0, 99]))


def _anonymous_memory():
    """Bytes of this process that are its own, not a file's (Linux)."""
    gc.collect()
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


@pytest.mark.nightly
@pytest.mark.long
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's /proc")
def test_loading_and_explaining_again_and_again_keeps_no_memory(tmp_path):
    """300 loads grow no more than torch.export.load does; 100 explains no more than torch.export.export does."""
    model = _quantized(Anything())
    args = (X, X, X)
    ctfp8.export(model, args, path=tmp_path / "m.pt2")

    def growth(step, times):
        for _ in range(20):
            step()
        before = _anonymous_memory()
        for _ in range(times):
            step()
        return _anonymous_memory() - before

    torchs = growth(lambda: torch.export.load(tmp_path / "m.pt2").module()(*args), 300)
    ours = growth(lambda: ctfp8.load(tmp_path / "m.pt2")(*args), 300)
    assert ours < 1.5 * torchs + (8 << 20), (ours, torchs)
    traced = growth(lambda: torch.export.export(model, args, strict=False).run_decompositions({}), 100)
    explained = growth(lambda: ctfp8.explain(model, args), 100)
    assert explained < 1.5 * traced + (8 << 20), (explained, traced)
    print(f"loads: {ours >> 10} KiB (torch {torchs >> 10}); explains: {explained >> 10} KiB (torch {traced >> 10})")
