"""Scales as kernels read them: operators on parameters alone, whose result is made once and not at each call.

    scales_by_row([%s0, %s1], [N0, N1])     one scale per row, of matrices that lie one behind the other
    scales_transposed(%s)                   [..., N/128, K/128] as [..., K/128, N/128]
    scales_swizzled(%s)                     MXFP8's [N, K/32], in the order in which Blackwell's tensor cores read it

`passes.scales` puts them into graphs and says how they leave them again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .fp8 import Do, apply
from .operators import operator

aten = torch.ops.aten


@operator(
    "scales_by_row(Tensor[] scales, int[] rows) -> Tensor",
    meta=lambda scales, rows: scales[0].new_empty((*scales[0].shape[:-2], sum(rows), scales[0].shape[-1])),
)
def _by_row(scales: list[Tensor], rows: list[int]) -> Tensor:
    """Each scale stands for as many rows as the others of its matrix."""
    return torch.cat([s.repeat_interleave(n // s.shape[-2], -2) for s, n in zip(scales, rows, strict=True)], -2)


@operator("scales_transposed(Tensor scale) -> Tensor", meta=lambda scale: scale.new_empty(scale.mT.shape))
def _transposed(scale: Tensor) -> Tensor:
    return scale.mT.clone(memory_format=torch.contiguous_format)


@operator(
    "scales_swizzled(Tensor scale) -> Tensor", meta=lambda scale: scale.new_empty(scale.shape[0] * scale.shape[1])
)
def _swizzled(scale: Tensor) -> Tensor:
    swizzled: Tensor = swizzle_steps(apply, scale, scale.shape[1])
    return swizzled


@operator(
    "scales_unswizzled(Tensor scale, int cols) -> Tensor",
    meta=lambda scale, cols: scale.new_empty((scale.shape[0] // cols, cols)),
)
def _unswizzled(scale: Tensor, cols: int) -> Tensor:
    unswizzled: Tensor = unswizzle_steps(apply, scale, cols)
    return unswizzled


def swizzle_steps(do: Do, scale: Any, cols: int) -> Any:
    """`[rows, cols]` in tiles of 128 x 4, of which each holds row i + 32 j in line i, place j; rows and cols are whole tiles."""
    tiles = do(aten.reshape.default, scale, [-1, 4, 32, cols // 4, 4])
    return do(aten.reshape.default, do(aten.permute.default, tiles, [0, 3, 2, 1, 4]), [-1])


def unswizzle_steps(do: Do, scale: Any, cols: int) -> Any:
    """The inverse of `swizzle_steps`."""
    tiles = do(aten.reshape.default, scale, [-1, cols // 4, 32, 4, 4])
    return do(aten.reshape.default, do(aten.permute.default, tiles, [0, 3, 2, 1, 4]), [-1, cols])


BY_ROW = torch.ops.ctfp8.scales_by_row.default
TRANSPOSED = torch.ops.ctfp8.scales_transposed.default
SWIZZLED = torch.ops.ctfp8.scales_swizzled.default
UNSWIZZLED = torch.ops.ctfp8.scales_unswizzled.default
