"""What Inductor makes of our graphs for GPUs that are not there: it compiles, what it launches, how operands lie in memory.

Each GPU is played in a process of its own (`worker.py`), which takes real checkpoints through
`torch.compile(backend="ctfp8")`, runs the generated code on fake tensors, and builds its Triton kernels with ptxas.
"""

from __future__ import annotations

import layouts
import pytest
from cases import Case, Gpu
from harness import Result, compiled

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
)
EXPERTS = {1: "batched_mm", 16: "batched_mm", 512: "grouped_mm", None: "grouped_mm"}


def matrix(rows: tuple[int | None, ...], build: str) -> tuple[Case, ...]:
    """Dense and MoE, by scheme and number of rows; modules of ours once a scheme."""
    return (
        *(Case(f"forged:llama/{s}", rows=m, build=build) for s in SCHEMES for m in rows),
        *(Case(f"forged:qwen3_moe/{s}", rows=m, experts=EXPERTS[m], build=build) for s in SCHEMES for m in rows),
        *(Case(f"own:{name}/{s}", rows=20, build=build) for s in SCHEMES for name in ("views", "biased")),
    )


#: By GPU, what `make test` compiles: each kernel, each form of experts, a dynamic number of rows.
REPRESENTATIVE = {
    Gpu("cuda:sm90", fbgemm=True): (
        Case("llama/FP8_DYNAMIC", build="first"),
        Case("forged:llama/FP8", rows=512, build="first"),
        Case("forged:llama/FP8_BLOCK", rows=None),
        Case("forged:qwen3_moe/FP8_DYNAMIC", rows=1, experts="batched_mm", build="first"),
        Case("own:views/FP8_DYNAMIC", rows=20),
        Case("own:views/FP8_BLOCK", rows=21),
    ),
    Gpu("cuda:sm89"): (
        Case("forged:llama/FP8_DYNAMIC", rows=None, build="first"),
        Case("own:views/FP8", rows=20),
        Case("own:biased/FP8_DYNAMIC", rows=20),
    ),
    Gpu("cuda:sm80"): (
        Case("forged:llama/FP8_BLOCK", rows=None, build="first"),
        Case("qwen3moe/FP8_DYNAMIC", rows=3, experts="batched_mm", build="first"),
        Case("qwen3moe/FP8", rows=16, experts="grouped_mm", build="first"),
        Case("own:views/FP8_DYNAMIC", rows=20),
        Case("own:biased/FP8", rows=20),
    ),
}


@pytest.mark.parametrize("gpu", REPRESENTATIVE, ids=lambda gpu: gpu.name)
def test_representative_cases(gpu):
    for result in compiled(gpu, REPRESENTATIVE[gpu]).values():
        check(gpu, result)


@pytest.mark.long
@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_the_whole_matrix(gpu):
    for result in compiled(gpu, matrix(ROWS, "no" if gpu.target == "xpu" else "first")).values():
        check(gpu, result)


def check(gpu: Gpu, result: Result) -> None:
    where = f"{gpu.name}, {result.case.name}:\n{result.text}\n"
    names = [launch.name for launch in result.launches]
    assert "ops.ctfp8" not in result.code, where  # comments may name them
    assert not [name for name in names if name.startswith(("aten.cat", "aten.copy", "aten.clone"))], where
    for launch in result.matmuls:
        layouts.check(launch, gpu.target.partition(":")[0])
    assert bool(result.matmuls) == bool(result.rewritten), where
    if gpu.target == "cuda:sm80":
        assert not result.kept, where
        assert result.matmuls, where
        assert all(launch.weight_only for launch in result.matmuls), where
    if not result.kept:
        assert not [name for name in names if "dequantize" in name], where
    for kernel in result.built:
        for configuration in kernel:
            assert configuration["bytes"] > 1000
            assert configuration["target"].rstrip("af") == "sm_" + gpu.target.partition(":sm")[2]
