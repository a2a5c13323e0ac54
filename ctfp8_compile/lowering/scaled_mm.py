"""torch's own scaled matmuls, `aten._scaled_mm` and `aten._scaled_grouped_mm`, for CUDA and XPU.

    aten._scaled_mm(x [M, K] fp8, weight.t() [K, N] fp8 column-major, scale_a, scale_b, bias, …, out_dtype)

with `scale_a` and `scale_b` of one element each, or `[M, 1]` and `[1, N]`, all float32, or, for 128x128 blocks on sm90,
`[M, K/128]` and `[K/128, N/128]`, both with the first dimension innermost, or, for MXFP8 on sm100, `float8_e8m0fnu`
`[M, K/32]` and `[N, K/32]` in the order of `ops.swizzle_steps` (the checks in torch's
`aten/src/ATen/native/cuda/ScaledBlas.cpp`). Some versions of torch want columns of the blocks' padded
to a multiple of 4, which K a multiple of 512 makes the same; cuBLAS wants M to be one. These kernels write bfloat16.

On XPU, oneDNN runs them. It takes blocks with scales `[M, K/128]` and `[K/128, N/128]` or `[K/128, N]`, both row-major
(`aten/src/ATen/native/mkldnn/xpu/ScaledBlas.cpp`). `_scaled_mm_v2`, which has a name for each kind of scales, ends in the same
kernel; Inductor lowers it to this operator.
"""

from __future__ import annotations

import functools

import torch
from torch import fx

from .. import ops
from ..graph import arguments, value
from ..target import Target
from .kernel import YES, Problem, Verdict, no
from .known import known
from .scaled import (
    Scaled,
    ScaledKernel,
    multiples_of,
    pad_rows,
    row_scales,
    rows_of,
    token_scales,
    transposed_scales,
)

aten = torch.ops.aten
_convert = torch.ops.prims.convert_element_type.default


def _linear(problem: Problem, target: Target) -> Verdict:
    return multiples_of(16, problem) and known(problem.scaling, target)


def _blockwise(problem: Problem, target: Target) -> Verdict:
    if not (verdict := known("blockwise", target) and _cuda((12, 9), "128x128 blocks")):
        return verdict
    n, k = problem.weight_shape[-2:]
    return no(f"N must be a multiple of 128 and K of 512, but they are {n} and {k}") if n % 128 or k % 512 else YES


def _many_rows(problem: Problem, target: Target) -> bool:
    """On an H100, 256 and 4096 rows took 0.77 to 0.90 of the time they take with fbgemm's kernel; 1 and 16 rows, 1.1 to 1.5."""
    return problem.rows is None or problem.rows >= 128


def _xpu_blocks(problem: Problem, target: Target) -> Verdict:
    """oneDNN wants whole blocks (vllm#49596 pads N for it)."""
    if problem.activation != "group" or problem.block not in ((128, 128), (1, 128)):
        return no("aten._scaled_mm on xpu takes blocks of 128x128 and 1x128 with groups of 128 in the activation")
    return multiples_of(128, problem) and known("blockwise", target)


def _mx(problem: Problem, target: Target) -> Verdict:
    if problem.activation != "mx":
        return no("the checkpoint does not quantize activations (MXFP8A16)")
    return known("mx", target) and _cuda((12, 8), "MXFP8") and multiples_of(128, problem)


def _cuda(release: tuple[int, int], what: str) -> Verdict:
    has = torch.version.cuda
    if has is None or tuple(map(int, has.split(".")[:2])) >= release:
        return YES
    return no(f"aten._scaled_mm takes {what} with CUDA {release[0]}.{release[1]} or later, not {has}")


def _grouped(problem: Problem, target: Target) -> Verdict:
    if target.capability != (9, 0):
        return no(f"aten._scaled_grouped_mm is for cuda:sm90, not {target}")
    return multiples_of(16, problem)


def _build_linear(do: ops.Do, s: Scaled, fast_accum: bool) -> fx.Node:
    weight = do(aten.permute.default, s.weight, [1, 0])
    scale_a, scale_b = token_scales(do, s, [-1, 1]), row_scales(do, s, [1, value(s.weight).shape[0]])
    # Its bias argument is left alone: Inductor's template asserts on packed biases, and adds for free.
    out = do(aten._scaled_mm.default, s.x, weight, scale_a, scale_b, None, None, torch.bfloat16, fast_accum)
    return finish(do, s, out, s.bias)


def _build_tensorwise(do: ops.Do, s: Scaled, fast_accum: bool) -> fx.Node:
    weight = do(aten.permute.default, s.weight, [1, 0])
    out = do(aten._scaled_mm.default, s.x, weight, s.scale_a, s.weight_scale, None, None, torch.bfloat16, fast_accum)
    return finish(do, s, out, s.bias)


