"""Layers for multi-token prediction beside a model that is spread over ranks: each rank has all of them, and all draft the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_same_bits
from support.mtp import make_mtp, needs_mtp
from support.ranks import on_ranks
from transformers.distributed import DistributedConfig

import ctfp8_compile as ctfp8

pytestmark = needs_mtp
IDS = torch.tensor([[3, 17, 99, 5, 64, 21, 8]])
GREEDY = {"max_new_tokens": 12, "do_sample": False}


def generated(folder: Path, out: Path, config: dict[str, Any]) -> list[list[int]]:
    """Tokens without and with drafts; then the model is saved."""
    model = ctfp8.from_pretrained(folder, dtype=torch.float32, distributed_config=DistributedConfig(**config))
    texts = [model.generate(IDS, **GREEDY, **more)[0].tolist() for more in ({}, {"use_mtp": True})]
    ctfp8.save_pretrained(model, out)
    return texts


@pytest.mark.long
@pytest.mark.parametrize(
    "config",
    [{"tp_size": 2}, {"tp_size": 2, "ep_size": 2}],
    ids=["tensor", "expert"],
)
@pytest.mark.parametrize("name", ["glm4_moe", pytest.param("deepseek_v3", marks=pytest.mark.long)])
def test_drafts_on_two_ranks(name: str, config: dict[str, Any], tmp_path: Path) -> None:
    made = make_mtp(name, "FP8_DYNAMIC", tmp_path)
    one = ctfp8.from_pretrained(made.folder, dtype=torch.float32)
    want = one.generate(IDS, **GREEDY)[0].tolist()
    assert on_ranks(2, generated, made.folder, tmp_path / "out", config) == [[want, want]] * 2
    assert_same_bits(made.folder, tmp_path / "out")
