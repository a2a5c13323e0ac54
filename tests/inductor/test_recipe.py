"""`ctfp8.compile`: how many graphs prompts of many sizes make, what a second call does, what is said at torch's limit."""

from __future__ import annotations

import copy
import inspect
import io
import logging
import sys
import threading
import warnings

import pytest
import torch
from conftest import DATA, fp8_config, quantize
from torch import nn

import ctfp8_compile as ctfp8
from ctfp8_compile.hf.compat import cache_argument
from ctfp8_compile.inductor import backend as backend_module
from ctfp8_compile.inductor import recipe

LENGTHS = (5, 9, 17, 3, 30, 12, 21)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(64, 64, bias=False) for _ in range(2)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.fixture
def module():
    state = {}
    generator = torch.Generator().manual_seed(0)
    for i in range(2):
        fp8, scale = quantize(torch.randn(64, 64, generator=generator))
        state |= {f"layers.{i}.weight": fp8, f"layers.{i}.weight_scale": scale}
    return ctfp8.load_state_dict(Two(), state, fp8_config())


def graphs() -> int:
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"], dict(counters["graph_break"])
    return counters["stats"]["unique_graphs"]


def generate(model, rows, length, **more):
    ids = torch.arange(5, 5 + length)[None].repeat(rows, 1)
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False, **more)


def test_prompts_of_many_sizes_make_four_graphs():
    """By the way that users go, with a cache that grows; dynamo decides that, whatever the compiler behind it."""
    model = ctfp8.from_pretrained(DATA / "llama/FP8", dtype=torch.float32)
    want = generate(model, 1, 9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ctfp8.compile(model, backend="eager") is model
        for rows in (1, 2, 3, 4):
            for length in LENGTHS:
                generate(model, rows, length)
            assert graphs() == (2 if rows == 1 else 4)
    assert torch.equal(generate(model, 1, 9), want)


@pytest.mark.ci(True)
@pytest.mark.long
@pytest.mark.parametrize("static", [False, True])
def test_our_compiler_makes_as_many(static):
    model = ctfp8.from_pretrained(DATA / "llama/FP8", dtype=torch.float32)
    want = {(rows, length): generate(model, rows, length) for rows in (1, 2, 3) for length in LENGTHS}
    ctfp8.compile(model, fullgraph=True)
    for (rows, length), tokens in want.items():
        cache = {cache_argument(model): ctfp8.static_cache(model, rows, 64)} if static else {}
        assert torch.equal(generate(model, rows, length, **cache), tokens)
    assert graphs() == 4
    assert all(not report.kept for report in ctfp8.compiled_reports()[-4:])


def test_a_second_call_replaces_the_first(module):
    plain = module.forward
    signature = inspect.signature(plain)
    module.forward = torch.compile(module.forward, backend="eager")
    ctfp8.compile(module, backend="eager")
    ctfp8.compile(module, backend="eager", fullgraph=True)
    assert module.forward._torchdynamo_orig_callable == plain
    assert inspect.signature(module.forward) == signature
    module(torch.ones(3, 64))
    assert graphs() == 1
    report = ctfp8.explain(module, (torch.ones(3, 64),))  # traces what was compiled
    assert len(report.rewritten) + len(report.kept) == 2


def test_our_compiler_gives_the_modules_values(module):
    x = torch.randn(3, 64)
    want = module(x)
    torch.testing.assert_close(ctfp8.compile(module)(x), want, atol=1e-2, rtol=1e-2)
    with pytest.raises(ctfp8.UsageError, match="an input of this graph requires a gradient"):
        module(torch.randn(4, 1, 64, requires_grad=True))


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (None, {"max_autotune": True, "coordinate_descent_tuning": True}),
        ({"epilogue_fusion": False}, {"max_autotune": True, "epilogue_fusion": False}),
        ({"ctfp8.regions": False, "max_autotune": False}, {"max_autotune": False, "coordinate_descent_tuning": True}),
    ],
)
def test_mode_and_options_together(module, monkeypatch, options, wanted):
    """Inductor gets what the mode sets, and the options over it; torch.compile itself takes one of the two."""
    mode = "max-autotune-no-cudagraphs"
    got = []

    def compile_fx(graph, inputs, config_patches):
        got.append(config_patches)
        return graph.forward

    monkeypatch.setattr(backend_module, "compile_fx", compile_fx)
    want = module(torch.ones(3, 64))
    compiled = ctfp8.compile(module, mode=mode, options=options)
    assert torch.equal(compiled(torch.ones(3, 64)), want)
    assert wanted.items() <= got[0].items()
    assert not [name for name in got[0] if name.startswith("ctfp8")]
    if options:
        with pytest.raises(RuntimeError, match="Either mode or options can be specified"):
            torch.compile(module, backend="ctfp8", mode=mode, options=options)


