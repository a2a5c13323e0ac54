"""Artifacts loaded and run in a new interpreter, one for all of them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

_RUN = """
import sys, torch
sys.modules["transformers"] = sys.modules["compressed_tensors"] = None      # an import of them fails
import ctfp8_compile as ctfp8
ids, files, results = torch.load(sys.argv[1]), sys.argv[2:], {}
with torch.no_grad():
    for file in files:
        out = ctfp8.load(file)(ids, use_cache=False)
        results[file] = (out.logits if hasattr(out, "logits") else out[0]).float()
torch.save(results, sys.argv[1] + ".out")
"""


def run_fresh(files: Iterable[Path], ids: Tensor, folder: Path) -> list[Tensor]:
    """The float32 logits of each artifact for these tokens; `folder` is for what travels."""
    names = list(map(str, files))
    torch.save(ids, folder / "ids.pt")
    command = [sys.executable, "-c", _RUN, str(folder / "ids.pt"), *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = torch.load(folder / "ids.pt.out")
    return [results[name] for name in names]
