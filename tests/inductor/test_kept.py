"""A kept graph is run again where all that it depends on is as it was, and nowhere else."""

from __future__ import annotations

import contextlib
import enum
import functools
import os
import subprocess
import sys
from collections import OrderedDict

import pytest
import torch
from conftest import DATA, fp8_config, quantize
from torch import nn
from torch.nn.utils import parametrize

import ctfp8_compile as ctfp8
from ctfp8_compile.inductor import kept
from ctfp8_compile.inductor.recipe import Compiled
from ctfp8_compile.kept import folder

FACTOR = 3.0
TABLE = {"relu": torch.relu, "sin": torch.sin}


class Kind(enum.Enum):
    PLAIN = 1
    TWICE = 2


def times(x, by=2.0):
    return x * by


def doubled(function):
    @functools.wraps(function)
    def inner(*args, **kwargs):
        return function(*args, **kwargs) + 1

    return inner


@doubled
def shifted(x):
    return x - 1


class Block(nn.Module):
    limit = 10.0

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(64, 64, bias=False)
        self.norm = nn.LayerNorm(64)
        self.scale, self.act, self.sizes, self.kind, self.then = 2.0, "relu", [1, 2], Kind.PLAIN, times

    def forward(self, x):
        x = TABLE[self.act](self.norm(self.up(x))) * self.scale
        x = self.then(x) if self.kind is Kind.PLAIN else x
        return shifted(x).clamp(max=self.limit) + self.sizes[0] + FACTOR


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.settings = {"residual": True}

    def forward(self, x, more=None, *, twice=False):
        for block in self.blocks:
            x = block(x) + x if self.settings["residual"] else block(x)
        x = x if more is None else x + more
        return x * 2 if twice else x


def net(seed=0, block=None):
    generator, state = torch.Generator().manual_seed(seed), {}
    for i in range(2):
        fp8, scale = quantize(torch.randn(64, 64, generator=generator))
        state |= {f"blocks.{i}.up.weight": fp8, f"blocks.{i}.up.weight_scale": scale}
        state |= {f"blocks.{i}.norm.weight": torch.ones(64), f"blocks.{i}.norm.bias": torch.zeros(64)}
    return ctfp8.load_state_dict(Net(), state, fp8_config())


ARGUMENTS = {"backend": "ctfp8", "dynamic": True}
X = torch.linspace(-1, 1, 5 * 64).reshape(5, 64)


@pytest.fixture(scope="module", autouse=True)
def _caches():
    """Inductor's own, which tests do without: what is kept is kept beside them."""
    with torch._inductor.config.patch(fx_graph_cache=True), torch._functorch.config.patch(enable_autograd_cache=True):
        yield


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """The folder in which a process kept what it compiled of a `net`, and what it said to `X`."""
    place = tmp_path_factory.mktemp("kept")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CTFP8_CACHE_DIR", str(place / "cache"))
        patch.setenv("XDG_CONFIG_HOME", str(place / "config"))
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(place / "inductor"))
        with torch.no_grad():
            said = Compiled(net().forward, ARGUMENTS)(X)
        torch._dynamo.reset()
        assert len(folder.entries()) == 1
        yield said


def fits(model, *args, arguments=ARGUMENTS, **kwargs):
    """Whether another process would run what was kept, and what that says."""
    found = kept.Keeper(model.forward, arguments)
    with torch.no_grad():
        run = found.fitting(args, kwargs)
        return None if run is None else run(*found.given(args), **kwargs)


def test_another_model_of_the_same_kind_runs_it(once):
    assert torch.equal(fits(net(), X), once)
    torch.testing.assert_close(fits(net(1), X), net(1)(X).detach(), atol=1e-2, rtol=1e-2)
    longer = torch.linspace(-2, 2, 9 * 64).reshape(9, 64)
    torch.testing.assert_close(fits(net(1), longer), net(1)(longer).detach(), atol=1e-2, rtol=1e-2)


def block(change):
    return lambda model: change(model.blocks[1])


def nothing(module, *_):
    return None


def other(self, x):
    return x


def under(name):
    class Other(nn.ReLU):
        pass

    return lambda model: setattr(model.blocks[1], name, Other())


def frozen_scale(model):
    model.blocks[0].norm.register_parameter("bias", None)


def parametrized(model):
    parametrize.register_parametrization(model.blocks[1].norm, "weight", nn.Softplus())


