"""Many steps of a decode take no more memory than few."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from conftest import DATA, IDS

import ctfp8_compile as ctfp8
from ctfp8_compile.hf.compat import cache_argument

STEPS, LENGTH = 2000, 64


def anonymous_bytes() -> int:
    return int(re.search(r"RssAnon:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("name", ["llama/FP8_DYNAMIC", "qwen3moe/FP8_BLOCK"])
@torch.no_grad()
def test_two_thousand_decode_steps(name):
    model = ctfp8.from_pretrained(DATA / name)
    forward = torch.compile(model.forward, backend="ctfp8")
    cache = ctfp8.static_cache(model, 1, LENGTH)
    taken = {}
    for step in range(STEPS):
        if step % LENGTH == 0:
            cache.reset()
        position = torch.tensor([[step % LENGTH]])
        out = forward(IDS[:1, :1], position_ids=position, **{cache_argument(model): cache})
        assert out.logits.isfinite().all()
        taken[step] = anonymous_bytes() if step in (STEPS // 10, STEPS - 1) else 0
    assert taken[STEPS - 1] - taken[STEPS // 10] < 8 << 20
