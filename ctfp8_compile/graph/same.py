"""Whether two fake values are of one kind: what a graph knows of a tensor is its shape, dtype, device and strides."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..compat import free_symbols, statically_known_true


def same_kind(one: Any, other: Any) -> bool:
    """Whether two fake values have one shape, dtype, device and strides; tuples, whether their parts do."""
    if isinstance(one, (tuple, list)):
        return (
            isinstance(other, (tuple, list))
            and len(one) == len(other)
            and all(same_kind(a, b) for a, b in zip(one, other, strict=True))
        )
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return isinstance(one, Tensor) == isinstance(other, Tensor) and _equal(one, other)
    if (one.dtype, one.device, one.dim()) != (other.dtype, other.device, other.dim()):
        return False
    return all(map(_equal, one.shape, other.shape)) and same_strides(one, other)


def same_strides(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape lie alike; strides of dimensions of size one, and of empty tensors, do not count."""
    if any(isinstance(size, int) and size == 0 for size in one.shape):
        return True
    steps = zip(one.shape, one.stride(), other.stride(), strict=True)
    return all((isinstance(size, int) and size == 1) or _equal(a, b) for size, a, b in steps)


def _equal(one: Any, other: Any) -> bool:
    """Sizes that only data knows may be equal; numbers that no size depends on are not compared."""
    if not isinstance(one, (int, torch.SymInt)) or not isinstance(other, (int, torch.SymInt)):
        return True
    return statically_known_true(one == other) or any(str(s).startswith("u") for s in free_symbols([one, other]))
