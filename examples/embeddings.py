"""Sentence embeddings through the backend: padded batches of every length, one compilation.

    python examples/embeddings.py [CKPT]

CKPT is an FP8 checkpoint of an encoder, such as all-MiniLM-L6-v2 quantized by llm-compressor. Without one, the shipped
byte-level Llama serves, whose hidden states tell Python from prose.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

import ctfp8_compile as ctfp8

SHIPPED = Path(__file__).parent / "models" / "llama"
TEXTS = [
    "The file could not be opened because it does not exist.",
    "There is no such file, so it cannot be read.",
    "def area(width, height):\n    return width * height\n",
    "def volume(a, b, c):\n    return a * b * c\n",
]


def embed(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The mean of the last hidden states over each text's own tokens, normalised: `[texts, hidden]`."""
    with torch.no_grad():
        hidden = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state.float()
    mask = batch["attention_mask"][..., None].float()
    return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def main() -> None:
    folder = sys.argv[1] if sys.argv[1:] else SHIPPED
    model = ctfp8.from_pretrained(folder, AutoModel)
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    tokenizer = AutoTokenizer.from_pretrained(folder)
    compiled = torch.compile(model, backend="ctfp8", dynamic=True, fullgraph=True)
    for count in (2, 4):
        batch = tokenizer(TEXTS[:count], padding=True, return_tensors="pt")
        embeddings = embed(compiled, batch)
        worst = nn.functional.cosine_similarity(embeddings, embed(model, batch)).min()
        print(f"batch {list(batch['input_ids'].shape)}: cosine with the model run eagerly ≥ {worst:.4f}")
    print("similarity of each text to each:")
    for text, row in zip(TEXTS, embeddings @ embeddings.T, strict=True):
        print("  ", " ".join(f"{similarity:.2f}" for similarity in row), " ", text.splitlines()[0])
    print(f"graphs compiled: {torch._dynamo.utils.counters['stats']['unique_graphs']}")


if __name__ == "__main__":
    main()
