"""What benchmarks/distributed.py says of a model from its config is what ranks have."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import pytest
import torch
from conftest import DATA
from support.ranks import on_ranks
from transformers import AutoConfig
from transformers.distributed import DistributedConfig

import ctfp8_compile as ctfp8
from ctfp8_compile.model.parametrization import quantized_parameters
from ctfp8_compile.ops import FP8

BENCHMARKS = DATA.parent.parent / "benchmarks"
CASES = (("llama/FP8_BLOCK", False), ("mixtral/FP8_BLOCK", True), ("qwen3moe/FP8_BLOCK", True))


def on_paper(*args: Any) -> Any:
    sys.path.insert(0, str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("benchmarks_distributed", BENCHMARKS / "distributed.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    sys.path.pop(0)
    return module.on_paper(*args)


def held() -> list[tuple[int, int, int]]:
    """Bytes of FP8 values, of scales and of the rest, in each case, on this rank."""
    found = []
    for name, experts in CASES:
        config = DistributedConfig(tp_size=2, **({"ep_size": 2} if experts else {}))
        model = ctfp8.from_pretrained(DATA / name, dtype=torch.bfloat16, distributed_config=config)
        fp8 = sum(p.nbytes for p in model.parameters() if p.dtype == FP8)
        scales = sum(d.weight_scale.nbytes for *_, d in quantized_parameters(model))
        found.append((fp8, scales, sum(p.nbytes for p in model.parameters()) - fp8))
    return found


@pytest.mark.long
def test_ranks_hold_what_the_paper_says():
    first, second = on_ranks(2, held)
    assert first == second
    for (name, experts), (fp8, scales, rest) in zip(CASES, first, strict=True):
        paper = on_paper(AutoConfig.from_pretrained(DATA / name), 2, experts)
        assert (paper.fp8, paper.scales, paper.other) == (fp8, scales, rest), name


@pytest.mark.long
def test_deepseek_v3_has_671_billion_parameters():
    one = on_paper(AutoConfig.for_model("deepseek_v3"), 1)
    assert (one.fp8 + one.other / 2) / 1e9 == pytest.approx(671, abs=0.5)
    assert one.sent == 0
    eight = on_paper(AutoConfig.for_model("deepseek_v3"), 8, True)
    assert eight.weights < 0.16 * one.weights
    # embedding, 58 mixtures and their shared experts, 3 MLPs: sums of 7168 bf16 (no plan cuts latent attention); logits
    assert eight.sent == (1 + 58 + 58 + 3) * 2 * 2 * 7168 * 7 // 8 + 2 * 129280 * 7 // 8