def test_inductor_is_asked_for_vector_instructions_once_and_beside(module, monkeypatch):
    asked = []
    monkeypatch.setattr(recipe, "valid_vec_isa_list", lambda: asked.append(threading.current_thread()))
    monkeypatch.setattr(recipe, "_asked", threading.Event())
    other = ctfp8.compile(copy.deepcopy(module), backend=lambda graph, inputs: graph.forward)
    other(torch.randn(3, 64))
    assert not asked  # which may not be Inductor's
    for _ in range(2):
        torch.compiler.reset()
        ctfp8.compile(module)(torch.randn(3, 64))
    assert len(asked) == 1
    assert asked[0] is not threading.current_thread()


def test_a_copy_runs_its_own_weights(module):
    ctfp8.compile(module, backend="eager")
    x = torch.randn(3, 64)
    other = copy.deepcopy(module)
    other.layers[0].parametrizations.weight[0].weight_scale.mul_(2)
    torch.testing.assert_close(other(x), 2 * module(x))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's
def test_an_adapters_model_is_compiled_where_it_generates():
    import peft

    base = ctfp8.from_pretrained(DATA / "llama/FP8", dtype=torch.float32)
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.train()
    with pytest.raises(ctfp8.UsageError, match="in training mode"):
        ctfp8.compile(model)
    model.eval()
    want = generate(model, 1, 9)
    ctfp8.compile(model, backend="eager")
    assert torch.equal(generate(model, 1, 9), want)
    assert graphs() == 2


def test_what_holds_no_fp8_weight_is_refused():
    with pytest.raises(ctfp8.UsageError, match="Two holds no FP8 weight"):
        ctfp8.compile(Two().eval())


def test_loading_compiles_if_it_is_to(monkeypatch):
    seen = []
    monkeypatch.setattr(recipe, "compile", lambda model, **arguments: seen.append(arguments))
    for wanted in (False, True, {"fullgraph": True}):
        ctfp8.from_pretrained(DATA / "llama/FP8", compile=wanted)
    assert seen == [{}, {"fullgraph": True}]


def call(module, sizes):
    for rows in sizes:
        module(torch.ones(rows, 64))


def test_at_torchs_limit_it_says_once_which_guard_fails_and_what_to_do(module, caplog):
    with torch.compiler.config.patch(recompile_limit=2):
        ctfp8.compile(module, backend="eager", dynamic=False)
        call(module, (3, 4))
        with pytest.warns(UserWarning, match="was compiled 2 times") as warned:
            call(module, (5, 6, 7))
        (warning,) = warned
        assert "2 of 2 because of tensor 'x' size mismatch at index 0" in str(warning.message)
        assert "Leave dynamic=True" in str(warning.message)
        assert "runs uncompiled" in str(warning.message)
        assert "hit config" not in caplog.text
        torch._dynamo.reset()
        ctfp8.compile(module, backend="eager", dynamic=False, fullgraph=True)
        with pytest.raises(ctfp8.UsageError, match="none of its graphs fits this call"):
            call(module, (3, 4, 5))


def test_a_growing_cache_is_told_of_the_static_one():
    grown = [
        f"{n}/0: tensor 'kwargs['cache'].layers[0].keys' size mismatch at index 2. expected {n}, actual 9"
        for n in range(7)
    ]
    said = recipe._why(8, [*grown, "7/0: len(kwargs) == 3"])
    assert "7 of 8 because of tensor 'kwargs['cache'].layers[0].keys' size mismatch at index 2" in said
    assert "ctfp8.static_cache" in said


@pytest.mark.skipif(not recipe._ISOLATES, reason="torch before 2.13 counts all calls of a function together")
def test_models_of_one_class_do_not_share_the_limit(module):
    other = copy.deepcopy(module)
    with torch.compiler.config.patch(recompile_limit=2), warnings.catch_warnings():
        warnings.simplefilter("error")
        for one in (module, other):
            ctfp8.compile(one, backend="eager", dynamic=False)
            call(one, (3, 4))
    assert graphs() == 4


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_a_terminal_shows_what_is_compiled(module, monkeypatch, stream, caplog):
    shown = stream()
    monkeypatch.setattr(sys, "stderr", shown)
    caplog.set_level(logging.INFO, "ctfp8_compile")
    ctfp8.compile(module, backend="eager", dynamic=False)
    call(module, (3, 4))
    text = shown.getvalue()
    assert ("compiling 2 FP8 weights in 2 layers for cpu" in text) == (stream is Terminal)
    assert ("graph 2" in text) == (stream is Terminal)
    logged = [record.getMessage() for record in caplog.records]
    assert logged[0] == "compiling 2 FP8 weights in 2 layers for cpu …"
    assert logged[1] == "compiling 2 FP8 weights in 2 layers for cpu: tracing"
    assert logged[2].startswith("compiling 2 FP8 weights in 2 layers for cpu took ")
    assert len(logged) == 6
