"""A LoRA adapter over FP8 weights: trained, saved, put back, and merged into a plain model.

    pip install peft
    python examples/lora.py [FOLDER]

The base is the shipped byte-level Llama; the adapter learns a text the base has never seen. FOLDER is where it is saved.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from pathlib import Path

import peft
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

import ctfp8_compile as ctfp8

SHIPPED = Path(__file__).parent / "models" / "llama"
TEXT = "Twas brillig, and the slithy toves did gyre and gimble in the wabe; all mimsy were the borogoves. "
STEPS = 30


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Nats a token."""
    loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss


def train(model: nn.Module, ids: Tensor) -> None:
    """Adam on what has a gradient: the adapter."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, ids).backward()
        optimizer.step()
    model.eval()


def main() -> None:
    folder = Path(sys.argv[1] if sys.argv[1:] else tempfile.mkdtemp()) / "adapter"
    ids = AutoTokenizer.from_pretrained(SHIPPED)(TEXT * 2, return_tensors="pt").input_ids
    base = ctfp8.from_pretrained(SHIPPED)
    stored = Counter(p.dtype for p in base.parameters())
    torch.manual_seed(0)
    model = peft.get_peft_model(base, peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"]))
    with torch.no_grad():
        before = loss_of(model, ids)
    train(model, ids)
    with torch.no_grad():
        print(f"loss without the adapter {before:.3f}, after {STEPS} steps {loss_of(model, ids):.3f} nats a token")
    kept = Counter(p.dtype for name, p in model.named_parameters() if "lora_" not in name)
    print(f"the base's weights while it trained: {kept[torch.float8_e4m3fn]} of {stored[torch.float8_e4m3fn]} in FP8")

    model.save_pretrained(str(folder))
    size = sum(file.stat().st_size for file in folder.iterdir())
    again = peft.PeftModel.from_pretrained(ctfp8.from_pretrained(SHIPPED), str(folder))
    ctfp8.compile(again)
    with torch.no_grad():
        print(f"saved ({size / 1e3:.0f} kB), loaded and compiled: {loss_of(again, ids):.3f}")

    try:
        again.merge_and_unload()
    except ctfp8.UsageError as error:
        print(f"merging into FP8 weights: {error}")
    plain = peft.PeftModel.from_pretrained(ctfp8.from_pretrained(SHIPPED, dequantize=True), str(folder))
    merged = plain.merge_and_unload()
    with torch.no_grad():
        print(f"merged into a plain {merged.dtype} model: {loss_of(merged, ids):.3f}; quantize that one again")


if __name__ == "__main__":
    main()
