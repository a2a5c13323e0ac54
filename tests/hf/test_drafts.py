"""Drafts and compiled models: the tokens are those without drafts, and after the first text nothing is compiled any more.

Most cases count graphs with a backend that compiles nothing; ours makes as many.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from support.mtp import make_mtp, needs_mtp
from transformers import Cache

import ctfp8_compile as ctfp8
from ctfp8_compile.hf.compat import cache_argument
from ctfp8_compile.hf.drafts import tally
from ctfp8_compile.inductor.recipe import Compiled

pytestmark = needs_mtp
GREEDY = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
TEXTS = [torch.tensor([[3, 17, 99, 5, 64, 21, 8]]), torch.tensor([[3, 17, 99, 5, 64, 21, 8, 9, 10, 33, 12]])]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """By number of MTP layers: a model in float32, so that a tie of two tokens is none."""
    found = {}
    for layers in (1, 2):
        made = make_mtp("glm4_moe", "FP8_DYNAMIC", tmp_path_factory.mktemp(f"glm{layers}"), layers)
        found[layers] = ctfp8.from_pretrained(made.folder, dtype=torch.float32)
    return found


def cache_of(model: Any, kind: str, dtype: Any) -> Any:
    if kind == "static":
        return ctfp8.static_cache(model, 1, 64, dtype)
    return ctfp8.dynamic_cache(model, dtype)


def graphs() -> int:
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"], dict(counters["graph_break"])
    return counters["stats"]["unique_graphs"]


#: What drafts, how many MTP layers there are, and the kinds of calls, each of which is a graph: of the model for the prompt, for its
#: steps (a plain one, where nothing is found, and a verification), and of each MTP layer (one token, several), or of the assistant
#: (the prompt, two tokens, one).
WAYS = {
    "MTP": (1, {"use_mtp": True}, 4),
    "two MTP layers": (2, {"use_mtp": True}, 4),
    "look-up": (1, {"prompt_lookup_num_tokens": 3}, 3),
    "assistant": (1, {}, 5),
    "sure assistant": (1, {}, 5),
}


@pytest.fixture
def kinds(monkeypatch: pytest.MonkeyPatch) -> set[Any]:
    """Which kinds of calls compiled functions met: of a text's beginning or not, one token or several; of MTP layers, which layer."""
    found, run = set(), Compiled.__call__

    def call(self: Compiled, *args: Any, **kwargs: Any) -> Any:
        cache = next(value for value in (*args, *kwargs.values()) if isinstance(value, Cache))
        tokens = kwargs["input_ids"] if kwargs else args[-1]
        begins = bool(kwargs) and int(cache.get_seq_length()) == 0
        found.add((id(self), args[0] if args else begins, tokens.shape[1] == 1))
        return run(self, *args, **kwargs)

    monkeypatch.setattr(Compiled, "__call__", call)
    return found


def each_kind_once(
    model: Any,
    more: dict[str, Any],
    kind: str,
    dtype: Any,
    most: int,
    backend: str,
    kinds: set[Any],
    texts: Any = TEXTS,
) -> None:
    """Generates texts, the first two again after all, and counts graphs: one for each kind of call.

    What is left of a growing cache whose drafts were rejected is not contiguous, and graphs guard on that: a verification has two
    graphs then, and the plain step of a look-up, too.
    """
    extra = 0 if kind == "static" else 1 + ("prompt_lookup_num_tokens" in more)
    name = cache_argument(model)
    want = [model.generate(ids, **GREEDY, **{name: cache_of(model, kind, dtype)}) for ids in texts]
    model = copy.deepcopy(model)
    ctfp8.compile(model, fullgraph=True, backend=backend)
    cache = cache_of(model, kind, dtype)
    for ids, expected in zip((*texts, *texts[:2]), (*want, *want[:2]), strict=True):
        if kind == "static":
            cache.reset()
        else:
            cache = cache_of(model, kind, dtype)
        assert torch.equal(model.generate(ids, **GREEDY, **{name: cache}, **more), expected)
        assert cache.get_seq_length() == expected.shape[1] - 1
        assert len(kinds) <= most
        assert len(kinds) <= graphs() <= len(kinds) + extra, "compiled more than once for a kind of call"


#: In the quick suite: each way, each kind of cache and each dtype once or twice.
_QUICK = {("MTP", "static", "fp8"), ("look-up", "growing", "bf16"), ("assistant", "static", "fp8")}
CASES = [
    pytest.param(way, kind, dtype, marks=[] if (way, kind, dtype) in _QUICK else [pytest.mark.long])
    for way in WAYS
    for kind in ("static", "growing")
    for dtype in ("bf16", "fp8")
]


@pytest.mark.ci("two MTP layers-static-fp8", "assistant-growing-bf16", "look-up-growing-fp8")
@pytest.mark.parametrize(("way", "kind", "dtype"), CASES)
def test_graphs_are_few_and_tokens_the_same(way: str, kind: str, dtype: Any, models: Any, kinds: set[Any]) -> None:
    layers, more, most = WAYS[way]
    model = models[layers]
    if "assistant" in way:
        other = copy.deepcopy(model)
        other.model.norm.weight.data.mul_(torch.linspace(0.5, 1.5, 64))  # its guesses are often wrong
        if "sure" in way:
            other.generation_config.assistant_confidence_threshold = 0.0
        more = {"assistant_model": ctfp8.compile(other, backend="eager")}
    each_kind_once(model, more, kind, dtype, most, "eager", kinds)


