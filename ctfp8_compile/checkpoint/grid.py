"""How the scales of one FP8 weight lie in its file, and the same scales for smaller blocks.

A file may store them in any shape that says the same (`[N]`, `[N, 1]`, `[1, N]`), and may cut a weight into equal runs of rows
or columns, each of which begins a block of its own: one run for each head, or for each rank of the job that wrote it. Tensors
that become one parameter may differ in all of that. Every grid is therefore read as one of blocks that divide its own:
`spread` repeats scales, `gather` takes the stored ones back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """The blocks of one `[..., rows, columns]` weight that have a scale each.

    Attributes:
        block: rows and columns of a block; 0 stands for all of a run.
        runs: into how many equal runs rows and columns are cut. A block never reaches into the next run.
    """

    block: tuple[int, int]
    runs: tuple[int, int] = (1, 1)

    def __str__(self) -> str:
        """In words: `128x128 that begin anew in each of 4 parts`."""
        size = "x".join(str(n or "all") for n in self.block)
        return size if self.whole else f"{size} that begin anew in each of {math.prod(self.runs)} parts"

    def shape(self, rows: int, cols: int) -> tuple[int, int]:
        """How many blocks a weight has."""
        return self._count(0, rows), self._count(1, cols)

    def fits(self, rows: int, cols: int, found: Sequence[int]) -> bool:
        """Whether a scale of this shape holds one value for each block, in their order.

        A list has one for each row or column of blocks. A matrix is as the blocks lie; that of single rows may lie on its side.
        """
        shape, found = self.shape(rows, cols), as_matrix(found)
        if len(found) != 2 or 1 not in found or math.prod(found) == 1 or self.block in ((1, 0), (0, 1)):
            return squeezed(found) == squeezed(shape)
        return tuple(found) == shape

    def borders(self, rows: int, cols: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The first row and the first column of each block: grids with the same ones mean the same."""
        high, wide = self._starts(0, rows).tolist(), self._starts(1, cols).tolist()
        return tuple(high), tuple(wide)

    @property
    def whole(self) -> bool:
        """Whether blocks follow each other without a break, so that `block` alone describes them."""
        return self.runs == (1, 1)

    def common(self, rows: int, cols: int) -> tuple[int, int]:
        """The largest block of a plain grid that divides this one; 0 stands for all rows or columns."""
        return self._common(0, rows), self._common(1, cols)

    def spread(self, scale: Tensor, shape: Sequence[int], block: tuple[int, int]) -> Tensor:
        """The scales of smaller blocks.

        Args:
            scale: as the file stores it; one value may stand for all matrices.
            shape: of the weight, `[..., rows, cols]`.
            block: one that divides `common`.

        Returns:
            `[..., ceil(rows / block[0]), ceil(cols / block[1])]`, the same dtype.
        """
        *lead, rows, cols = shape
        blocks = self.shape(rows, cols)
        bits = scale.view(torch.uint8) if scale.element_size() == 1 else scale  # no operator takes float8_e8m0fnu
        values = bits.reshape(-1, *blocks).expand(math.prod(lead), *blocks)
        at = [self._of(dim, size, block[dim]) for dim, size in ((0, rows), (1, cols))]
        return values[:, at[0]][:, :, at[1]].reshape(*lead, len(at[0]), len(at[1])).view(scale.dtype)

    def gather(self, scale: Tensor, shape: Sequence[int], block: tuple[int, int], stored: Sequence[int]) -> Tensor:
        """Inverse of `spread`: the scales as the file stored them, in the shape it had."""
        *lead, rows, cols = shape
        at = [self._starts(dim, size) // (block[dim] or size) for dim, size in ((0, rows), (1, cols))]
        values = scale.reshape(math.prod(lead), -(-rows // (block[0] or rows)), -1)
        own = values[:, at[0].to(scale.device)][:, :, at[1].to(scale.device)]
        return own.reshape(-1)[: math.prod(stored)].reshape(stored)  # one scale for all matrices: keep one

    def _run(self, dim: int, size: int) -> tuple[int, int]:
        """How long a run is, and a block of it."""
        run = size // self.runs[dim]
        return run, self.block[dim] or run

    def _count(self, dim: int, size: int) -> int:
        run, block = self._run(dim, size)
        return self.runs[dim] * -(-run // block) if run else 0

    def _common(self, dim: int, size: int) -> int:
        if self.runs[dim] == 1:
            return self.block[dim]
        return math.gcd(*self._run(dim, size))

    def _of(self, dim: int, size: int, step: int) -> Tensor:
        """Of each smaller block, which of ours it lies in."""
        run, block = self._run(dim, size)
        at = torch.arange(0, size, step or size)
        return at // run * -(-run // block) + at % run // block

    def _starts(self, dim: int, size: int) -> Tensor:
        """Where each block begins."""
        run, block = self._run(dim, size)
        return torch.cat([torch.arange(first, first + run, block) for first in range(0, size, run)])


def as_matrix(found: Sequence[int]) -> Sequence[int]:
    """The shape of a grid of scales, of which ModelOpt writes `[rows, 1, columns, 1]`."""
    return (found[0], found[2]) if len(found) == 4 and found[1] == found[3] == 1 else found


def squeezed(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape without dimensions of 1, which say nothing about the order of values."""
    return tuple(n for n in shape if n != 1)
