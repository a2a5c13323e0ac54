"""Attention to a cache in whole models: what the rule takes, what it leaves and why, through compile, explain and artifacts."""

from __future__ import annotations

import pytest
import torch
from conftest import DATA, relative_error
from torch import Tensor, nn

import ctfp8_compile as ctfp8
from ctfp8_compile.hf.compat import cache_argument
from ctfp8_compile.passes.pipeline import run
from ctfp8_compile.target import Target

IDS = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))


def run_steps(model: nn.Module, call, cache, ids: Tensor, padding: int = 0) -> Tensor:
    """A prompt of all but three tokens, then one at a time; the second text has padding on its left."""
    mask = torch.ones(len(ids), ids.shape[1], dtype=torch.int64)
    mask[1:, :padding] = 0
    out, done = [], 0
    for n in (ids.shape[1] - 3, 1, 1, 1):
        inputs = {"input_ids": ids[:, done : done + n], "attention_mask": mask[:, : done + n]}
        with torch.no_grad():
            out.append(call(**inputs, use_cache=True, **{cache_argument(model): cache}).logits)
        done += n
    return torch.cat(out, 1)


@pytest.mark.parametrize("dtype", [pytest.param(torch.bfloat16, marks=pytest.mark.long), torch.float32])
def test_a_compiled_model_reads_its_cache_once(dtype: torch.dtype) -> None:
    model = ctfp8.from_pretrained(DATA / "llama/FP8_DYNAMIC", dtype=dtype)
    ids, before = IDS % model.config.vocab_size, len(ctfp8.compiled_reports())
    want = run_steps(model, model, ctfp8.static_cache(model, 2, 300), ids, padding=2)
    compiled = torch.compile(model, backend="ctfp8", fullgraph=True, dynamic=False)
    got = run_steps(model, compiled, ctfp8.static_cache(model, 2, 300), ids, padding=2)
    assert relative_error(got, want) < (1e-5 if dtype == torch.float32 else 0.02)
    reports = ctfp8.compiled_reports()[before:]
    assert reports
    for report in reports:
        assert [e.name for e in report.attention] == [
            f"model.layers.{i}.self_attn" for i in range(model.config.num_hidden_layers)
        ]
        assert {(e.kernel, e.reason) for e in report.attention} == {("fused attention", "")}
        assert f"{model.config.num_hidden_layers} attention to a cache → fused attention" in report.summary()


class Attention(nn.Module):
    def __init__(self, **kwargs: object):
        super().__init__()
        self.kwargs = kwargs

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        k, v = (
            t if t.shape[1] == q.shape[1] else t[:, :, None].expand(-1, -1, q.shape[1] // t.shape[1], -1, -1).reshape(
                t.shape[0], q.shape[1], *t.shape[2:])
            for t in (k, v)
        )  # fmt: skip
        return nn.functional.scaled_dot_product_attention(q, k, v, mask, **self.kwargs)


Q, K, V = torch.randn(2, 4, 1, 16), torch.randn(2, 2, 40, 16), torch.randn(2, 2, 40, 16)


@pytest.mark.parametrize(
    ("kwargs", "inputs", "reason"),
    [
        ({}, (Q, K, V, torch.rand(2, 1, 1, 40) > 0.5), ""),
        ({"scale": 0.3}, (Q, K, V, torch.randn(40).expand(1, 1, 1, 40)), ""),
        ({}, (Q, K, V), ""),
        ({}, (Q, K[:, :1], V[:, :1]), ""),
        ({"is_causal": True}, (Q, K, V), "it has dropout, or a causal mask of its own"),
        ({}, (Q, K, V, torch.rand(1, 40) > 0.5), "its mask has not a column for each token of the cache"),
        ({}, (K, K, V), None),  # an encoder's
    ],
)
def test_what_is_taken_and_what_is_left(kwargs: dict, inputs: tuple, reason: str | None) -> None:
    module = Attention(**kwargs)
    program = torch.export.export(module, inputs).run_decompositions({})
    report = run(program.graph, Target("cpu"))
    program.graph_module.recompile()
    assert [e.reason for e in report.attention] == ([] if reason is None else [reason])
    used = [n for n in program.graph.nodes if n.target is torch.ops.ctfp8.attention.default]
    assert len(used) == (reason == "")
    assert len([n for n in program.graph.nodes if n.op == "call_function"]) == 1 or reason != ""
    torch.testing.assert_close(program.module()(*inputs), module(*inputs))


def test_an_artifact_fuses_where_it_is_loaded(tmp_path) -> None:
    model = ctfp8.from_pretrained(DATA / "llama/FP8_DYNAMIC", dtype=torch.float32)
    decoder = ctfp8.StaticCacheDecoder(model, 1, 80)
    ids, tokens = IDS[:1] % model.config.vocab_size, torch.export.Dim("tokens", max=80)
    layers = model.config.num_hidden_layers
    ctfp8.export(decoder, (ids, torch.tensor(0)), path=tmp_path / "m.pt2", dynamic_shapes=({1: tokens}, None))
    loaded = ctfp8.load(tmp_path / "m.pt2")
    assert [e.kernel for e in loaded.report.attention] == ["fused attention"] * layers
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
        got = torch.cat(
            [loaded(ids[:, :6], torch.tensor(0)), *(loaded(ids[:, i : i + 1], torch.tensor(i)) for i in (6, 7, 8))], 1
        )
    assert relative_error(got, want) < 1e-5
    report = ctfp8.explain(decoder, (ids, torch.tensor(0)))
    assert len(report.attention) == layers
    assert not ctfp8.explain(decoder, (ids, torch.tensor(0)), target="cuda:sm90").attention