@pytest.mark.ci("look-up-growing")
@pytest.mark.long
@pytest.mark.parametrize("kind", ["static", "growing"])
@pytest.mark.parametrize("way", ["MTP", "look-up"])
def test_prompts_of_all_lengths(way: str, kind: str, models: Any, kinds: set[Any]) -> None:
    """Lengths that other sizes of the model are, too, with and without anything to look up."""
    layers, more, most = WAYS[way]
    texts = [(torch.arange(n) * 7 % 61)[None] + 1 for n in (4, 16, 2, 3, 32)]
    texts += [torch.tensor([[5, 6] * n]) for n in (2, 4, 8)]
    each_kind_once(models[layers], more, kind, "bf16", most, "eager", kinds, texts)


@pytest.mark.ci("MTP-static-fp8")
@pytest.mark.long(minutes=3)
@pytest.mark.parametrize(
    ("way", "kind", "dtype"),
    [("MTP", "static", "fp8"), ("look-up", "static", "bf16"), ("look-up", "growing", "fp8")],
)
def test_compiled_by_our_backend(way: str, kind: str, dtype: Any, models: Any, kinds: set[Any]) -> None:
    layers, more, most = WAYS[way]
    each_kind_once(models[layers], more, kind, dtype, most, "ctfp8", kinds)


def test_a_bf16_assistant_and_one_that_is_the_model(models: Any) -> None:
    model = models[1]
    plain = ctfp8.from_pretrained(model.config._name_or_path, dequantize=True)
    want = model.generate(TEXTS[0], **GREEDY)
    for assistant in (plain, model):
        with tally(model) as counts:
            assert torch.equal(model.generate(TEXTS[0], **GREEDY, assistant_model=assistant), want)
        assert 0 < counts.accepted <= counts.drafted
        assert counts.tokens < 24  # the prompt's pass had drafts, too
    assert counts.acceptance == 1  # the model agrees with itself


def test_the_tally_is_what_was_generated(models: Any) -> None:
    model, before = models[2], dict(vars(models[2]))
    with tally(model) as counts:
        out = model.generate(TEXTS[0], **GREEDY, use_mtp=True)
    assert counts.tokens + 1 == out.shape[1] - TEXTS[0].shape[1]
    assert counts.tokens_per_step == counts.tokens / counts.steps
    assert counts.drafted == 2 * counts.steps
    assert counts.accepted <= counts.drafted
    assert set(vars(model)) == set(before)


@pytest.mark.parametrize("more", [{"use_mtp": True}, {"prompt_lookup_num_tokens": 3}], ids=["MTP", "look-up"])
def test_windows_of_a_static_cache(more: dict[str, Any], tmp_path: Path) -> None:
    """What they forget cannot be taken back; a cache that grows, or one that is no longer than the window, can."""
    made = make_mtp("mellum", "FP8_DYNAMIC", tmp_path)
    model = ctfp8.from_pretrained(made.folder, dtype=torch.float32)
    name = cache_argument(model)
    want = model.generate(TEXTS[0], **GREEDY)
    with pytest.raises(ctfp8.UsageError, match=r"1 of 2 layers of the static cache keep a window of 8 tokens"):
        model.generate(TEXTS[0], **GREEDY, **more, **{name: ctfp8.static_cache(model, 1, 64)})
    assert torch.equal(model.generate(TEXTS[0], **GREEDY, **more), want)
    assert torch.equal(model.generate(TEXTS[0], **GREEDY, **more, **{name: ctfp8.dynamic_cache(model)}), want)
    short = model.generate(
        TEXTS[0][:, :2], max_new_tokens=5, do_sample=False, **more, **{name: ctfp8.static_cache(model, 1, 8)}
    )
    assert torch.equal(short, model.generate(TEXTS[0][:, :2], max_new_tokens=5, do_sample=False))


def test_several_texts_at_once_and_bf16(models: Any) -> None:
    """transformers drafts for one text; in bf16 a verification rounds other sums than a plain step does, so ties may break apart."""
    model = models[1]
    with pytest.raises(ValueError, match="batch_size = 1"):
        model.generate(TEXTS[0].expand(2, -1), **GREEDY, use_mtp=True)
    half = ctfp8.from_pretrained(model.config._name_or_path)
    want, got = half.generate(TEXTS[0], **GREEDY), half.generate(TEXTS[0], **GREEDY, use_mtp=True)
    differ = (want != got)[0].nonzero()
    if len(differ):  # where the first token differs, both were as likely, but for rounding
        with torch.no_grad():
            logits = half(want[:, : int(differ[0])]).logits[0, -1].float()
        best = logits[[int(want[0, differ[0]]), int(got[0, differ[0]])]]
        assert (best[0] - best[1]).abs() <= 2**-6 * logits.abs().max()
