"""Inductor's decompositions, where they give other strides than eager does: a stride that changes costs another graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..compat import select_decomp_table

_CAT = torch.ops.aten.cat.default


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Those of Inductor; what is concatenated is contiguous, as in eager, also where all but one of the tensors are empty.

    A growing cache begins empty. What a prompt leaves in it would otherwise lie as its keys were computed, and what the first
    token leaves, contiguous: a graph for either.
    """
    table = dict(select_decomp_table())
    theirs = table[_CAT]

    def cat(tensors: Sequence[Tensor], dim: int = 0) -> Any:
        found = theirs(tensors, dim)
        return found if found is NotImplemented or _is_channels_last(found) else found.contiguous()

    table[_CAT] = cat
    return table


def _is_channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
