"""Tensors that are saved in one step, and what is found out of values before: a few megabytes of them at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..checkpoint import files as ckpt
from ..checkpoint.layout import Turned
from ..checkpoint.source import Stored, same_bits
from ..checkpoint.writer import DTYPES, Entry
from ..model.experts import runs_of_experts
from ..model.plan import QuantizedParameter
from .held import Wanted

GATHERED = 1 << 22  #: bytes that the first of several ranks gathers at a time: of experts, or of rows to compare


@dataclass(frozen=True)
class Unit:
    """Tensors of a checkpoint that are made in one step.

    Attributes:
        make: their values, a tensor at once or some of its rows after the other; None: bytes of the files, `stored`.
        gathers: what all ranks send to the first for it, in this order.
    """

    entries: tuple[Entry, ...]
    make: Callable[[], Mapping[str, Tensor | Iterator[Tensor]]] | None = None
    stored: tuple[Stored, ...] = ()
    gathers: tuple[Wanted, ...] = ()

    @staticmethod
    def of_files(stored: Iterable[Stored]) -> Unit:
        found = tuple(stored)
        return Unit(tuple(Entry(t.name, t.dtype, t.shape, t.nbytes) for t in found), None, found)


@dataclass(frozen=True)
class Compared:
    """What is known of a value and the tensor of the files that it was loaded from, as far as it was looked at.

    Attributes:
        same: the files have these values.
        exact: the dtype that it has there holds them.
    """

    stored: Stored
    same: bool
    exact: bool = True

    def and_of(self, rows: range, value: Tensor) -> Compared:
        """The same with these rows of the value."""
        same = self.same and self.stored.rows(rows).is_value(value)
        return replace(self, same=same, exact=self.exact and (same or is_exact(value, self.stored)))


def is_exact(value: Tensor, stored: Stored) -> bool:
    """Whether the dtype that a tensor has in the files holds a value. float8 is no such: it would need a scale."""
    dtype = floating_dtype(stored)
    if dtype is None or dtype == value.dtype or not value.is_floating_point():
        return True
    return dtype.itemsize > 1 and same_bits(value.to(dtype).to(value.dtype), value)


def holds_scale(scale: Tensor, dtype: torch.dtype) -> bool:
    """Whether a dtype that scales have in files holds these."""
    values = ckpt.decode_scale(scale)
    return torch.equal(ckpt.decode_scale(ckpt.encode_scale(values, dtype)), values)


def floating_dtype(stored: Stored) -> torch.dtype | None:
    """The dtype that a tensor has in the files, if it is a floating-point one that torch has."""
    dtype = DTYPES.get(stored.dtype)
    return dtype if dtype is not None and dtype.is_floating_point else None


def experts_in_turn(info: QuantizedParameter) -> list[range]:
    """Experts of a parameter in steps of no more than `GATHERED` bytes, or of one; [] where they cannot be told apart."""
    return runs_of_experts(info, GATHERED)


def is_one_matrix(info: QuantizedParameter) -> bool:
    """Whether a parameter is one matrix of the file, so that its rows can be written as they come."""
    layout = info.layout
    if len(layout.shape) != 2 or len(layout.placements) != 1 or isinstance(layout, Turned):
        return False
    (only,) = layout.placements
    return info.shapes[only.source] == layout.shape and only.step == 1


def rows_in_turn(shape: tuple[int, ...], itemsize: int) -> list[range]:
    """Rows of a tensor, some after the other, in steps of no more than `GATHERED` bytes, or of one row."""
    step = max(1, GATHERED // max(1, math.prod(shape[1:]) * itemsize))
    return [range(first, min(first + step, shape[0])) for first in range(0, shape[0], step)]
