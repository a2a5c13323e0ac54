"""On a GPU: every kernel the tables name against float64, whole models against the same graph on CPU, graphs and memory.

Skipped on machines without one. `CTFP8_TEST_DEVICE=cpu` runs what does not ask for a GPU's own behaviour on the CPU, which
shows that the tests themselves work.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import DATA, IDS, logits, relative_error
from support.scaled import layer, quantized_activation
from torch._inductor.utils import run_and_get_code

import ctfp8_compile as ctfp8
from ctfp8_compile import lowering, ops, passes
from ctfp8_compile.hf.compat import cache_argument
from ctfp8_compile.passes import horizontal_fusion, prepack
from ctfp8_compile.target import Target

ROOT = Path(__file__).parents[2]


def _device() -> str | None:
    if wanted := os.environ.get("CTFP8_TEST_DEVICE"):
        return wanted
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9):
        return "cuda"
    return "xpu" if torch.xpu.is_available() else None


DEVICE = _device()
pytestmark = pytest.mark.skipif(
    DEVICE is None, reason="needs an NVIDIA GPU of compute capability 8.9 or later, or an Intel GPU"
)
needs_cuda = pytest.mark.skipif(DEVICE != "cuda", reason="needs an NVIDIA GPU of compute capability 8.9 or later")
SCHEMES = [("channel", "token"), ("tensor", "tensor"), ("channel", "tensor"), ("block", "group"), ("channel", None)]


def libraries() -> list[str]:
    """What `ctfp8.kernels` may be on the device: `auto` takes fbgemm where that is installed."""
    if DEVICE == "cpu":
        return ["auto"]
    return ["auto", "scaled_mm", "triton", *(["mslk"] if importlib.util.find_spec("mslk") else [])]


@pytest.mark.parametrize(
    ("bias", "dtype"),
    [(False, torch.bfloat16), (True, torch.bfloat16), (True, torch.float16), (False, torch.float32)],
)
@pytest.mark.parametrize(("strategy", "activation"), SCHEMES)
@pytest.mark.parametrize("library", libraries())
def test_linear_against_float64(library, strategy, activation, bias, dtype):
    n, k = 256, 384
    module, state = layer(n, k, dtype, strategy, activation, bias)
    module.to(DEVICE)
    compiled = torch.compile(module, backend="ctfp8", fullgraph=True, dynamic=True, options={"ctfp8.kernels": library})
    scale = state["a.weight_scale"].reshape(-1, 1) if strategy != "block" else state["a.weight_scale"]
    block = {"channel": [1, k], "tensor": [n, k], "block": [128, 128]}[strategy]
    weight = state["a.weight"].double() * ops.expand_scale(scale.double(), block, n, k)
    target = Target.detect(DEVICE).limited_to(library)
    for rows in (1, 16, 77, 512):
        x = torch.randn(rows, k).to(DEVICE, dtype)
        got = compiled(x)
        scaled = _quantizes(ctfp8.explain(module, (x,), target=target))  # else the weight is dequantized
        read = quantized_activation(x.cpu(), activation, state.get("a.input_scale")) if scaled else x.cpu().double()
        want = read @ weight.t() + (state["a.bias"].double() if bias else 0)
        assert got.dtype == dtype
        # fast accumulation keeps fewer bits than float32; results are bfloat16
        assert relative_error(got.cpu(), want) < 6e-3, rows


@needs_cuda
def test_every_kernel_of_the_table_runs_here_or_says_why_not():
    target = Target.detect("cuda")
    reasons = []
    for kernel in lowering.kernels_of(target):
        for scaling in kernel.scalings:
            kind = kernel.kinds[0]
            shape = (256, 384) if kind == "linear" else (4, 256, 384)
            problem = lowering.Problem(
                kind, torch.bfloat16, (8, 384), shape,
                (128, 128) if scaling == "blockwise" else (1, 384), "group" if scaling == "blockwise" else "token", False,
            )  # fmt: skip
            reasons.append((kernel.name, kernel.supports(problem, target)))
    print(reasons)
    assert any(verdict for _, verdict in reasons)


@pytest.mark.parametrize("experts", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", ["qwen3moe/FP8_DYNAMIC", "qwen3moe/FP8", "qwen3moe/FP8_BLOCK", "mixtral/FP8"])
@pytest.mark.parametrize("library", libraries())
def test_experts_agree_with_the_same_graph_on_cpu(library, name, experts):
    _agrees_with_cpu(name, 0.05, library, experts_implementation=experts)


@pytest.mark.parametrize(
    "name", ["llama/FP8_DYNAMIC", "llama/FP8", "llama/FP8_BLOCK", "llama/MXFP8", "qwen3/FP8_DYNAMIC"]
)
@pytest.mark.parametrize("library", libraries())
def test_models_agree_with_the_same_graph_on_cpu(library, name):
    _agrees_with_cpu(name, 0.03, library)


#: Of logits, between two ways to round the same sums: to round each to bfloat16, which changes none by more than 0.004, moves them by
#: 0.034 to 0.049 (on a CPU), because some numbers of the next activation then get the FP8 value beside theirs, 0.06 to 0.12 off.
NEXT_CODE = 0.08


def _quantizes(report):
    """Whether activations are quantized on the device, so that the next FP8 value is the bound."""
    return DEVICE != "cpu" and any("weight-only" not in entry.kernel for entry in report.rewritten)


def _agrees_with_cpu(name, tolerance, library, **kwargs):
    """In float32, so that no router decides otherwise; the kernels write bfloat16."""
    model = ctfp8.from_pretrained(DATA / name, dtype=torch.float32, **kwargs)
    target = Target.detect(DEVICE).limited_to(library)
    report = ctfp8.explain(model, (IDS,), {"use_cache": False}, target=target)
    with torch.no_grad():
        # before lowering: the target's own operators may have no code for the CPU
        program = torch.export.export(model, (IDS,), {"use_cache": False}).run_decompositions({})
        if DEVICE != "cpu":
            horizontal_fusion.declare(program.graph)  # as compiled, fused: static scales with the largest of theirs
        passes.run(program.graph, target, lower=False)
        prepack.fold(program)
        want = program.module()(IDS, use_cache=False).logits
        model.to(DEVICE)
        compiled = torch.compile(model, backend="ctfp8", fullgraph=True, options={"ctfp8.kernels": library})
        got = compiled(IDS.to(DEVICE), use_cache=False).logits
    assert relative_error(got.cpu(), want) < (NEXT_CODE if _quantizes(report) else tolerance)
    assert {e.name for e in ctfp8.compiled_reports()[-1].rewritten} == {e.name for e in report.rewritten}


def test_an_artifact_gives_what_the_compiled_model_gives(tmp_path):
    model = ctfp8.from_pretrained(DATA / "llama/FP8_DYNAMIC").to(DEVICE)
    call = (IDS.to(DEVICE),), {"use_cache": False}
    ctfp8.export(model, *call, path=tmp_path / "model.pt2")
    got = ctfp8.load(tmp_path / "model.pt2", device=DEVICE)(*call[0], **call[1])
    got = got["logits"] if isinstance(got, dict) else got
    with torch.no_grad():
        want = torch.compile(model, backend="ctfp8", fullgraph=True)(*call[0], **call[1]).logits
    assert relative_error(got.cpu(), want.cpu()) < (NEXT_CODE if _quantizes(ctfp8.compiled_reports()[-1]) else 0.02)


@pytest.mark.parametrize(
    "name", ["llama/FP8_DYNAMIC", "qwen3/FP8_BLOCK", "qwen3moe/FP8_DYNAMIC", "llama/FP8_DYNAMIC_KV"]
)
def test_generation_is_two_graphs_and_no_recompilation(name):
    model = ctfp8.from_pretrained(DATA / name).to(DEVICE)
    mode = "reduce-overhead" if DEVICE == "cuda" else "default"
    forward = torch.compile(model.forward, backend="ctfp8", fullgraph=True, dynamic=False, mode=mode)
    cache = {cache_argument(model): ctfp8.static_cache(model, max_length=128)}
    counters = torch._dynamo.utils.counters
    ids, position = IDS[:1].to(DEVICE), torch.arange(IDS.shape[1], device=DEVICE)[None]
    with torch.no_grad():
        for step in range(66):
            torch.compiler.cudagraph_mark_step_begin()
            out = forward(ids, **cache, position_ids=position, logits_to_keep=1).logits
            ids = out[:, -1:].argmax(-1).clone()
            position = torch.full((1, 1), IDS.shape[1] + step, device=DEVICE)
    assert counters["stats"]["unique_graphs"] == 2
    if DEVICE == "cuda":
        assert counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.parametrize("name", ["llama/FP8_DYNAMIC", "llama/FP8_DYNAMIC_KV"])
def test_a_compiled_model_gives_what_it_gives_uncompiled(name):
    """But for its activations, which it rounds; so no model with a router, which may then decide otherwise."""
    model = ctfp8.from_pretrained(DATA / name, dtype=torch.float32).to(DEVICE)
    ids, caches = IDS[:1].to(DEVICE), cache_argument(model)

    def run():
        cache = {caches: ctfp8.static_cache(model, max_length=64)}
        with torch.no_grad():
            return [model(part, **cache).logits.cpu() for part in ids.split([12, 1, 1, 6], 1)]

    want = run()
    ctfp8.compile(model, fullgraph=True)
    got = run()
    assert all(relative_error(g, w) < 0.1 for g, w in zip(got, want, strict=True))  # activations are quantized
    assert len(model.generate(ids, max_new_tokens=8, do_sample=False)[0]) == ids.shape[1] + 8


@needs_cuda
def test_quantization_is_fused_and_q_k_v_are_one_matmul():
    """A block: norm+quantize, attention's pointwise work, quantize, norm+quantize, silu·mul+quantize, and four matmuls."""
    model = ctfp8.from_pretrained(DATA / "llama/FP8_DYNAMIC").to("cuda")
    with torch.no_grad():
        _, [code] = run_and_get_code(torch.compile(model.model.layers[0].mlp, backend="ctfp8", fullgraph=True),
                                     torch.randn(1, 64, 128, device="cuda", dtype=torch.bfloat16))  # fmt: skip
    body = code.partition("def call")[2]
    matmuls = re.findall(r"torch\.ops\.\w+\.f8f8bf16_rowwise\.default\(|extern_kernels\._scaled_mm\(", body)
    kernels = set(re.findall(r"triton_\w+\.run", body))
    assert len(matmuls) == 2, body  # gate and up; down
    assert len(kernels) == 2, body  # quantize x; silu, mul and quantize
    assert "cat" not in body


