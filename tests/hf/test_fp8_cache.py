"""Caches that keep FP8: against float64 arithmetic of what was rounded, in every layer kind, eager, compiled and in an artifact."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import DATA, fp8_config, quantize, relative_error
from safetensors.torch import load_file
from support.fresh import continue_fresh
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache

import ctfp8_compile as ctfp8
from ctfp8_compile.hf.compat import cache_argument
from ctfp8_compile.model.freeze import dequantize_
from ctfp8_compile.ops import FP8

pytestmark = pytest.mark.filterwarnings("ignore:the checkpoint was calibrated")
KV = DATA / "llama/FP8_DYNAMIC_KV"


@pytest.fixture(scope="module")
def calibrated():
    return ctfp8.from_pretrained(KV, dtype=torch.float32)


def ids_for(model, rows: int = 1, tokens: int = 12) -> Tensor:
    return torch.randint(0, model.config.vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(1))


def steps(model, call, cache, ids: Tensor, sizes: tuple[int, ...]) -> Tensor:
    out, done = [], 0
    for n in sizes:
        with torch.no_grad():
            out.append(call(input_ids=ids[:, done : done + n], use_cache=True, **{cache_argument(model): cache}).logits)
        done += n
    return torch.cat(out, 1)


class Rounding(DynamicCache):
    """A growing cache in float64 that rounds what it is given as the file's scales, or a token's own power of two, say."""

    scales: list[tuple[Tensor, Tensor]] | None = None

    def update(self, keys: Tensor, values: Tensor, layer: int, *args, **kwargs):
        both = []
        for i, x in enumerate((keys, values)):
            if self.scales is not None:
                scale = self.scales[layer][i].double()
            else:
                scale = 2.0 ** (x.double().abs().amax(-1, keepdim=True).clamp_min(1e-12) / 448).log2().ceil()
            both.append(((x.double() / scale).clamp(-448, 448).float().to(FP8).double() * scale).to(x.dtype))
        return super().update(*both, layer, *args, **kwargs)


def float64(model):
    return dequantize_(copy.deepcopy(model)).double()


def _weights(model) -> list[str]:
    return [f"{n}.weight" for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]


@pytest.mark.ci("fp8-qwen3moe", "qwen3moe-fp8")
@pytest.mark.long
@pytest.mark.parametrize("architecture", ["llama", "qwen3moe"])
@pytest.mark.parametrize("dtype", ["auto", "fp8"])
def test_a_model_attends_to_what_was_rounded(architecture: str, dtype: str) -> None:
    """New tokens too: the prompt of 9 is rounded before it is attended to."""
    scheme = "FP8_DYNAMIC_KV" if dtype == "auto" else "FP8_DYNAMIC"
    experts = (
        {"experts_implementation": "batched_mm"} if architecture == "qwen3moe" else {}
    )  # grouped ones know no float64
    model = ctfp8.from_pretrained(DATA / architecture / scheme, dtype=torch.float32, **experts)
    ids, sizes = ids_for(model, 2), (9, 1, 1, 1)
    exact = Rounding(config=model.config)
    if dtype == "auto":
        file = load_file(DATA / architecture / scheme / "model.safetensors")
        exact.scales = [
            tuple(file[f"model.layers.{i}.self_attn.{w}_scale"] for w in "kv")
            for i in range(model.config.num_hidden_layers)
        ]
    want = steps(model, float64(model), exact, ids, sizes)
    plain = steps(model, model, DynamicCache(config=model.config), ids, sizes)
    assert relative_error(plain.double(), want) > 1e-3  # what rounding the cache does
    for cache in (ctfp8.static_cache(model, 2, 80, dtype=dtype), ctfp8.dynamic_cache(model, dtype)):
        assert all(layer.keys is None or layer.keys.dtype == torch.uint8 for layer in cache.layers)
        assert relative_error(steps(model, model, cache, ids, sizes).double(), want) < 1e-3
    compiled = torch.compile(model, backend="ctfp8", fullgraph=True, dynamic=False)
    cache = ctfp8.static_cache(model, 2, 80, dtype=dtype)
    before = len(ctfp8.compiled_reports())
    assert relative_error(steps(model, compiled, cache, ids, sizes).double(), want) < 1e-3
    for report in ctfp8.compiled_reports()[before:]:
        assert {(e.rule, e.kernel) for e in report.attention} == {("attention to an FP8 cache", "fused attention")}
    cache.reset()
    assert relative_error(steps(model, compiled, cache, ids, sizes).double(), want) < 1e-3


def test_what_a_cache_weighs_and_when_it_is_fp8(calibrated) -> None:
    plain = ctfp8.from_pretrained(DATA / "llama/FP8_DYNAMIC")
    size = lambda model, dtype: sum(  # noqa: E731
        t.numel() * t.element_size()
        for layer in ctfp8.static_cache(model, 1, 64, dtype).layers
        for t in (layer.keys, layer.values)
    )
    whole = size(plain, "bf16")
    assert size(plain, "auto") == whole
    width = plain.config.head_dim
    assert size(plain, "fp8") == whole * (width + 1) / (2 * width)
    assert size(calibrated, "auto") == whole / 2
    with pytest.raises(ctfp8.UsageError, match="a cache is 'fp8'"):
        ctfp8.static_cache(plain, 1, 8, dtype="int8")


@pytest.mark.parametrize(
    "make", [lambda m: ctfp8.static_cache(m, 2, 40, dtype="fp8"), lambda m: ctfp8.dynamic_cache(m, "fp8")]
)
def test_windows_cropping_and_beams(make) -> None:
    """Layers with a window of 6 and without, as Gemma has them."""
    config = AutoConfig.for_model(
        "gemma3_text", hidden_size=64, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=99, sliding_window=6, layer_types=["sliding_attention", "full_attention"] * 2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    ids = ids_for(model, 2)
    want = steps(model, copy.deepcopy(model).double(), Rounding(config=model.config), ids, (9, 1, 1, 1))
    assert relative_error(steps(model, model, make(model), ids, (9, 1, 1, 1)).double(), want) < 1e-3
    assert (
        relative_error(steps(model, model, make(model), ids, (2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1)).double(), want) < 1e-3
    )

    cache = make(model)
    want = steps(model, model, make(model), ids, (4, 1))[:, -1]
    steps(model, model, cache, ids, (4,))
    cache.reorder_cache(torch.tensor([1, 0]))
    got = model(input_ids=ids[[1, 0], 4:5], use_cache=True, **{cache_argument(model): cache}).logits[:, -1]
    torch.testing.assert_close(got, want[[1, 0]], rtol=1e-4, atol=1e-4)


def test_cropping(calibrated) -> None:
    ids = ids_for(calibrated)
    cache = ctfp8.dynamic_cache(calibrated)
    want = steps(calibrated, calibrated, cache, ids, (6, 1))[:, -1]
    cache.crop(-1)
    got = calibrated(input_ids=ids[:, 6:7], use_cache=True, **{cache_argument(calibrated): cache}).logits[:, -1]
    assert torch.equal(got, want)


#: Two layers each: with a window of 6, and without one; with a softcap, which is no scaled-dot-product attention; with latents.
KINDS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 6},
    "gemma2": {"sliding_window": 6, "head_dim": 16, "query_pre_attn_scalar": 16,
               "layer_types": ["sliding_attention", "full_attention"]},
    "gemma3_text": {"sliding_window": 6, "head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "deepseek_v3": {"first_k_dense_replace": 2, "q_lora_rank": 48, "kv_lora_rank": 40, "qk_rope_head_dim": 16,
                    "qk_nope_head_dim": 24, "v_head_dim": 32, "num_key_value_heads": 4},
}  # fmt: skip


def small(kind: str) -> Any:
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 99,
    }
    config = AutoConfig.for_model(kind, **{"num_key_value_heads": 2, **sizes, **KINDS[kind]})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    state = dict(model.state_dict())
    for name in _weights(model):
        if name != "lm_head.weight":
            state[name], state[name + "_scale"] = quantize(state[name])
    return ctfp8.load_state_dict(model, state, fp8_config(ignore=["lm_head"]))


def padded_steps(model, call, cache, ids: Tensor, sizes: tuple[int, ...], padding: int) -> Tensor:
    """As `steps`, the second text padded on its left, which its logits leave out."""
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    out, done = [], 0
    for n in sizes:
        inputs = {"input_ids": ids[:, done : done + n], "attention_mask": mask[:, : done + n]}
        with torch.no_grad():
            out.append(call(**inputs, use_cache=True, **{cache_argument(model): cache}).logits)
        done += n
    logits = torch.cat(out, 1)
    return torch.cat([logits[0], logits[1, padding:]])


@pytest.mark.ci
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("way", ["eager", pytest.param("compiled", marks=pytest.mark.long)])
def test_windows_and_latents_with_padding(kind: str, way: str) -> None:
    """Against float64 arithmetic, past the end of the window, two texts one after the other in one cache."""
    model = small(kind)
    ids, sizes = ids_for(model, 2), (7, 1, 1, 1)
    padding = 0 if kind == "gemma2" else 2  # its eager attention gives NaN for what sees nothing, in float64
    call = model if way == "eager" else torch.compile(model, backend="ctfp8", fullgraph=True)
    for dtype, cls in (("bf16", DynamicCache), ("fp8", Rounding)):
        want = padded_steps(model, float64(model), cls(config=model.config), ids, sizes, padding)
        cache = ctfp8.static_cache(model, 2, 40, dtype=dtype)
        for _ in range(2):
            assert relative_error(padded_steps(model, call, cache, ids, sizes, padding).double(), want) < 1e-3
            cache.reset()
        assert {layer.keys.dtype for layer in cache.layers} == {torch.uint8 if dtype == "fp8" else torch.float32}
        torch._dynamo.reset()


def test_saving_keeps_the_scales(calibrated, tmp_path) -> None:
    calibrated.save_pretrained(tmp_path)
    old, new = load_file(KV / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert {k for k in old if "k_scale" in k or "v_scale" in k}
    assert all(torch.equal(old[k], new[k]) for k in old if "k_scale" in k or "v_scale" in k)


def test_a_decoder_that_moves_takes_its_cache_along() -> None:
    decoder = ctfp8.StaticCacheDecoder(ctfp8.from_pretrained(KV), max_length=32).to("meta")
    for layer in decoder.cache.layers:
        assert {torch.device(layer.device).type, *(scale.device.type for scale in layer.scales)} == {"meta"}


def test_an_artifact_keeps_an_fp8_cache(calibrated, tmp_path) -> None:
    """Loaded in a new process it continues two texts with the tokens that the model gives with such a cache."""
    decoder = ctfp8.StaticCacheDecoder(calibrated, 1, 64)
    ids = ids_for(calibrated)
    tokens = torch.export.Dim("tokens", max=64)
    ctfp8.export(decoder, (ids, torch.tensor(0)), path=tmp_path / "m.pt2", dynamic_shapes=({1: tokens}, None))
    *texts, report = continue_fresh(tmp_path / "m.pt2", ids, tmp_path)
    assert {(e["rule"], e["kernel"]) for e in report["attention"]} == {("attention to an FP8 cache", "fused attention")}
    cache = {cache_argument(calibrated): ctfp8.static_cache(calibrated, 1, 64)}
    want = calibrated.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, **cache)[:, ids.shape[1] :]
    assert all(torch.equal(text, want) for text in texts)


@pytest.mark.parametrize("target", ["cuda:sm90", "xpu"])
def test_on_a_gpu_the_cache_stays_fp8_and_its_reading_is_plain_operations(calibrated, target: str) -> None:
    """What it computes: tests/passes/test_golden_targets.py; that it compiles for one: tests/gpu_codegen."""
    call = ctfp8.StaticCacheDecoder(calibrated, 1, 64), (ids_for(calibrated), torch.tensor(0))
    program = ctfp8.lower(*call, target=target)
    layers = range(calibrated.config.num_hidden_layers)
    names = {f"{which}_{i}" for which in ("keys", "values", "cumulative_length") for i in layers}
    assert set(program.graph_signature.buffers_to_mutate.values()) == names
    assert {program.constants[name].dtype for name in names if "length" not in name} == {torch.uint8}
    assert not any("ctfp8.cached" in str(n.target) for n in program.graph.nodes)
    report = ctfp8.explain(*call, target=target)
    reason = f"there is no kernel for attention to an FP8 cache on {target}: it is dequantized in the graph"
    assert [e.reason for e in report.attention] == [reason] * len(layers)
    assert f"{len(layers)} attention to an FP8 cache → {reason}" in report.summary()


@pytest.mark.long
@pytest.mark.parametrize("name", ["llama", "moe"])
def test_perplexity_of_the_shipped_models(name: str) -> None:
    folder = DATA.parent.parent / "examples/models"
    model, tokenizer = ctfp8.from_pretrained(folder / name), AutoTokenizer.from_pretrained(folder / name)
    ids = tokenizer((folder / "heldout.txt").read_text(), return_tensors="pt").input_ids[0]
    ids = ids[: 32 * 256].view(32, 256)
    loss = []
    for dtype in ("bf16", "fp8"):
        logits = steps(model, model, ctfp8.dynamic_cache(model, dtype), ids, (256,)).float()
        loss.append(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
    assert abs((loss[1] - loss[0]).exp() - 1) < 0.005
