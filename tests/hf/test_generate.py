"""transformers' habits through the backend: generate, CompileConfig, pipeline, padded batches, encoders.

No graph breaks, and no compilation after the warm-up: dynamo's counters say so.
"""

from __future__ import annotations

import pytest
import torch
from conftest import DATA
from support.forge import forge
from transformers import AutoTokenizer, CompileConfig, pipeline

import ctfp8_compile as ctfp8
from ctfp8_compile.hf.compat import cache_argument

SHIPPED = DATA.parent.parent / "examples/models"
GREEDY = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED / "llama")  # of bytes
    tokenizer.padding_side = "left"
    return tokenizer


@pytest.fixture
def model():
    """In float32, so that eager and compiled agree on every token; a fresh one, because tests replace its forward."""
    return ctfp8.from_pretrained(DATA / "llama/FP8", dtype=torch.float32)


def graphs() -> int:
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"], dict(counters["graph_break"])
    return counters["stats"]["unique_graphs"]


def compiled_twice_alike(call, want, expected_graphs):
    """Two calls give what is wanted; the second compiles nothing."""
    assert torch.equal(call(), want)
    assert graphs() == expected_graphs
    assert torch.equal(call(), want)
    assert graphs() == expected_graphs


@pytest.mark.long
def test_generate_and_pipeline_with_a_compiled_forward_and_a_static_cache(tokenizer):
    model = ctfp8.from_pretrained(DATA / "qwen3moe/FP8_DYNAMIC", dtype=torch.float32)
    inputs = tokenizer("Return a list of ", return_tensors="pt")
    want = model.generate(**inputs, **GREEDY)
    model.forward = torch.compile(model.forward, backend="ctfp8", fullgraph=True)
    cache = ctfp8.static_cache(model, max_length=64)

    def call():
        cache.reset()
        return model.generate(**inputs, **GREEDY, **{cache_argument(model): cache})

    compiled_twice_alike(call, want, expected_graphs=2)  # the prompt, and one token
    assert all(not report.kept for report in ctfp8.compiled_reports()[-2:])

    cache.reset()
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    out = pipe("Return a list of ", **GREEDY, **{cache_argument(model): cache})
    assert out[0]["generated_text"] == tokenizer.decode(want[0], skip_special_tokens=True)
    assert graphs() == 2


@pytest.mark.long
def test_generate_with_a_compile_config(model, tokenizer):
    """transformers compiles the decoding step only; on a CPU only if told so."""
    inputs = tokenizer("Return a list of ", return_tensors="pt")
    want = model.generate(**inputs, **GREEDY)
    config = CompileConfig(backend="ctfp8", mode="default", fullgraph=True)
    config._compile_all_devices = True
    compiled_twice_alike(
        lambda: model.generate(**inputs, **GREEDY, cache_implementation="static", compile_config=config), want, 1
    )


@pytest.mark.long
def test_a_padded_batch_gives_what_its_texts_give_alone(model, tokenizer):
    texts = ["Return a list of ", "def "]
    alone = [
        tokenizer.decode(model.generate(**tokenizer(text, return_tensors="pt"), **GREEDY)[0], skip_special_tokens=True)
        for text in texts
    ]
    model.forward = torch.compile(model.forward, backend="ctfp8", fullgraph=True)
    cache = ctfp8.static_cache(model, batch_size=2, max_length=64)
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    assert (inputs.attention_mask == 0).any()
    for _ in range(2):
        cache.reset()
        out = model.generate(**inputs, **GREEDY, **{cache_argument(model): cache})
        assert tokenizer.batch_decode(out, skip_special_tokens=True) == alone
        assert graphs() == 2


@pytest.mark.long
def test_an_encoder_embeds_padded_batches_of_every_length(tmp_path):
    """As sentence-transformers calls its models: a padded batch, the mean over each text's tokens."""
    forged = forge("bert", "FP8_DYNAMIC", tmp_path, dtype=torch.float32, scale_dtype=torch.float32)
    model = ctfp8.from_pretrained(tmp_path, forged.auto_class, dtype=torch.float32).base_model
    compiled = torch.compile(model, backend="ctfp8", fullgraph=True, dynamic=True)
    for length in (9, 12, 17):
        ids = torch.arange(3 * length).reshape(3, length) % 50 + 3
        mask = (torch.arange(length)[None] < torch.tensor([[length], [length - 4], [2]])).long()
        with torch.no_grad():
            eager, got = (m(input_ids=ids, attention_mask=mask).last_hidden_state for m in (model, compiled))
        weights = (mask / mask.sum(1, keepdim=True))[..., None]
        torch.testing.assert_close((got * weights).sum(1), (eager * weights).sum(1), atol=1e-4, rtol=1e-3)
    assert graphs() == 1
    assert len(ctfp8.compiled_reports()[-1].rewritten) == len(forged.fp8_names)


@pytest.mark.parametrize("architecture", ["llama", "deepseek_v3", "gemma3", "mistral"])
def test_a_static_cache_exists_before_the_first_token(architecture, tmp_path):
    """Of each kind of attention: with as many heads for keys, latent, with a sliding window."""
    forged = forge(architecture, "FP8_DYNAMIC", tmp_path, dtype=torch.float32, scale_dtype=torch.float32)
    model = ctfp8.from_pretrained(tmp_path, dtype=torch.float32)
    cache = ctfp8.static_cache(model, batch_size=2, max_length=32)
    begun = [layer for layer in cache.layers if layer.is_initialized]
    assert len(begun) == (0 if architecture == "deepseek_v3" else len(cache.layers))
    before = [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in begun]
    ids = forged.inputs["input_ids"][:1].expand(2, -1)[:, :8]
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
        keywords = {cache_argument(model): cache}
        got = torch.cat([model(ids[:, :6], **keywords).logits, model(ids[:, 6:], **keywords).logits], 1)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-3)
    assert [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in begun] == before
