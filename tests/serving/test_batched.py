"""`generate_batch` on our models: tokens of `generate` alone, in a bounded number of graphs, which serving adds none to."""

from __future__ import annotations

import shutil
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import DATA
from safetensors.torch import load_file, save_file
from support.served import SHIPPED
from torch._dynamo.utils import counters
from transformers import AutoTokenizer, ContinuousBatchingConfig, GenerationConfig

import ctfp8_compile as ctfp8
from ctfp8_compile.hf import paged
from ctfp8_compile.hf.serving_batch import Batched
from ctfp8_compile.hf.serving_room import Room

pytestmark = pytest.mark.filterwarnings("ignore")
PROMPTS = ["Return a list of ", "def main(", "x" * 90, "class A", "a", "import os\n" * 15]
ENGINE = dict(num_blocks=64, page_size=32, max_batch_tokens=64, max_requests_per_batch=4)
GREEDY = dict(do_sample=False, eos_token_id=-1, pad_token_id=0)


def load(name, **more):
    folder = SHIPPED / name
    model = ctfp8.from_pretrained(folder, dtype=torch.float32, **more)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return model, [tokenizer(prompt).input_ids for prompt in PROMPTS]


def alone(model, ids, new_tokens):
    with torch.no_grad():
        return model.generate(torch.tensor([ids]), max_new_tokens=new_tokens, **GREEDY)[0, len(ids) :].tolist()


def batch(model, prompts, new_tokens, **more):
    out = model.generate_batch(
        prompts,
        GenerationConfig(max_new_tokens=new_tokens, **GREEDY),
        ContinuousBatchingConfig(**ENGINE | more),
    )
    assert [found.error for found in out.values()] == [None] * len(prompts)
    return [found.generated_tokens for found in out.values()]


def graphs():
    return counters["stats"]["unique_graphs"]


@pytest.mark.quick("llama")
@pytest.mark.parametrize("name", ["llama", "moe"])
def test_a_batch_is_each_text_alone(name):
    model, prompts = load(name)
    want = [alone(model, ids, 12) for ids in prompts]
    assert batch(model, prompts, 12) == want
    assert model.config._attn_implementation == "sdpa"  # as it was
    assert [alone(model, ids, 12) for ids in prompts[:2]] == want[:2]
    assert batch(model, prompts, 12, page_size=16, max_batch_tokens=33) == want


@pytest.mark.long
@pytest.mark.ci("llama")
@pytest.mark.parametrize("name", ["llama", "moe"])
def test_a_compiled_batch_is_each_text_alone_in_three_graphs(name):
    model, prompts = load(name)
    want = [alone(model, ids, 16) for ids in prompts]
    ctfp8.compile(model, fullgraph=True)
    batch(model, [prompts[0]], 4)  # one text, then one token
    batch(model, prompts[:3], 4)  # several
    assert graphs() == 3
    for more in ({}, dict(page_size=16, num_blocks=200), dict(max_batch_tokens=33), dict(max_requests_per_batch=2)):
        assert batch(model, prompts, 16, **more) == want
        assert batch(model, prompts[:1], 16, **more) == want[:1]
    assert graphs() == 3
    assert not counters["graph_break"]


@pytest.mark.long
@pytest.mark.nightly
def test_serving_compiles_nothing_after_its_warm_up():
    model, prompts = load("llama")
    want = [alone(model, ids, 16) for ids in prompts]
    ctfp8.compile(model, fullgraph=True)
    engine = Batched(model, Room(4, 512, step=64))
    engine.start()
    try:
        engine.warm_up([[1] * 3], 2)
        engine.warm_up([[1] * length for length in (2, 3, 4)])
        before = graphs()
        assert before == 3
        for count in (1, 2, 4, 9, 24):
            engine.warm_up([(ids + prompts[0] * i)[:400] for i in range(4) for ids in prompts][:count], 9)
        assert graphs() == before
        assert not counters["graph_break"]
        with pytest.raises(ctfp8.UsageError, match="is batching requests"):
            model(torch.ones(1, 3, dtype=torch.long))
    finally:
        engine.stop()
    assert batch(model, prompts, 16) == want
    assert graphs() == before


def test_what_is_not_batched_by_pages_of_ours_is_said_once_and_right():
    model = ctfp8.from_pretrained(DATA / "llama/FP8_DYNAMIC", attn_implementation="eager", dtype=torch.float32)
    prompts = [[5, 6, 7], [8, 9, 10, 11]]
    want = [alone(model, ids, 6) for ids in prompts]
    ctfp8.compile(model)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        assert batch(model, prompts, 6) == want
        batch(model, prompts, 6)
    said = [str(w.message) for w in found if "batched, but not compiled" in str(w.message)]
    assert len(said) == 1
    assert "not sdpa" in said[0]
    assert graphs() == 0


