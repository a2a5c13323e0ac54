"""Rows of an FP8 table, dequantized: the arithmetic of an embedding, written once for tensors and for graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .fp8 import FP8, Do, apply, exponent_steps

aten = torch.ops.aten
_convert = torch.ops.prims.convert_element_type.default


@dataclass(frozen=True)
class Table:
    """An FP8 table: tensors, or nodes of a graph with their shapes.

    Attributes:
        weight: float8_e4m3fn, of `shape` `[V, K]`.
        scale: float32, or bytes of powers of two where `exponents`, of `scales` `[ceil(V / block[0]), ceil(K / block[1])]`.
    """

    weight: Any
    scale: Any
    shape: Sequence[int]
    scales: Sequence[int]
    block: Sequence[int]
    exponents: bool


def embedding_steps(
    do: Do, ids: Any, sizes: Sequence[Any], table: Table, dtype: torch.dtype, from_the_end: bool = False
) -> Any:
    """`dequantize(table)[ids]` bit for bit, of these rows alone: `[*ids.shape, K]` in `dtype`.

    Args:
        sizes: of `ids`, whose dimensions may be dynamic.
        from_the_end: whether ids may be negative. Then blocks of rows are whole.
    """

    def gather(rows: Any, at: Any) -> Any:
        return do(aten.index.Tensor, rows, [at]) if from_the_end else do(aten.embedding.default, rows, at)

    wide = do(_convert, gather(table.weight, ids), torch.float32)
    scale = _row_scales(do, gather, ids, table)
    product = do(aten.mul.Tensor, wide, scale) if table.scales[1] == 1 else _by_group(do, wide, scale, sizes, table)
    return product if dtype == torch.float32 else do(_convert, product, dtype)


def _row_scales(do: Do, gather: Callable[[Any, Any], Any], ids: Any, table: Table) -> Any:
    """Those of each row, `[*ids.shape, groups]`; or `[groups]` where all rows share them."""
    if table.scales[0] == 1:
        scale = do(aten.select.int, table.scale, 0, 0)
    else:
        at = ids if table.block[0] == 1 else do(aten.div.Tensor_mode, ids, table.block[0], rounding_mode="floor")
        scale = gather(table.scale, at)
    return exponent_steps(do, scale) if table.exponents else scale


def _by_group(do: Do, wide: Any, scale: Any, sizes: Sequence[Any], table: Table) -> Any:
    """Each group of columns by its scale. The last one, where it is a part of one, is multiplied apart: see `decompose`."""
    cols, groups, step = table.shape[1], table.scales[1], table.block[1]
    whole, parts = cols // step, []
    for first, last, width in ((0, whole, step), (whole, groups, cols - whole * step)):
        if first < last:
            rows = do(aten.slice.Tensor, wide, -1, first * step, first * step + (last - first) * width)
            rows = do(aten.reshape.default, rows, [*sizes, last - first, width])
            own = do(aten.unsqueeze.default, do(aten.slice.Tensor, scale, -1, first, last), -1)
            parts.append(do(aten.reshape.default, do(aten.mul.Tensor, rows, own), [*sizes, (last - first) * width]))
    return parts[0] if len(parts) == 1 else do(aten.cat.default, parts, -1)


def embedding(ids: Tensor, weight: Tensor, weight_scale: Tensor, block: Sequence[int], dtype: torch.dtype) -> Tensor:
    """`dequantize(weight)[ids]`, of tensors; it takes the memory of the rows, not that of the table.

    Args:
        ids: integers of any shape.
        weight, weight_scale, block: as of `ctfp8::dequantize`, of two dimensions.

    Raises:
        IndexError: an id is no row of the table.
    """
    exponents = weight_scale.dtype == torch.uint8
    table = Table(weight, weight_scale, weight.shape, weight_scale.shape, block, exponents)
    assert weight.dtype == FP8
    return embedding_steps(apply, ids, ids.shape, table, dtype)
