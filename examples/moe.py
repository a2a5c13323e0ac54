"""A mixture of experts: what becomes of its stacked experts on three machines, a picture of it, and some text.

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
    model.forward = torch.compile(model.forward, backend="ctfp8")
    inputs = tokenizer("Return a list of ", return_tensors="pt")
    cache = ctfp8.static_cache(model, max_length=128)
    out = model.generate(**inputs, past_key_values=cache, max_new_tokens=60, do_sample=False)
    print(tokenizer.decode(out[0]))


if __name__ == "__main__":
    main()
