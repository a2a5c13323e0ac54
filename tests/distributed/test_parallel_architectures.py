"""Every architecture of docs/architectures.md on two ranks: what one process computes, or the sentence why not; writes the table there."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DATA, relative_error
from support.forge import ARCHITECTURES, forge
from support.ranks import on_ranks
from transformers import AutoConfig
from transformers.distributed import DistributedConfig

import ctfp8_compile as ctfp8
from ctfp8_compile.ops import FP8

PAGE = DATA.parent.parent / "docs/architectures.md"
BEGIN = "<!-- table: EXPECTTEST_ACCEPT=1 pytest -m long tests/distributed/test_parallel_architectures.py -->"
END = "<!-- end of parallel table -->"
#: Scheme, and whether every weight ends in a partial block: shards are uneven then, and borders cut blocks.
CASES = (("FP8_DYNAMIC", False), ("FP8", True), ("FP8_BLOCK", False), ("FP8_BLOCK", True))


def compute(cases: list[tuple[str, Path, Any, dict[str, torch.Tensor]]], size: int) -> dict[tuple[str, str], str]:
    """By case and kind of parallelism: `fine`, or what is wrong."""
    warnings.simplefilter("ignore")
    found = {}
    for name, folder, auto_class, inputs in cases:
        config = AutoConfig.from_pretrained(folder)
        text = config.get_text_config()
        one = ctfp8.from_pretrained(folder, auto_class, dtype=torch.float32)
        for kind, arguments in {"tp": {}, "ep": {"ep_size": size}}.items():
            if not (getattr(text, f"base_model_{kind}_plan", None) or getattr(config, f"base_model_{kind}_plan", None)):
                found[name, kind] = "no plan"
                continue
            try:
                spread = DistributedConfig(tp_size=size, **arguments)
                model = ctfp8.from_pretrained(folder, auto_class, dtype=torch.float32, distributed_config=spread)
                with torch.no_grad():
                    error = relative_error(model(**inputs).logits, one(**inputs).logits)
                share = _fp8_bytes(model) / _fp8_bytes(one)
                found[name, kind] = f"fine: {share:.2f}" if error <= 1e-6 else f"logits off by {error:.1g}"
            except Exception as error:
                found[name, kind] = f"{type(error).__name__}: {error}"
    return found


def _fp8_bytes(model: Any) -> int:
    return sum(p.nbytes for p in model.parameters() if p.dtype == FP8)


def cell(outcomes: dict[str, str]) -> str:
    """One for all cases of a architecture: the share of the FP8 bytes that a rank has, or what is wrong with which."""
    shares = sorted({what.removeprefix("fine: ") for what in outcomes.values() if what.startswith("fine")})
    parts = ["–".join(dict.fromkeys((shares[0], shares[-1])))] if shares else []
    wrong = {what for what in outcomes.values() if not what.startswith("fine")}
    return "; ".join(parts + sorted("–" if what == "no plan" else what for what in wrong))


@pytest.mark.long
def test_every_architecture(tmp_path):
    only = os.environ.get("ONLY", "").split()
    names = [name for name in ARCHITECTURES if not only or name in only]
    cases = []
    for name in names:
        for scheme, odd in CASES:
            if scheme in ARCHITECTURES[name].schemes:
                case = f"{name} {scheme}{' odd' * odd}"
                made = forge(name, scheme, tmp_path / case, odd=odd)
                cases.append((case, made.folder, made.auto_class, made.inputs))
    first, second = on_ranks(2, compute, cases, 2, seconds=1500)
    assert isinstance(first, dict), first
    assert first == second
    rows = ["| architecture | `tp_size=2` | `tp_size=2, ep_size=2` |", "|---" * 3 + "|"]
    for name in names:
        by_kind = [
            {c: what for (c, k), what in first.items() if k == kind and c.split()[0] == name} for kind in ("tp", "ep")
        ]
        rows.append(f"| {name} | {' | '.join(map(cell, by_kind))} |")
    print("\n".join(rows))
    off = {
        case: what
        for case, what in first.items()
        if not what.startswith(("fine", "no plan", "UsageError", "SchemeError"))
    }
    assert not off
    text = PAGE.read_text()
    head, _, rest = text.partition(BEGIN)
    if os.environ.get("EXPECTTEST_ACCEPT") and not only:
        PAGE.write_text("\n\n".join([head.rstrip(), BEGIN, "\n".join(rows), END]) + rest.partition(END)[2])
    else:
        table = rest.partition(END)[0]
        assert not [row for row in rows if row not in table]
