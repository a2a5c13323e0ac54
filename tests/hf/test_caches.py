"""Caches of every architecture that generates: made by default without a word against it, right, in FP8 where there are keys."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from conftest import DATA, relative_error
from support.architectures import ARCHITECTURES, Sizes
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import ctfp8_compile as ctfp8
from ctfp8_compile.hf.cache_scales import CacheScales
from ctfp8_compile.hf.compat import cache_argument

SMALL = Sizes(hidden=64, intermediate=96, expert=32)
_BASE = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_LINEAR = {
    "head_dim": 16, "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "layer_types": ["linear_attention", "full_attention"] * 2,
}  # fmt: skip
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
_WINDOWS = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * 2, "head_dim": 16}
_PER_LAYER = {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 256}
#: Linear attention beside attention, shared and equal keys and values, widths and heads that differ by layer or by side.
ODD: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_next": ("qwen3_next", {**_LINEAR, **_EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 32}),
    "qwen3_5": ("qwen3_5_text", _LINEAR),
    "gemma4, shared layers": ("gemma4_text", {**_WINDOWS, **_PER_LAYER, "global_head_dim": 32, "num_kv_shared_layers": 2}),
    "gemma4, keys are values": ("gemma4_text", {
        **_WINDOWS, "global_head_dim": 32, "num_global_key_value_heads": 1, "attention_k_eq_v": True,
        "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0}),
    "gemma3n": ("gemma3n_text", {
        **_WINDOWS, **_PER_LAYER, "intermediate_size": [96] * 4, "num_kv_shared_layers": 2, "laurel_rank": 8,
        "activation_sparsity_pattern": [0.0] * 4}),
    "mimo": ("mimo_v2_flash", {
        **_EXPERTS, "head_dim": 24, "v_head_dim": 16, "sliding_window": 6, "n_routed_experts": 4, "n_group": 1,
        "topk_group": 1, "layer_types": ["full_attention", "sliding_attention"] * 2}),
    "falcon_h1": ("falcon_h1", {
        "head_dim": 16, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16,
        "mamba_chunk_size": 8}),
    "falcon": ("falcon", {"multi_query": True}),
    "falcon, all heads": ("falcon", {"multi_query": False}),
    "falcon, grouped": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "gpt_neox": ("gpt_neox", {}),
}  # fmt: skip
NAMES = [name for name in ARCHITECTURES if name not in ("bert", "mixtral_w123", "granitemoe_3d")] + list(ODD)
#: With the state of linear attention in every layer, or nothing but that.
TRACED = ["qwen3_next", "gemma4, shared layers", "gemma4, keys are values", "mimo"]
IDS = torch.arange(5, 33).mul(7).remainder(230).add(3).reshape(2, 14)
STEPS = (9, 1, 1, 1, 1, 1)


def made(name: str) -> Any:
    torch.manual_seed(0)
    if name in ODD:
        kind, own = ODD[name]
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**_BASE, **own}), dtype=torch.float32)
    else:
        architecture = ARCHITECTURES[name]
        model = architecture.auto_class.from_config(architecture.config(SMALL), dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            parameter.data.mul_(2)  # so that attention is not flat
    return model.eval()


def run(model: Any, cache: Any, call: Any = None) -> Tensor:
    done, out = 0, []
    for n in STEPS:
        with torch.no_grad():
            out.append(
                (model if call is None else call)(
                    input_ids=IDS[:, done : done + n], use_cache=True, **{cache_argument(model): cache}
                ).logits
            )
        done += n
    return torch.cat(out, 1)


@pytest.mark.parametrize("name", NAMES)
def test_every_architecture(name: str) -> None:
    model = made(name)
    want = run(model, DynamicCache(config=model.config))
    for cache in (ctfp8.static_cache(model, 2, 40), ctfp8.dynamic_cache(model)):
        assert relative_error(run(model, cache), want) < 1e-5
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        caches = [ctfp8.static_cache(model, 2, 40, "fp8"), ctfp8.dynamic_cache(model, "fp8")]
    said = [str(w.message) for w in caught if "of the cache of" in str(w.message)]
    states = any(type(layer).__name__ == "LinearAttentionLayer" for layer in caches[0].layers)
    assert len(said) == int(states), "once, where a layer keeps something else"
    for cache in caches:
        assert 0 < relative_error(run(model, cache), want) < 0.2
        assert torch.uint8 in {layer.keys.dtype for layer in cache.layers if getattr(layer, "keys", None) is not None}
    caches[0].reset()
    assert 0 < relative_error(run(model, caches[0]), want) < 0.2


@pytest.mark.ci("gemma4, shared layers-fp8")
@pytest.mark.long
@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
@pytest.mark.parametrize("name", TRACED)
def test_compiled(name: str, dtype: Any) -> None:
    model = made(name)
    want = run(model, ctfp8.static_cache(model, 2, 40, dtype))
    compiled = torch.compile(model, backend="ctfp8", fullgraph=True, dynamic=False)
    assert relative_error(run(model, ctfp8.static_cache(model, 2, 40, dtype), compiled), want) < 1e-3


def test_nothing_to_keep_in_fp8() -> None:
    """What the file asks for by default is never refused; what the user asks for is."""
    config = AutoConfig.for_model("mamba2", vocab_size=256, hidden_size=64, num_hidden_layers=2, state_size=16, num_heads=8,
                                  head_dim=16, n_groups=1, chunk_size=8)  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for make in (lambda dtype: ctfp8.static_cache(model, 1, 8, dtype), lambda dtype: ctfp8.dynamic_cache(model, dtype)):
        with pytest.raises(
            ctfp8.UsageError, match=r"2 of 2 layers of the cache of Mamba2ForCausalLM \(LinearAttentionLayer\)"
        ):
            make("fp8")
        model.hf_quantizer = type("Calibrated", (), {"cache": CacheScales(fp8=True)})()
        make("auto")
        del model.hf_quantizer


def test_layers_that_transformers_has_no_static_kind_of() -> None:
    config = AutoConfig.for_model("deepseek_v4", **_BASE)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert len(ctfp8.static_cache(model, 1, 16).layers) == 4
    assert len(ctfp8.dynamic_cache(model).layers) == 4


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    model = ctfp8.from_pretrained(DATA / "llama/FP8_DYNAMIC", dtype=torch.float32)
    draft = copy.deepcopy(model)
    draft.model.norm.weight.data.mul_(torch.linspace(0.5, 1.5, 128))  # its guesses are often wrong
    return model, draft


PROMPT = torch.arange(5, 17)[None]
GREEDY = {"do_sample": False, "eos_token_id": None}


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
@pytest.mark.parametrize("helper", ["assistant", "prompt look-up"])
def test_candidates_that_are_taken_back(helper: str, dtype: Any, pair: Any) -> None:
    model, draft = pair
    more = {"assistant_model": draft} if helper == "assistant" else {"prompt_lookup_num_tokens": 3}
    cache = ctfp8.static_cache(model, 1, 80, dtype)
    want = model.generate(PROMPT, max_new_tokens=24, cache=cache, **GREEDY)
    cache.reset()
    assert torch.equal(model.generate(PROMPT, max_new_tokens=24, cache=cache, **GREEDY, **more), want)
    assert cache.filled == int(cache.get_seq_length())
    again = torch.cat([want, PROMPT], 1)  # the same text goes on
    assert model.generate(again, max_new_tokens=2, cache=cache, **GREEDY).shape[1] == again.shape[1] + 2


@pytest.mark.ci(18)
@pytest.mark.parametrize("tokens", [1, 5, 12, 17, 18, 30], ids=lambda n: f"{n} tokens")
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.long)])
def test_another_text(tokens: int, compiled: bool, pair: Any) -> None:
    """Shorter than what the cache holds, as long, or longer: one sentence; what goes on with its text is computed."""
    model = pair[0]
    if compiled:
        model = copy.deepcopy(model)
        ctfp8.compile(model)
    cache = ctfp8.static_cache(model, 1, 64)
    text = model.generate(PROMPT, max_new_tokens=6, cache=cache, **GREEDY)
    with pytest.raises(ctfp8.UsageError, match=r"17 tokens of another text\. Call cache\.reset\(\)"):
        model.generate(torch.arange(40, 40 + tokens)[None], max_new_tokens=2, cache=cache, **GREEDY)
    more = torch.cat([text, torch.tensor([[3, 4, 5]])], 1)
    want = model.generate(more, max_new_tokens=4, cache=ctfp8.static_cache(model, 1, 64), **GREEDY)
    assert torch.equal(model.generate(more, max_new_tokens=4, cache=cache, **GREEDY), want)
    cache.reset()
    model.generate(torch.arange(40, 40 + tokens)[None], max_new_tokens=2, cache=cache, **GREEDY)