MODELS = {
    "a constant": block(lambda b: setattr(b, "scale", 2.5)),
    "an integer for a float": block(lambda b: setattr(b, "scale", 2)),
    "a word": block(lambda b: setattr(b, "act", "sin")),
    "an item of a list": block(lambda b: setattr(b, "sizes", [2, 2])),
    "a member of an enumeration": block(lambda b: setattr(b, "kind", Kind.TWICE)),
    "a function it holds": block(lambda b: setattr(b, "then", torch.tanh)),
    "a function it holds, with other defaults": block(lambda b: setattr(b, "then", lambda x, by=3.0: x * by)),
    "a setting of the whole": lambda m: m.settings.update(residual=False),
    "a class's constant, on one object": block(lambda b: setattr(b, "limit", 1.0)),
    "forward hook": block(lambda b: b.up.register_forward_hook(nothing)),
    "forward pre-hook": block(lambda b: b.register_forward_pre_hook(nothing)),
    "forward, patched on one object": block(lambda b: setattr(b, "forward", functools.partial(other, b))),
    "another class inside": under("norm"),
    "a parameter less": frozen_scale,
    "a parametrization": parametrized,
    "a parameter of another dtype": block(lambda b: b.norm.to(torch.float64)),
    "a parameter of other strides": block(lambda b: setattr(b.norm, "weight", nn.Parameter(torch.ones(128)[::2], False))),
    "a layer twice": lambda m: setattr(m, "blocks", nn.ModuleList([m.blocks[0], m.blocks[0]])),
    "a layer more": lambda m: m.blocks.append(m.blocks[0]),
    "an epsilon": block(lambda b: setattr(b.norm, "eps", 1e-3)),
}  # fmt: skip


@pytest.mark.parametrize("change", MODELS)
def test_a_changed_model_is_compiled_anew(once, change):
    model = net()
    MODELS[change](model)
    assert fits(model, X) is None


CALLS = {
    "dtype": ((X.bfloat16(),), {}),
    "rank": ((X[None],), {}),
    "one row, which dynamo compiles apart": ((X[:1],), {}),
    "another width": ((X[:, :32],), {}),
    "strides": ((X.t().contiguous().t(),), {}),
    "an argument more": ((X, X), {}),
    "an argument by name": ((X,), {"twice": True}),
    "a parameter for a tensor": ((nn.Parameter(X, requires_grad=False),), {}),
    "a tensor that wants gradients": ((X.clone().requires_grad_(),), {}),
    "a number": ((X, 3), {}),
}


@pytest.mark.parametrize("call", CALLS)
def test_another_call_is_compiled_anew(once, call):
    args, kwargs = CALLS[call]
    assert fits(net(), *args, **kwargs) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("FACTOR", 4.0),
        ("shifted", doubled(lambda x: x - 2)),
        ("TABLE", {"relu": torch.tanh, "sin": torch.sin}),
        ("TABLE", OrderedDict(TABLE)),
        ("Block.forward", other),
        ("Block.limit", 5.0),
        ("Net.forward", other),
        ("times", None),
    ],
)
def test_other_code_is_compiled_anew(once, monkeypatch, name, value):
    """As an edited file, a monkey patch, or another release of a library would have it."""
    owner, _, attribute = f"{__name__}.{name}".rpartition(".")
    _, _, cls = owner.removeprefix(__name__).rpartition(".")
    found = getattr(sys.modules[__name__], cls) if cls else sys.modules[__name__]
    if value is None:
        monkeypatch.setattr(times, "__code__", (lambda x, by=2.0: x * by + 1).__code__)
    else:
        monkeypatch.setattr(found, attribute, value)
    assert fits(net(), X) is None


@contextlib.contextmanager
def around(enter, leave):
    enter()
    try:
        yield
    finally:
        leave()


STATES = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "gradients": torch.enable_grad,
    "deterministic": lambda: around(lambda: torch.use_deterministic_algorithms(True), lambda: torch.use_deterministic_algorithms(False)),
    "default dtype": lambda: around(lambda: torch.set_default_dtype(torch.float64), lambda: torch.set_default_dtype(torch.float32)),
    "threads": lambda: around(functools.partial(torch.set_num_threads, torch.get_num_threads() + 1), functools.partial(torch.set_num_threads, torch.get_num_threads())),
    "a device for new tensors": lambda: torch.device("meta"),
    "hooks of all modules": lambda: nn.modules.module.register_module_forward_hook(nothing),
    "an option of Inductor": lambda: torch._inductor.config.patch(epilogue_fusion=False),
    "an option of dynamo": lambda: torch._dynamo.config.patch(guard_nn_modules=False),
}  # fmt: skip


@pytest.mark.parametrize("state", STATES)
def test_another_state_of_torch_is_compiled_anew(once, state):
    model = net()
    found = kept.Keeper(model.forward, ARGUMENTS)
    with torch.no_grad(), STATES[state]():
        assert found.fitting((X,), {}) is None


ASKED = [
    {"dynamic": False}, {"fullgraph": True}, {"mode": "max-autotune-no-cudagraphs"}, {"options": {"ctfp8.regions": False}},
    {"options": {"ctfp8.horizontal_fusion": False}}, {"options": {"epilogue_fusion": False}},
]  # fmt: skip


@pytest.mark.parametrize("more", ASKED, ids=str)
def test_other_arguments_are_compiled_anew(once, more):
    assert fits(net(), X, arguments={**ARGUMENTS, **more}) is None


@pytest.mark.parametrize("what", ["torch", "ctfp8", "processor", "kernels", "a package"])
def test_other_versions_are_compiled_anew(once, monkeypatch, what):
    if what == "torch":
        monkeypatch.setattr(torch, "__version__", "2.99.0")
    else:
        name = {"ctfp8": "source_hash", "processor": "_processor", "a package": "_installed"}.get(what)
        target = (kept, name) if name else (kept.lowering, "fingerprint")
        monkeypatch.setattr(*target, lambda *_: "another")
    assert fits(net(), X) is None


