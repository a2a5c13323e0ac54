"""A mixture of experts: what becomes of its stacked experts on three machines, a picture of it, and its next token.

python examples/moe.py [picture.html]
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
from transformers import AutoTokenizer

import ctfp8_compile as ctfp8

MODEL = Path(__file__).parent / "models" / "moe"


def main() -> None:
    warnings.filterwarnings("ignore", message=".*lru_cache.*")  # dynamo's, of a function of transformers
    model = ctfp8.from_pretrained(MODEL)
    experts = model.model.layers[0].mlp.experts
    print(f"experts of a layer: {tuple(experts.gate_up_proj.shape)}; stored as", end=" ")
    print({str(p.dtype) for p in experts.parameters()})

    ids = torch.arange(32)[None]
    for target in ("cpu", "cuda:sm90", "cuda:sm80"):
        print(ctfp8.explain(model, (ids,), {"use_cache": False}, target=target).summary())
    if sys.argv[1:]:
        report = ctfp8.explain(model, (ids,), {"use_cache": False}, target="cuda:sm90")
        print(f"a picture of it: {report.to_html(sys.argv[1])}")

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    ctfp8.compile(model, fullgraph=True)
    prompt = "Return a list of "
    with torch.no_grad():
        logits = model(**tokenizer(prompt, return_tensors="pt"), use_cache=False).logits[0, -1]
    likely = logits.float().softmax(-1).topk(5)
    print(f"{prompt!r} goes on with", end=" ")
    print(", ".join(f"{tokenizer.decode(i)!r} ({p:.0%})" for p, i in zip(likely.values, likely.indices, strict=True)))


if __name__ == "__main__":
    main()