def _build_blockwise(do: ops.Do, s: Scaled) -> fx.Node:
    x, scale_a = pad_rows(do, s.x, 4), pad_rows(do, s.scale_a, 4)
    by_group = do(aten.permute.default, scale_a, [1, 0])
    scale_a = do(aten.permute.default, do(aten.clone.default, by_group, memory_format=torch.contiguous_format), [1, 0])
    weight, scale_b = (do(aten.permute.default, t, [1, 0]) for t in (s.weight, s.weight_scale))
    out = do(aten._scaled_mm.default, x, weight, scale_a, scale_b, None, None, torch.bfloat16, False)
    if x is not s.x:
        out = do(aten.slice.Tensor, out, 0, 0, rows_of(do, s.x))
    return finish(do, s, out, s.bias)


def _build_xpu_blocks(do: ops.Do, s: Scaled) -> fx.Node:
    weight = do(aten.permute.default, s.weight, [1, 0])
    scale_b = transposed_scales(do, s.weight_scale)  # of any strides, but others than these are copied at each call
    out = do(aten._scaled_mm.default, s.x, weight, s.scale_a, scale_b, None, None, torch.bfloat16, False)
    return finish(do, s, out, s.bias)


def _build_mx(do: ops.Do, s: Scaled) -> fx.Node:
    cols = value(s.scale_a).shape[1]
    scale_a = ops.swizzle_steps(do, pad_rows(do, s.scale_a, 128), cols)
    prepacked = s.weight_scale.target is ops.UNSWIZZLED
    scale_b = arguments(s.weight_scale)[0] if prepacked else ops.swizzle_steps(do, s.weight_scale, cols)
    scales = (do(aten.view.dtype, scale, torch.float8_e8m0fnu) for scale in (scale_a, scale_b))
    weight = do(aten.permute.default, s.weight, [1, 0])
    return finish(do, s, do(aten._scaled_mm.default, s.x, weight, *scales, None, None, torch.bfloat16, False), s.bias)


def finish(do: ops.Do, s: Scaled, out: fx.Node, bias: fx.Node | None = None) -> fx.Node:
    """The kernel's bfloat16 result in the model's dtype, and a bias that the kernel did not take."""
    if s.out_dtype != torch.bfloat16:
        out = do(_convert, out, s.out_dtype)
    return out if bias is None else do(aten.add.Tensor, out, do(_convert, bias, s.out_dtype))


def _build_grouped(do: ops.Do, s: Scaled) -> fx.Node:
    experts, rows, _ = value(s.weight).shape
    weight = do(aten.permute.default, s.weight, [0, 2, 1])
    scale_a, scale_b = token_scales(do, s, [-1]), row_scales(do, s, [experts, rows])
    offs = s.offs if value(s.offs).dtype == torch.int32 else do(_convert, s.offs, torch.int32)
    arguments = (s.x, weight, scale_a, scale_b, offs, None, None, torch.bfloat16, True)
    return finish(do, s, do(aten._scaled_grouped_mm.default, *arguments))


def linear(fast_accum: bool, note: str = "") -> tuple[ScaledKernel, ScaledKernel]:
    """The kernels with one scale each, and with scales per row; on Hopper, fast accumulation keeps partial sums with fewer bits
    than float32."""
    one = functools.partial(_build_tensorwise, fast_accum=fast_accum)
    rows = functools.partial(_build_linear, fast_accum=fast_accum)
    name, library = "aten._scaled_mm", "scaled_mm"
    return (
        ScaledKernel(name, library, ("linear",), ("tensorwise",), _linear, one, note=note),
        ScaledKernel(name, library, ("linear",), ("rowwise",), _linear, rows, scale_layout="by row", note=note),
    )


def xpu_blocks(note: str) -> ScaledKernel:
    """The kernel of oneDNN for weights in blocks of 128x128 or 1x128 and activations in groups of 128."""
    return ScaledKernel(
        "aten._scaled_mm", "scaled_mm", ("linear",), ("blockwise", "groupwise"), _xpu_blocks, _build_xpu_blocks,
        scale_layout="transposed", note=note,
    )  # fmt: skip


MX = ScaledKernel("aten._scaled_mm", "scaled_mm", ("linear",), ("mx",), _mx, _build_mx, scale_layout="swizzled")
BLOCKWISE = ScaledKernel(
    "aten._scaled_mm", "scaled_mm", ("linear",), ("blockwise",), _blockwise, _build_blockwise, preferred=_many_rows
)
GROUPED = ScaledKernel(
    "aten._scaled_grouped_mm", "scaled_mm", ("grouped_mm", "gathered_mm"), ("tensorwise", "rowwise"), _grouped,
    _build_grouped, scale_layout="by row",
)  # fmt: skip
