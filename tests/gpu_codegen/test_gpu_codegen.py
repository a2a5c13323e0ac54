"""What Inductor makes of our graphs for GPUs that are not there: it compiles, what it launches, how operands lie in memory.

Each GPU is played in a process of its own (`worker.py`), which takes real checkpoints through
`torch.compile(backend="ctfp8")`, runs the generated code on fake tensors, and builds its Triton kernels with ptxas.
"""

from __future__ import annotations

from textwrap import indent

import layouts
import pytest
import torch
from cases import Case, Gpu
from expecttest import TestCase
from harness import Result, compiled

from ctfp8_compile.compat import release

SCHEMES = ("FP8_DYNAMIC", "FP8", "FP8_BLOCK")
ROWS = (1, 16, 512, None)
GPUS = (
    Gpu("cuda:sm80"),
    Gpu("cuda:sm89"),
    Gpu("cuda:sm90"),
    Gpu("cuda:sm90", fbgemm=True),
    Gpu("cuda:sm100"),
    Gpu("cuda:sm100", fbgemm=True),
    Gpu("cuda:sm120"),
    Gpu("xpu"),
    Gpu("xpu", kernels="triton"),
)
EXPERTS = {1: "batched_mm", 16: "batched_mm", 512: "grouped_mm", None: "grouped_mm"}


def matrix(rows: tuple[int | None, ...], build: str) -> tuple[Case, ...]:
    """Dense and MoE, by scheme and number of rows; modules of ours once a scheme."""
    return (
        *(Case(f"forged:llama/{s}", rows=m, build=build) for s in SCHEMES for m in rows),
        *(Case(f"forged:qwen3_moe/{s}", rows=m, experts=EXPERTS[m], build=build) for s in SCHEMES for m in rows),
        *(Case(f"own:{name}/{s}", rows=20, build=build) for s in SCHEMES for name in ("views", "biased")),
        Case("own:biased/MXFP8", rows=20, build=build),
    )


