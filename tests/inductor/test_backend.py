"""torch.compile(model, backend="ctfp8") on whole models: one graph, every FP8 weight accounted for, right logits."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import DATA, FP8_PARAMETERS, IDS, fp8_config, logits, quantize, relative_error
from torch import nn

import ctfp8_compile as ctfp8
from ctfp8_compile.graph import MARKER
from ctfp8_compile.inductor.backend import Fp8Pass, _split_options
from ctfp8_compile.model.parametrization import quantized_parameters
from ctfp8_compile.ops import FP8

# the loader and the rules see every pair of architecture and scheme in test_architectures
ONE_GRAPH = ["llama/FP8_DYNAMIC", "llama/FP8_BLOCK", "qwen3/FP8", "qwen3moe/FP8_DYNAMIC", "mixtral/FP8_BLOCK"]


@pytest.mark.quick("qwen3/FP8", "mixtral/FP8_BLOCK")
@pytest.mark.parametrize("name", ONE_GRAPH)
def test_a_checkpoint_is_one_graph(name, load, kernel_everywhere):
    model = load(name)
    eager = logits(model)
    got = logits(torch.compile(model, backend="ctfp8", fullgraph=True))
    # bfloat16 rounding differs; in a MoE it may send a token whose experts are nearly tied to another one
    assert relative_error(got, eager) < (0.06 if "mix" in name or "moe" in name else 0.02)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    report = ctfp8.compiled_reports()[-1]
    assert len(report.rewritten) == FP8_PARAMETERS[name.split("/")[0]]
    assert not report.kept
    explained = ctfp8.explain(model, (IDS,), {"use_cache": False})
    assert {e.name for e in explained.rewritten} == {e.name for e in report.rewritten}
    assert {e.name for e in report.rewritten} <= {n for n, _, _ in quantized_parameters(model)}
    assert sum(p.dtype == FP8 for p in model.parameters()) == len(report.rewritten)


def test_batched_experts_and_dynamic_shapes(kernel_everywhere):
    model = ctfp8.from_pretrained(DATA / "mixtral/FP8_BLOCK", experts_implementation="batched_mm")
    block = model.model.layers[0]
    block = block.mlp if hasattr(block, "mlp") else block.block_sparse_moe
    compiled = torch.compile(block, backend="ctfp8", fullgraph=True, dynamic=True)
    hidden = torch.randn(2, 20, 128).bfloat16()
    with torch.no_grad():
        for length in (7, 12, 20):
            x = hidden[:, :length].contiguous()  # a slice would have other strides at full length, hence another graph
            assert relative_error(compiled(x), block(x)) < 0.02
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert {e.rule for e in ctfp8.compiled_reports()[-1].rewritten} == {"gathered experts"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_experts_in_dtypes_that_grouped_mm_does_not_take(dtype, kernel_everywhere):
    block = ctfp8.from_pretrained(DATA / "qwen3moe/FP8_DYNAMIC", dtype=dtype).model.layers[0].mlp
    x = torch.randn(2, 20, 128).to(dtype)
    with torch.no_grad():
        assert relative_error(torch.compile(block, backend="ctfp8", fullgraph=True)(x), block(x)) < 0.01
    assert {e.rule for e in ctfp8.compiled_reports()[-1].rewritten} == {"grouped experts"}


def test_without_a_kernel_the_graph_is_plain_aten_and_right(load, monkeypatch):
    from ctfp8_compile import lowering

    monkeypatch.setattr(lowering.cpu.FusedDequantizeMatmul, "supports", lambda *a: lowering.no("no compiler"))
    block = load("qwen3moe/FP8_BLOCK").model.layers[0].mlp  # experts and block scales
    x = torch.randn(2, 20, 128).bfloat16()
    with torch.no_grad():
        assert relative_error(torch.compile(block, backend="ctfp8", fullgraph=True)(x), block(x)) < 0.02
    report = ctfp8.compiled_reports()[-1]
    assert not report.rewritten
    assert {e.reason for e in report.kept} == {"no compiler"}


class _Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(64, 32)

    def forward(self, x):
        return self.a(x)


@pytest.fixture
def small():
    torch.manual_seed(0)
    weight, scale = quantize(torch.randn(32, 64))
    return ctfp8.load_state_dict(
        _Linear(), {"a.weight": weight, "a.weight_scale": scale, "a.bias": torch.randn(32)}, fp8_config()
    )


def test_the_name_needs_no_import():
    """The entry point makes the backend known to torch in a process that has not imported the package."""
    code = "import torch; assert 'ctfp8' in torch._dynamo.list_backends(); import sys; assert 'ctfp8_compile' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "how",
    [
        {"mode": "default"},
        {"mode": "reduce-overhead"},
        {"mode": "max-autotune-no-cudagraphs"},
        {"options": {"epilogue_fusion": False}},
        {"options": {"ctfp8.target": "cpu"}},
        {"dynamic": True, "fullgraph": True},
    ],
)
def test_modes_and_options_as_with_inductor(small, how):
    x = torch.randn(3, 64)
    assert relative_error(torch.compile(small, backend="ctfp8", **how)(x), small(x)) < 1e-5


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"no_such_option": 1}, "no_such_option"),
        ({"ctfp8.targets": "cpu"}, "unknown option 'ctfp8.targets'"),
        ({"ctfp8.target": "cuda:sm90"}, "the model's weights are on cpu"),
        ({"ctfp8.target": "tpu"}, "'tpu' is not a target"),
    ],
)
def test_wrong_options_are_named(small, options, sentence):
    with pytest.raises(Exception, match=sentence):
        torch.compile(small, backend="ctfp8", options=options)(torch.randn(3, 64))


def test_a_users_own_pass_still_runs(small):
    seen = []

    class Mine(torch._inductor.custom_graph_pass.CustomGraphPass):
        def __call__(self, graph):
            seen.append(any(n.target is MARKER for n in graph.nodes))

        def uuid(self):
            return None

    torch.compile(small, backend="ctfp8", options={"post_grad_custom_pre_pass": Mine()})(torch.randn(3, 64))
    assert seen == [True]


def test_gradients_get_a_sentence(small):
    with pytest.raises(Exception, match="an input of this graph requires a gradient"):
        torch.compile(small, backend="ctfp8")(torch.randn(3, 64, requires_grad=True))
    with torch.no_grad():
        torch.compile(small, backend="ctfp8")(torch.randn(3, 64, requires_grad=True))


def test_a_line_is_logged_at_compile(small, caplog):
    with caplog.at_level(logging.INFO, logger="ctfp8_compile"):
        torch.compile(small, backend="ctfp8")(torch.randn(3, 64))
    assert any("1 FP8 weight for cpu" in r.getMessage() for r in caplog.records)


def test_cache_key_covers_target_kernels_and_sources(monkeypatch):
    from ctfp8_compile import lowering

    one = Fp8Pass(ctfp8.Target("cpu")).uuid()
    assert one == Fp8Pass(ctfp8.Target("cpu")).uuid()
    assert one != Fp8Pass(ctfp8.Target("cuda", (9, 0))).uuid()
    monkeypatch.setattr(lowering.cpu.FusedDequantizeMatmul, "fingerprint", lambda self: "another ISA")
    assert one != Fp8Pass(ctfp8.Target("cpu")).uuid()


CACHED = """
import sys, torch, logging
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
import ctfp8_compile as ctfp8
logging.getLogger("httpx").setLevel(logging.WARNING)
model = ctfp8.from_pretrained(sys.argv[1])
mlp = model.model.layers[0].mlp
with torch.no_grad():
    out = torch.compile(mlp, backend="ctfp8", fullgraph=True)(torch.linspace(-1, 1, mlp.hidden_size).bfloat16()[None])