def test_a_model_that_is_batched_is_not_called_beside():
    model, prompts = load("llama")
    manager = model.init_continuous_batching(GenerationConfig(**GREEDY), ContinuousBatchingConfig(**ENGINE))
    assert model.config._attn_implementation == paged.NAME
    with pytest.raises(ctfp8.UsageError, match="cannot be called beside"):
        model(torch.tensor([prompts[0]]))
    manager.start()
    with pytest.raises(ctfp8.UsageError, match="cannot be called beside"):
        batch(model, prompts, 4)
    manager.stop()
    assert batch(model, prompts[:1], 4) == [alone(model, prompts[0], 4)]
    assert model(torch.tensor([prompts[0]])).logits.shape[1] == len(prompts[0])


# FP8 pages


def biased(folder):
    """A calibrated checkpoint whose caches have a bias of each head and column, too, as ModelOpt's affine ones."""
    torch.manual_seed(0)
    shutil.copytree(DATA / "llama/FP8_DYNAMIC_KV", folder)
    state = load_file(folder / "model.safetensors")
    for layer in range(2):
        for which in "kv":
            state[f"model.layers.{layer}.self_attn.{which}_proj.{which}_bias"] = torch.randn(1, 2, 1, 32)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.quick("llama")
@pytest.mark.parametrize("source", ["llama", "moe", "llama/FP8_DYNAMIC_KV", "writers/quark-fp8-llama", "biased"])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=[pytest.mark.long, pytest.mark.ci("llama")])])
def test_fp8_pages_hold_what_an_fp8_cache_of_ours_holds(source, compiled, tmp_path):
    """Scales of each token and head, of a calibration, of each head, with biases: the tokens are those of `dynamic_cache`."""
    folder = (
        biased(tmp_path / "biased")
        if source == "biased"
        else next(f for f in (SHIPPED / source, DATA / source) if (f / "config.json").exists())
    )
    model = ctfp8.from_pretrained(folder, dtype=torch.float32)
    prompts = [[5, 6, 7], [8, 9, 10, 11] * 20, [3] * 70, [3] * 64 + [9]]
    want = []
    with torch.no_grad():
        for ids in prompts:
            out = model.generate(
                torch.tensor([ids]), max_new_tokens=12, cache=ctfp8.dynamic_cache(model, "fp8"), **GREEDY
            )
            want.append(out[0, len(ids) :].tolist())
    plain = batch(model, prompts, 12)
    assert plain != want or source == "moe"  # whose first tokens are the same
    if compiled:
        ctfp8.compile(model, fullgraph=True)
    ctfp8.paged_cache(model, "fp8")
    assert batch(model, prompts, 12) == want
    manager = model.init_continuous_batching(GenerationConfig(**GREEDY), ContinuousBatchingConfig(**ENGINE))
    (pages,) = manager._create_batch_processor().cache.cache_allocators.values()
    own = 0 if source.endswith(("KV", "biased")) else 1
    config = model.config.get_text_config()
    assert pages.cache_tensor.dtype == torch.uint8
    assert pages.cache_tensor.shape[2:] == (config.num_key_value_heads, config.head_dim + own)
    assert pages.cache_tensor.shape[0] >= ENGINE["num_blocks"] * ENGINE["page_size"] * config.num_hidden_layers
    assert batch(model, prompts, 12, page_size=16, max_batch_tokens=33) == want
    assert graphs() == (3 if compiled else 0)
    ctfp8.paged_cache(model, "bf16")
    assert batch(model, prompts, 12) == plain


def test_fp8_pages_are_refused_where_steps_are_not_ours():
    model = ctfp8.from_pretrained(DATA / "llama/FP8_DYNAMIC_KV", attn_implementation="eager", dtype=torch.float32)
    with pytest.raises(ctfp8.UsageError, match="a cache is 'fp8', 'bf16'"):
        ctfp8.paged_cache(model, "int8")
    ctfp8.paged_cache(model, "fp8")
    with pytest.raises(
        ctfp8.UsageError, match=r"cannot be FP8: its attention is .*eager, not sdpa\. Keep them in its dtype"
    ):
        batch(model, [[5, 6, 7]], 4)
    ctfp8.paged_cache(model, "auto")  # where it can
    assert batch(model, [[5, 6, 7]], 4) == [alone(model, [5, 6, 7], 4)]


# Several callers of one model


@pytest.mark.long
@pytest.mark.parametrize("calls", [24, pytest.param(1000, marks=pytest.mark.nightly)])
def test_threads_that_generate_with_one_compiled_model_get_their_own_texts(calls):
    """Each has its own cache. What one of them compiled before, all use."""
    model, prompts = load("llama")
    want = [alone(model, ids, 8) for ids in prompts]
    ctfp8.compile(model)
    own = threading.local()

    def ask(i):
        if not hasattr(own, "cache"):
            own.cache = ctfp8.static_cache(model, max_length=256)
        own.cache.reset()
        ids = torch.tensor([prompts[i % len(prompts)]])
        with torch.no_grad():
            out = model.generate(ids, cache=own.cache, max_new_tokens=8, **GREEDY)
        return out[0, ids.shape[1] :].tolist() == want[i % len(prompts)]

    assert all(map(ask, range(len(prompts))))
    before = graphs()
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(calls)))
    assert graphs() == before