def test_guards_hold_after_it_was_taken(once):
    """Guards of identity, too, which are those of this process: of this model, not of another like it."""
    model = net()
    found = kept.Keeper(model.forward, ARGUMENTS)
    with torch.no_grad():
        assert found.fitting((X,), {}) is not None
        assert found.fitting((X[:3],), {}) is not None
        model.blocks[0].scale = 3.0
        assert found.fitting((X,), {}) is None
        model.blocks[0].scale = 2.0
        model.blocks[0].norm.forward = functools.partial(other, None)
        assert found.fitting((X,), {}) is None
        del model.blocks[0].norm.forward
        assert found.fitting((X,), {}) is not None
        assert found.fitting((X.double(),), {}) is None
    with torch.enable_grad():
        assert found.fitting((X,), {}) is None


def test_what_does_not_fit_is_compiled_beside_it(once):
    """Dynamo puts names into the function's globals, and refuses one that is there: ours are others."""
    model = net()
    run = Compiled(model.forward, ARGUMENTS)
    more = torch.ones(64)
    with torch.no_grad():
        assert torch.equal(run(X), once)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0
        torch.testing.assert_close(run(X, more), model(X, more), atol=1e-2, rtol=1e-2)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
        assert torch.equal(run(X), once)
    assert len(folder.entries()) == 2
    torch._dynamo.reset()
    torch.testing.assert_close(fits(net(1), X, more), net(1)(X, more).detach(), atol=1e-2, rtol=1e-2)
    assert torch.equal(fits(net(), X), once)
    max((entry.path for entry in folder.entries()), key=lambda path: path.stem).unlink()  # the later one


def test_a_graph_that_fits_no_call_is_looked_at_no_more(once, monkeypatch):
    """Else each step of a model that was compiled in this process would look at it first."""
    looked = []
    monkeypatch.setattr(kept, "build", lambda *args: looked.append(1) or kept_build(*args))
    found = kept.Keeper(net().forward, ARGUMENTS)
    with torch.no_grad():
        for _ in range(40):
            assert found.fitting((X.bfloat16(),), {}) is None
    assert len(looked) == kept._TRIES - 1


kept_build = kept.build


def kept_file():
    (entry,) = folder.entries()
    return entry.path


def torn(data):
    return data[: len(data) // 2]


def changed(data):
    return data[:-1] + bytes([data[-1] ^ 1])


def of_somebody(data):
    return folder._MAGIC + bytes(32) + data[len(folder._MAGIC) + 32 :]


@pytest.mark.parametrize("damage", [torn, changed, of_somebody, lambda data: b"", lambda data: b"\x80\x05N."])
def test_a_file_that_this_user_did_not_write_is_not_unpickled(once, monkeypatch, damage):
    path = kept_file()
    data = path.read_bytes()
    path.write_bytes(damage(data))
    try:
        with monkeypatch.context() as patch:
            patch.setattr(kept.pickle, "loads", lambda data: pytest.fail("unpickled"))
            assert fits(net(), X) is None
    finally:
        path.write_bytes(data)
    assert fits(net(), X) is not None


def test_a_file_moved_to_another_model_is_not_read(once):
    path = kept_file()
    moved = path.parent.with_name("0" * 32) / path.name
    moved.parent.mkdir()
    moved.write_bytes(path.read_bytes())
    assert folder.read("0" * 32, path.stem) is None
    moved.unlink()
    moved.parent.rmdir()


def test_inductors_part_gone_is_compiled_anew(once, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    for graph in [name for name in net.__globals__ if name.startswith("__compiled_fn")]:
        monkeypatch.delitem(net.__globals__, graph)  # this process has it, another would not
    assert fits(net(), X) is None


RUN = """
import logging, sys, torch
import ctfp8_compile as ctfp8
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
model = ctfp8.from_pretrained(sys.argv[1], compile=True)
ids = torch.arange(5, 14)[None]
print(model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False).tolist())
with torch.no_grad():
    print(model(ids).logits.double().sum().item())
    print(model(ids, use_cache=False).logits.double().sum().item())
"""


@pytest.mark.ci(True)
@pytest.mark.long
@pytest.mark.parametrize("name", ["llama/FP8_DYNAMIC", "qwen3moe/FP8_BLOCK"])
def test_another_process_compiles_nothing(name, tmp_path):
    """With a growing cache, whose graphs a process makes one after the other, and with none; the same bits come out."""
    env = {
        **os.environ, "CTFP8_CACHE_DIR": str(tmp_path / "cache"), "XDG_CONFIG_HOME": str(tmp_path / "config"),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"),
    }  # fmt: skip
    said = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", RUN, str(DATA / name)], env=env, capture_output=True, text=True, check=True
        )
        said.append(done)
    first, second = said
    assert "kept for the next process" in first.stderr, first.stderr
    assert "compiled before, starts in" in second.stderr, second.stderr
    assert "compiling" not in second.stderr, second.stderr
    assert second.stdout == first.stdout