class WhatMakeTestCompiles(TestCase):
    """Each kernel, each form of experts, a dynamic number of rows; names and number of launches as texts."""

    maxDiff = None

    def compile(self, gpu: Gpu, *cases: Case) -> str:
        results = compiled(gpu, cases).values()
        for result in results:
            check(gpu, result)
        return "\n".join(f"{result.case.name}\n{indent(result.text, '  ')}" for result in results)

    def assertExpectedInline(self, actual: str, expect: str, skip: int = 0) -> None:
        # which pointwise kernels are one, and the order of what does not depend on another, are a release's own
        if (2, 12) <= release(torch.__version__) < (2, 14):
            super().assertExpectedInline(actual, expect, skip + 1)

    def test_sm90_with_fbgemm(self):
        text = self.compile(
            Gpu("cuda:sm90", fbgemm=True),
            Case("llama/FP8_DYNAMIC", build="first"),
            Case("forged:llama/FP8", rows=512),
            Case("forged:llama/FP8_BLOCK", rows=512),
            Case("forged:qwen3_moe/FP8_DYNAMIC", rows=1, experts="batched_mm", build="first"),
            Case("forged:qwen3_moe/FP8_BLOCK", rows=16, experts="batched_mm", build="first"),
            Case("own:views/FP8_BLOCK", rows=21),
        )
        self.assertExpectedInline(
            text,
            """\
llama/FP8_DYNAMIC layer M=16
  norm, quantize
  fbgemm.f8f8bf16_rowwise [16, 128] x [256, 128]
  pointwise
  pointwise
  aten.bmm
  softmax
  pointwise
  aten.bmm
  quantize
  fbgemm.f8f8bf16_rowwise [16, 128] x [128, 128]
  norm, quantize
  fbgemm.f8f8bf16_rowwise [16, 128] x [512, 128]
  silu, quantize
  fbgemm.f8f8bf16_rowwise [16, 256] x [128, 256]
  pointwise
forged:llama/FP8 layer M=512
  norm, quantize
  fbgemm.f8f8bf16_rowwise [512, 512] x [1024, 512]
  pointwise
  pointwise
  aten.bmm
  softmax
  pointwise
  aten.bmm
  quantize
  aten._scaled_mm [512, 512] x [512, 512]
  norm, quantize
  pointwise
  fbgemm.f8f8bf16_rowwise [512, 512] x [2048, 512]
  silu, quantize
  aten._scaled_mm [512, 1024] x [1024, 512]
  pointwise
forged:llama/FP8_BLOCK layer M=512
  pointwise
  norm, quantize
  aten._scaled_mm [512, 512] x [512, 1024]
  pointwise
  pointwise
  aten.bmm
  softmax
  pointwise
  aten.bmm
  amax
  quantize
  aten._scaled_mm [512, 512] x [512, 512]
  pointwise
  norm, quantize
  aten._scaled_mm [512, 512] x [512, 2048]
  silu, quantize
  aten._scaled_mm [512, 1024] x [1024, 512]
  pointwise
forged:qwen3_moe/FP8_DYNAMIC layer M=1 batched_mm
  norm, quantize
  fbgemm.f8f8bf16_rowwise [1, 512] x [256, 512]
  norm
  norm
  quantize
  fbgemm.f8f8bf16_rowwise [1, 128] x [512, 128]
  norm
  aten.mm
  pointwise
  pointwise
  aten.topk
  sort
  quantize
  pointwise
  fbgemm.f8f8bf16_rowwise_grouped_stacked [2, 512] x [4, 1024, 512]
  silu, quantize
  pointwise
  fbgemm.f8f8bf16_rowwise_grouped_stacked [2, 512] x [4, 512, 512]
  pointwise
forged:qwen3_moe/FP8_BLOCK layer M=16 batched_mm
  norm
  norm, quantize
  fbgemm.f8f8bf16_groupwise [16, 512] x [128, 512]
  norm
  weight-only linear [16, 512] x [64, 512]
  norm
  norm
  aten.bmm
  softmax
  weight-only linear [16, 512] x [64, 512]
  pointwise
  aten.bmm
  quantize
  fbgemm.f8f8bf16_groupwise [16, 128] x [512, 128]
  norm
  aten.mm
  pointwise
  pointwise
  aten.topk
  sort
  pointwise
  quantize
  pointwise
  pointwise
  pointwise
  fbgemm.f8f8bf16_groupwise_grouped [32, 512] x [4, 1024, 512]
  pointwise
  silu, quantize
  pointwise
  pointwise
  pointwise
  fbgemm.f8f8bf16_groupwise_grouped [32, 512] x [4, 512, 512]
  pointwise
own:views/FP8_BLOCK layer M=21
  amax
  quantize
  quantize
  pointwise
  fbgemm.f8f8bf16_groupwise [24, 512] x [256, 512]
  quantize
  quantize
  pointwise
  fbgemm.f8f8bf16_groupwise [24, 512] x [256, 512]
  quantize
  quantize
  pointwise
  fbgemm.f8f8bf16_groupwise [24, 512] x [256, 512]
  quantize
  quantize
  pointwise
  fbgemm.f8f8bf16_groupwise [44, 512] x [256, 512]""",
        )

    @pytest.mark.long
    def test_sm89(self):
        text = self.compile(
            Gpu("cuda:sm89"),
            Case("forged:llama/FP8_DYNAMIC", rows=None, build="first"),
            Case("own:views/FP8", rows=20),
            Case("own:biased/FP8_DYNAMIC", rows=20),
            Case("own:wide/FP8_DYNAMIC", rows=1),
        )
        self.assertExpectedInline(
            text,
            """\
forged:llama/FP8_DYNAMIC layer M=any
  norm, quantize
  aten._scaled_mm [23, 512] x [512, 1024]
  pointwise
  pointwise
  aten.bmm
  softmax
  pointwise
  aten.bmm
  quantize
  aten._scaled_mm [23, 512] x [512, 512]
  norm, quantize
  aten._scaled_mm [23, 512] x [512, 2048]
  silu, quantize
  aten._scaled_mm [23, 1024] x [1024, 512]
  pointwise
own:views/FP8 layer M=20
  quantize
  aten._scaled_mm [20, 512] x [512, 256]
  quantize
  aten._scaled_mm [20, 512] x [512, 256]
  quantize
  aten._scaled_mm [20, 512] x [512, 256]
  quantize
  aten._scaled_mm [40, 512] x [512, 256]
own:biased/FP8_DYNAMIC layer M=20
  quantize
  aten._scaled_mm [20, 512] x [512, 512]
  silu
own:wide/FP8_DYNAMIC layer M=1
  silu, quantize
  aten._scaled_mm [1, 14336] x [14336, 256]""",
        )

    @pytest.mark.long
    def test_xpu(self):
        text = self.compile(
            Gpu("xpu"),
            Case("forged:llama/FP8_DYNAMIC", rows=None),
            Case("forged:llama/FP8_BLOCK", rows=21),
            Case("own:views/FP8", rows=20),
            Case("own:biased/FP8_BLOCK", rows=20),
        )
        self.assertExpectedInline(
            text,
            """\
forged:llama/FP8_DYNAMIC layer M=any
  norm, quantize
  aten._scaled_mm [23, 512] x [512, 1024]
  pointwise
  pointwise
  aten.bmm
  softmax
  pointwise
  aten.bmm
  quantize
  aten._scaled_mm [23, 512] x [512, 512]
  norm, quantize
  aten._scaled_mm [23, 512] x [512, 2048]
  silu, quantize
  aten._scaled_mm [23, 1024] x [1024, 512]
  pointwise
forged:llama/FP8_BLOCK layer M=21
  pointwise
  norm, quantize
  aten._scaled_mm [21, 512] x [512, 1024]
  pointwise
  pointwise
  aten.bmm
  softmax
  pointwise
  aten.bmm
  amax
  quantize
  aten._scaled_mm [21, 512] x [512, 512]
  pointwise
  norm, quantize
  aten._scaled_mm [21, 512] x [512, 2048]
  silu, quantize
  aten._scaled_mm [21, 1024] x [1024, 512]
  pointwise
own:views/FP8 layer M=20
  quantize
  aten._scaled_mm [20, 512] x [512, 256]
  quantize
  aten._scaled_mm [20, 512] x [512, 256]
  quantize
  aten._scaled_mm [20, 512] x [512, 256]
  quantize
  aten._scaled_mm [40, 512] x [512, 256]
own:biased/FP8_BLOCK layer M=20
  quantize
  aten._scaled_mm [20, 512] x [512, 512]
  silu""",
        )

    @pytest.mark.long
    def test_sm100(self):
        text = self.compile(Gpu("cuda:sm100"), Case("own:biased/MXFP8", rows=20, build="first"))
        self.assertExpectedInline(
            text,
            """\
own:biased/MXFP8 layer M=20
  quantize
  pointwise
  pointwise
  aten._scaled_mm [20, 512] x [512, 512]
  silu""",
        )

    @pytest.mark.long
    def test_sm80(self):
        text = self.compile(
            Gpu("cuda:sm80"),
            Case("forged:llama/FP8_BLOCK", rows=None, build="first"),
            Case("qwen3moe/FP8_DYNAMIC", rows=3, experts="batched_mm", build="first"),
            Case("qwen3moe/FP8", rows=16, experts="grouped_mm", build="first"),
            Case("own:views/FP8_DYNAMIC", rows=20),
            Case("own:biased/FP8", rows=20),
        )
        self.assertExpectedInline(
            text,
            """\
forged:llama/FP8_BLOCK layer M=any
  norm
  weight-only linear [23, 512] x [1024, 512]
  pointwise
  pointwise
  aten.bmm
  softmax
  pointwise
  aten.bmm
  pointwise
  weight-only linear [23, 512] x [512, 512]
  norm
  weight-only linear [23, 512] x [2048, 512]
  silu
  weight-only linear [23, 1024] x [512, 1024]
  pointwise
qwen3moe/FP8_DYNAMIC layer M=3 batched_mm
  norm
  weight-only linear [3, 128] x [256, 128]
  norm
  norm
  norm
  aten.bmm
  pointwise
  pointwise
  pointwise
  pointwise
  aten.bmm
  pointwise
  weight-only linear [3, 128] x [128, 128]
  norm
  aten.mm
  pointwise
  pointwise
  aten.topk
  pointwise
  weight-only gathered [6, 128] x [4, 256, 128]
  silu
  weight-only gathered [6, 128] x [4, 128, 128]
  pointwise
qwen3moe/FP8 layer M=16 grouped_mm
  norm
  weight-only linear [16, 128] x [256, 128]
  norm
  norm
  norm
  aten.bmm
  softmax
  pointwise
  aten.bmm
  pointwise
  weight-only linear [16, 128] x [128, 128]
  norm
  aten.mm
  pointwise
  pointwise
  aten.topk
  sort
  aten.histc
  pointwise
  pointwise
  weight-only grouped [32, 128] x [4, 256, 128]
  silu
  weight-only grouped [32, 128] x [4, 128, 128]
  pointwise
own:views/FP8_DYNAMIC layer M=20
  pointwise
  weight-only linear [20, 512] x [256, 512]
  pointwise
  weight-only linear [20, 512] x [256, 512]
  pointwise
  weight-only linear [20, 512] x [256, 512]
  pointwise
  weight-only linear [40, 512] x [256, 512]
own:biased/FP8 layer M=20
  weight-only linear [20, 512] x [512, 512]
  silu""",
        )


