"""What CUDA and XPU get, compiled by Inductor for the CPU: the same graphs at the same hook, the kernels as references.

The GPU's own code is written and built in tests/gpu_codegen; this is the cheapest test that a graph of ours compiles at all,
and that what Inductor makes of it is still right.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import DATA, IDS, SCHEMES, relative_error
from support.scaled import layer, quantized_activation
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.lowering import lowerings
from torch._ops import OpOverload

import ctfp8_compile as ctfp8
from ctfp8_compile import ops, passes
from ctfp8_compile.inductor import backend
from ctfp8_compile.target import Target

aten = torch.ops.aten
TARGETS = ("cuda:sm80", "cuda:sm89", "cuda:sm90", "cuda:sm90+scaled_mm", "cuda:sm100", "xpu", "xpu+triton")


@pytest.fixture
def compiled_for(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`compiled_for(target, fn)`: `torch.compile(fn, backend="ctfp8")` with a target that is not the tensors' device."""

    def compiled_for(target: str, fn: Any, **kwargs: Any) -> Any:
        torch._dynamo.reset()
        monkeypatch.setattr(backend, "_target", lambda wanted, marked: Target.parse(target))
        return torch.compile(fn, backend="ctfp8", fullgraph=True, **kwargs)

    return compiled_for


LINEARS = [
    ("channel", "token", "cuda:sm90"),
    ("channel", "token", "cuda:sm89"),
    ("tensor", "tensor", "cuda:sm90"),
    ("tensor", "tensor", "xpu"),
    ("block", "group", "cuda:sm90+fbgemm"),  # torch has no `_scaled_mm` with blocks on a CPU
    ("block", "group", "cuda:sm89"),
    ("channel", "token", "cuda:sm80"),
]


@pytest.mark.parametrize(("strategy", "activation", "target"), LINEARS)
def test_a_linear_against_float64(compiled_for, strategy, activation, target):
    n, k = 256, 512
    module, state = layer(n, k, torch.bfloat16, strategy, activation, bias=True)
    compiled = compiled_for(target, module, dynamic=True)
    block = {"channel": [1, k], "tensor": [n, k], "block": [128, 128]}[strategy]
    scale = state["a.weight_scale"].reshape(-1, 1) if strategy != "block" else state["a.weight_scale"]
    weight = state["a.weight"].double() * ops.expand_scale(scale.double(), block, n, k)
    for rows in (21, 6):
        x = torch.randn(rows, k).bfloat16()
        got = compiled(x)
        (entry,) = ctfp8.compiled_reports()[-1].rewritten
        weight_only = "weight-only" in entry.kernel
        want = x.double() if weight_only else quantized_activation(x, activation, state.get("a.input_scale"))
        assert relative_error(got, want @ weight.t() + state["a.bias"].double()) < 4e-3, rows


@pytest.mark.ci("qwen3moe/FP8")
@pytest.mark.parametrize(
    ("name", "experts", "target"),
    [
        pytest.param("llama/FP8_DYNAMIC", None, "cuda:sm90", marks=pytest.mark.long),
        ("qwen3moe/FP8_DYNAMIC", "batched_mm", "cuda:sm90"),
        pytest.param("qwen3moe/FP8", "grouped_mm", "cuda:sm90+scaled_mm", marks=pytest.mark.long),
        pytest.param("qwen3moe/FP8_BLOCK", "batched_mm", "cuda:sm120", marks=pytest.mark.long),
    ],
)
def test_a_model_is_what_its_lowered_graph_is(compiled_for, name, experts, target):
    """In float32, so that no router decides otherwise."""
    options = {"experts_implementation": experts} if experts else {}
    model = ctfp8.from_pretrained(DATA / name, dtype=torch.float32, **options)
    want = ctfp8.lower(model, (IDS,), {"use_cache": False}, target=target).module()(IDS, use_cache=False).logits
    with torch.no_grad():
        got = compiled_for(target, model)(IDS, use_cache=False).logits
    assert relative_error(got, want) < 0.02  # FP8 values of activations may round the other way


def _emitted(module: torch.nn.Module, args: tuple[Any, ...], target: str) -> set[Any]:
    """The operators our passes put into a module's graph."""
    with torch.no_grad():
        graph = torch.export.export(module, args).run_decompositions({}).graph
    before = set(graph.nodes)
    passes.run(graph, Target.parse(target))
    return {node.target for node in graph.nodes if node.op == "call_function" and node not in before}


def test_every_operator_we_emit_has_a_lowering(load):
    """Our hook is behind Inductor's decompositions: it refuses an operator that has one of these, and no lowering."""
    x = torch.zeros(6, 512, dtype=torch.bfloat16)
    linears = [
        layer(256, 512, torch.bfloat16, strategy, activation, bias=True)[0]
        for strategy, activation in (("channel", "token"), ("tensor", "tensor"), ("block", "group"), ("channel", None))
    ]
    tokens, ids = torch.zeros(5, 128, dtype=torch.bfloat16), torch.zeros(5, 2, dtype=torch.int64)
    emitted: set[Any] = set()
    for target in TARGETS:
        for linear in linears:
            emitted |= _emitted(linear, (x,), target)
    for target in ("cuda:sm89", "cuda:sm90", "cuda:sm90+scaled_mm"):
        for scheme in SCHEMES:
            for form in ("grouped_mm", "batched_mm"):
                experts = load(f"qwen3moe/{scheme}", experts_implementation=form).model.layers[0].mlp.experts
                emitted |= _emitted(experts, (tokens, ids, torch.zeros(5, 2, dtype=torch.bfloat16)), target)
    assert {aten.amax.default, aten._scaled_mm.default, aten.sort.default} <= emitted
    decomposed = select_decomp_table()
    refused = {op for op in emitted if isinstance(op, OpOverload) and op in decomposed and op not in lowerings}
    assert not refused