@needs_cuda
def test_weights_stay_fp8_in_memory():
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    model = ctfp8.from_pretrained(DATA / "qwen3moe/FP8_DYNAMIC", device_map="cuda")
    size = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert torch.cuda.memory_allocated() - base < 1.1 * size + (1 << 20)
    before = torch.cuda.memory_allocated()
    logits(torch.compile(lambda ids, **k: model(ids.to("cuda"), **k), backend="ctfp8"))
    assert torch.cuda.memory_allocated() - before < 32 << 20  # libraries' workspaces; no second copy of a weight
    assert all(p.device.type == "cuda" for p in model.parameters())


def test_the_command_line_runs_here(tmp_path):
    """Where nothing is said of a device, it is the GPU."""
    model, artifact = ROOT / "examples/models/llama", tmp_path / "model.pt2"

    def ctfp8_command(*arguments):
        done = subprocess.run(
            [sys.executable, "-m", "ctfp8_compile", *map(str, arguments)],
            capture_output=True, text=True, cwd=ROOT, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert str(Target.detect(DEVICE)) in ctfp8_command("explain", model)
    ctfp8_command("export", model, artifact, "--cache", 128)
    # at each of its 24 tokens the likeliest leads by 0.06 or more in float64; after "def add(a, b):" by 0.02, less than rounding moves
    options = ("--prompt", "import os", "--max-new-tokens", 24)
    texts = [
        ctfp8_command("generate", model, *options),
        ctfp8_command("generate", model, *options, "--eager"),
        ctfp8_command("generate", artifact, "--tokenizer", model, *options),
    ]
    assert texts[0] == texts[2]
    assert all(text.startswith("import os") and len(text) > 20 for text in texts), texts
    rows = json.loads(ctfp8_command("bench", model, "--rounds", 2, "--new-tokens", 4, "--json"))
    assert rows["ctfp8"]["weight_bytes"] < 0.7 * rows["bf16 eager"]["weight_bytes"]
