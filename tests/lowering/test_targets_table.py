"""The table in docs/targets.md is what the eligibility checks answer; `EXPECTTEST_ACCEPT=1` writes it anew."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch

from ctfp8_compile.lowering import Kernel, Problem, choose, kernels_of, known
from ctfp8_compile.target import Target

DOCUMENT = Path(__file__).parent.parent.parent / "docs" / "targets.md"
BEGIN, END = "<!-- what the checks choose: begin -->", "<!-- what the checks choose: end -->"
TARGETS = ("cpu", "cuda:sm75", "cuda:sm80", "cuda:sm89", "cuda:sm90", "cuda:sm100", "cuda:sm120", "xpu")
#: What it is; kind, sizes of the weight, block, activation scheme, and the number of rows where that matters.
PROBLEMS = {
    "linear, one scale each": ("linear", (1024, 1024), (1024, 1024), "tensor"),
    "linear, rowwise scales": ("linear", (1024, 1024), (1, 1024), "token"),
    "linear, 128×128 blocks": ("linear", (1024, 1024), (128, 128), "group"),
    "linear, 128×128 blocks, 128 rows or more": ("linear", (1024, 1024), (128, 128), "group", 128),
    "linear, W8A16": ("linear", (1024, 1024), (1, 1024), "none"),
    "linear, K not a multiple of 16": ("linear", (1024, 1000), (1, 1000), "token"),
    "experts, rowwise scales": ("grouped_mm", (8, 1024, 1024), (1, 1024), "token"),
    "experts, rowwise scales, 8 rows or fewer": ("gathered_mm", (8, 1024, 1024), (1, 1024), "token", 8),
    "experts, 128×128 blocks": ("grouped_mm", (8, 1024, 1024), (128, 128), "group"),
}


def chosen(target: str, problem: Problem, without: str = "") -> str:
    kernels: list[Kernel] = [k for k in kernels_of(Target.parse(target)) if k.library not in without.split()]
    kernel, _ = choose(kernels, problem, Target.parse(target))
    return "dequantized" if kernel is None else re.sub(r" \(.*\)", "", kernel.name)


def table() -> str:
    """For each problem, the first eligible kernel; where that is fbgemm's, also the one without it."""
    lines = [" | ".join(["", *TARGETS]), "|".join(["---"] * (len(TARGETS) + 1))]
    for name, (kind, weight, block, activation, *rows) in PROBLEMS.items():
        problem = Problem(kind, torch.bfloat16, (*(rows or [16]), weight[-1]), weight, block, activation, False)
        cells = []
        for target in TARGETS:
            first, without = chosen(target, problem), chosen(target, problem, "fbgemm mslk")
            cells.append(first if first == without else f"{first}; else {without}")
        lines.append(" | ".join([name, *cells]))
    return "\n".join(f"| {line} |" if "---" not in line else f"|{line}|" for line in lines)


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="needs a machine without a GPU: with one, libraries must be installed"
)
def test_the_table_is_what_the_checks_answer(kernel_everywhere, monkeypatch):
    monkeypatch.setattr(known, "release", lambda version: (2, 14))  # it is the table of torch 2.14 and later
    _hold(BEGIN, END, table())


WHAT_IS_KNOWN = "<!-- what is known: begin -->", "<!-- what is known: end -->"


def test_what_is_known_of_each_gpu_is_in_the_document():
    scales = {"tensorwise": "one each", "rowwise": "per row", "blockwise": "128×128 blocks", "mx": "MXFP8"}
    lines = ["| scales of `aten._scaled_mm` | target | | torch | who says so |", "|---|---|---|---|---|"]
    for row in known.LINEAR:
        since = "2.11" if row.since is None else ".".join(map(str, row.since))
        gpus = ", ".join(f"`{gpu}`" for gpu in row.gpus)
        lines.append(f"| {scales[row.scaling]} | {gpus} | {row.evidence} | {since} | {_linked(row.says)} |")
    _hold(*WHAT_IS_KNOWN, "\n".join(lines))


def _linked(says: str) -> str:
    """Issues and pull requests as links."""
    owners = {
        "pytorch": "pytorch",
        "ao": "pytorch",
        "vllm": "vllm-project",
        "sglang": "sgl-project",
        "CUDALibrarySamples": "NVIDIA",
    }
    return re.sub(r"\b(\w+)#(\d+)", lambda m: f"[{m[0]}](https://github.com/{owners[m[1]]}/{m[1]}/issues/{m[2]})", says)


def _hold(begin: str, end: str, wanted: str) -> None:
    text = DOCUMENT.read_text()
    before, _, rest = text.partition(begin)
    held, _, after = rest.partition(end)
    if os.environ.get("EXPECTTEST_ACCEPT"):
        DOCUMENT.write_text(f"{before}{begin}\n{wanted}\n{end}{after}")
        return
    assert held.strip() == wanted