@pytest.mark.ci("cuda_sm90_fbgemm")
@pytest.mark.long
@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_the_whole_matrix(gpu):
    for result in compiled(gpu, matrix(ROWS, "no" if gpu.target == "xpu" else "first")).values():
        check(gpu, result)


@pytest.mark.long
@pytest.mark.parametrize("gpu", [Gpu("cuda:sm80"), Gpu("cuda:sm90", fbgemm=True), Gpu("xpu")], ids=lambda gpu: gpu.name)
def test_a_decode_step_with_an_fp8_cache(gpu: Gpu) -> None:
    """Each layer's keys and values are written and read as bytes, by kernels that build; none of them is copied."""
    case = Case("llama/FP8_DYNAMIC", "decoder", rows=1, build="no" if gpu.target == "xpu" else "first")
    (result,) = compiled(gpu, (case,)).values()
    check(gpu, result)
    operands = [operand for launch in result.launches for operand in launch.operands.values()]
    cached = [o for o in operands if list(o.sizes) == [1, 2, 64, 33] and o.dtype in ("uint8", "float8_e4m3fn")]
    assert len(cached) == 2 * 2 * 2, result.text  # layers; keys and values; written and read


def check(gpu: Gpu, result: Result) -> None:
    where = f"{gpu.name}, {result.case.name}:\n{result.text}\n"
    names = [launch.name for launch in result.launches]
    assert "torch.ops.ctfp8" not in result.code, where
    assert not [name for name in names if name.startswith(("aten.cat", "aten.copy", "aten.clone", "aten._local_sc"))], (
        where
    )
    if "FP8_BLOCK" not in result.case.model or (result.case.rows or 23) % 4 == 0:  # else rows are padded for TMA
        quantizations = [name for name in names if "quantize" in name.split(", ")]
        scaled = [launch for launch in result.matmuls if not launch.weight_only]
        assert len(quantizations) == len(scaled), where  # what has one input is fused
        assert "copy of fp8" not in names, where
        if "llama/" in result.case.model and len(scaled) == 4:  # q, k, v; o; gate, up; down
            words = [set(name.split(", ")) for name in names]
            assert sum({"norm", "quantize"} <= w for w in words) == 2, where
            assert sum({"silu", "quantize"} <= w for w in words) == 1, where
    for launch in result.matmuls:
        layouts.check(launch, gpu.target.partition(":")[0])
    assert bool(result.matmuls) == bool(result.rewritten), where
    if gpu.target == "cuda:sm80" and "MXFP8" in result.case.model:  # which has a kernel on sm100 only
        assert result.kept, where
        assert not result.matmuls, where
    elif gpu.target == "cuda:sm80":
        assert not result.kept, where
        assert result.matmuls, where
        assert all(launch.weight_only for launch in result.matmuls), where
    if not result.kept:
        assert not [name for name in names if "dequantize" in name], where
    for kernel in result.built:
        for configuration in kernel:
            assert configuration["bytes"] > 1000
            assert configuration["target"].rstrip("af") == "sm_" + gpu.target.partition(":sm")[2]
