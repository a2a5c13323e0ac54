"""Artifacts loaded and run in a new interpreter, without transformers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_HEAD = """
import sys, torch
sys.modules["transformers"] = sys.modules["compressed_tensors"] = None      # an import of them fails
import ctfp8_compile as ctfp8
ids, files, results = torch.load(sys.argv[1]), sys.argv[2:], {}
"""
_LOGITS = """
with torch.no_grad():
    for file in files:
        out = ctfp8.load(file)(ids, use_cache=False)
        results[file] = (out.logits if hasattr(out, "logits") else out[0]).float()
torch.save(results, sys.argv[1] + ".out")
"""
_GREEDY = """
with torch.no_grad():
    for file in files:
        module = ctfp8.load(file)
        for text in range(2):  # position 0 begins another one, in the same cache
            step, tokens = ids, []
            for _ in range(8):
                at = torch.tensor(ids.shape[1] + len(tokens) - 1 if tokens else 0)
                step = module(step, at)[:, -1:].argmax(-1)
                tokens.append(step)
            results[file, text] = torch.cat(tokens, 1)
        results[file] = module.report.to_dict()
torch.save(results, sys.argv[1] + ".out")
"""


def run_fresh(files: Iterable[Path], ids: Tensor, folder: Path) -> list[Tensor]:
    """The float32 logits of each artifact for these tokens; `folder` is for what travels."""
    names = list(map(str, files))
    results = _run(_LOGITS, names, ids, folder)
    return [results[name] for name in names]


def continue_fresh(file: Path, ids: Tensor, folder: Path) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """The eight likeliest tokens after these, twice, of an artifact of a `StaticCacheDecoder`; and its report."""
    results = _run(_GREEDY, [str(file)], ids, folder)
    return results[str(file), 0], results[str(file), 1], results[str(file)]


def _run(what: str, names: list[str], ids: Tensor, folder: Path) -> dict[Any, Any]:
    torch.save(ids, folder / "ids.pt")
    command = [sys.executable, "-c", _HEAD + what, str(folder / "ids.pt"), *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "ids.pt.out")
