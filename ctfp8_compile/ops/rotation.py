"""`ctfp8::rotate`: an activation times a block-diagonal matrix of a rotated checkpoint (`checkpoint.transforms`).

    y[..., b·B : (b+1)·B] = to(to(x[..., b·B : (b+1)·B], precision) @ M / scale, x's dtype)        M: [B, B], or transposed

It is compressed-tensors' own arithmetic (`HadamardTransform.forward`): product and division are in the precision that the
config names, and the result is rounded once, to the activation's dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .fp8 import Do, apply
from .operators import operator

aten = torch.ops.aten


@operator(
    "rotate(Tensor x, Tensor matrix, float scale, bool transposed, ScalarType precision, str name) -> Tensor",
    meta=lambda x, matrix, scale, transposed, precision, name: x.new_empty(x.shape),
)
def _rotate(x: Tensor, matrix: Tensor, scale: float, transposed: bool, precision: torch.dtype, name: str) -> Tensor:
    out = rotate_steps(apply, x, x.shape, x.dtype, matrix, matrix.shape[0], scale, transposed, precision)
    return out.clone() if out is x else out  # an operator must not return its input


def rotate_steps(
    do: Do, x: Any, shape: Sequence[Any], dtype: torch.dtype, matrix: Any, block: int, scale: float, transposed: bool,
    precision: torch.dtype,
) -> Any:  # fmt: skip
    """The operations of `ctfp8::rotate`.

    Args:
        x: `[..., K]` of this `shape` and `dtype`, K a multiple of `block`.
        matrix: `[block, block]`.
    """
    convert = torch.ops.prims.convert_element_type.default
    matrix = do(convert, matrix, precision)
    if transposed:
        matrix = do(aten.permute.default, matrix, [1, 0])
    rows = do(aten.reshape.default, do(convert, x, precision), [-1, block])
    product = do(aten.mm.default, rows, matrix)
    if scale != 1.0:
        product = do(aten.div.Tensor, product, scale)
    return do(convert, do(aten.reshape.default, product, list(shape)), dtype)


ROTATE = torch.ops.ctfp8.rotate.default