print("sum", out.double().sum().item())
"""


@pytest.mark.long
def test_second_process_reuses_the_code(tmp_path):
    """Inductor's cache must key on our passes: same result, and the log says where the code came from."""
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_FX_GRAPH_CACHE": "1"}
    runs = [
        subprocess.run([sys.executable, "-c", CACHED, str(DATA / "llama/FP8")], env=environment, check=True,
                       capture_output=True, text=True).stdout
        for _ in range(2)
    ]  # fmt: skip
    assert "3 FP8 weights for cpu" in runs[0]
    assert "code came from Inductor's cache" in runs[1]
    assert runs[0].splitlines()[-1] == runs[1].splitlines()[-1]


def test_what_a_growing_cache_begins_with_is_contiguous():
    """As in eager: else its first token compiles a graph that no other takes."""

    class Begins(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = torch.nn.Linear(64, 64, bias=False)

        def forward(self, x, kept):
            return torch.cat([kept, self.lin(x).view(2, 8, 4, 16).transpose(1, 2)], dim=-2)

    module = Begins()
    weight, scale = quantize(module.lin.weight)
    module = ctfp8.load_state_dict(module, {"lin.weight": weight, "lin.weight_scale": scale}, fp8_config())
    x, nothing = torch.randn(2, 8, 64), torch.empty(0)
    with torch.no_grad():
        want = module(x, nothing)
        got = torch.compile(module, backend="ctfp8", fullgraph=True)(x, nothing)
    assert got.stride() == want.stride()
    assert relative_error(got, want) < 1e-2


def test_several_threads_may_name_the_backend_first():
    """torch registers it when it is first asked for, and refuses a second registration."""
    code = """
import threading, torch
import ctfp8_compile as ctfp8
state = {"weight": torch.ones(16, 16).to(torch.float8_e4m3fn), "weight_scale": torch.ones(16, 1)}
from conftest import fp8_config
module = ctfp8.load_state_dict(torch.nn.Linear(16, 16, bias=False), state, fp8_config())
go, errors = threading.Barrier(8), []
def compile():
    go.wait()
    try:
        torch.compile(module, backend="ctfp8")
    except Exception as error:
        errors.append(error)
threads = [threading.Thread(target=compile) for _ in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert not errors, errors
with torch.no_grad():
    x = torch.ones(2, 16)
    assert torch.equal(torch.compile(module, backend="ctfp8")(x), module(x))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(DATA.parent), os.environ.get("PYTHONPATH", "")])}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


@pytest.mark.parametrize(
    ("earlier", "today"),
    [
        ({"ctfp8.join": False}, {"ctfp8.horizontal_fusion": False}),
        ({"ctfp8.collectives": "codes"}, {"ctfp8.collectives": "fp8"}),
    ],
)
def test_earlier_names_of_options_work_and_warn(earlier, today):
    (name, value), (old, was) = next(iter(today.items())), next(iter(earlier.items()))
    with pytest.warns(FutureWarning, match=f"{re.escape(old)}={was!r} is now spelled {re.escape(name)}={value!r}"):
        ours, theirs = _split_options({**earlier, "max_autotune": True})
    assert (ours, theirs) == (today, {"max_autotune": True})
