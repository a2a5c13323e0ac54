"""Exports the shipped FP8 Llama with its cache to one file, and generates text from the file in another process.

    python examples/export_and_load.py

The second process has neither transformers nor the checkpoint: only torch, ctfp8 and the .pt2 file.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch.export import Dim

import ctfp8_compile as ctfp8

MODEL = Path(__file__).parent / "models" / "llama"
PROMPT = "Return a list of "
LENGTH = 192  # of the cache: prompt and new tokens

GENERATE = """
import sys
import torch
import ctfp8_compile as ctfp8

path, prompt, length = sys.argv[1], sys.argv[2], int(sys.argv[3])
module = ctfp8.load(path)
text = list(prompt.encode())                        # the shipped model's tokens are bytes
ids, position = torch.tensor([text]), 0
while len(text) < length:
    logits = module(ids, torch.tensor(position))    # first the prompt, then token by token
    position += ids.shape[1]
    ids = logits[:, -1:].argmax(-1)
    text.append(ids.item())
assert "transformers" not in sys.modules
print(module.report.summary())
print(bytes(text).decode(errors="replace"))
"""


def main() -> None:
    model = ctfp8.from_pretrained(MODEL)
    decoder = ctfp8.StaticCacheDecoder(model, batch_size=1, max_length=LENGTH)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "llama.pt2"
        ctfp8.export(
            decoder,
            (torch.zeros(1, 8, dtype=torch.int64), torch.tensor(0)),
            path=path,
            dynamic_shapes=({1: Dim("tokens", max=LENGTH)}, None),
        )
        checkpoint = (MODEL / "model.safetensors").stat().st_size
        print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB, cache included; checkpoint {checkpoint / 1e6:.2f} MB")
        subprocess.run([sys.executable, "-c", GENERATE, str(path), PROMPT, str(LENGTH)], check=True)


if __name__ == "__main__":
    main()
