"""What one of our tensors is of a tensor of a file: the whole, a part of it, the reciprocal of either."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tiles:
    """A matrix of bytes in tiles of 128×4, as cuBLAS reads scales: row 32a + b of a tile lies in its row b, columns from 4a on.

    The file has it with rows and columns filled up to whole tiles.

    Attributes:
        rows, cols: of the matrix.
    """

    rows: int
    cols: int

    @property
    def whole(self) -> tuple[int, int]:
        """The shape in the file."""
        return 128 * math.ceil(self.rows / 128), 4 * math.ceil(self.cols / 4)

    def of(self, stored: Tensor) -> Tensor:
        """The matrix, `[rows, cols]`."""
        whole = self._turned(stored.view(torch.uint8)).reshape(self.whole)
        return whole[: self.rows, : self.cols].contiguous().view(stored.dtype)

    def put(self, whole: Tensor, part: Tensor) -> None:
        """Writes a matrix into the file's tensor, zeros where it has none."""
        filled = torch.zeros(self.whole, dtype=torch.uint8, device=whole.device)
        filled[: self.rows, : self.cols] = part.view(torch.uint8)
        there = self._turned(whole.view(torch.uint8))
        there.copy_(filled.view(there.shape))

    def is_all_of(self, stored: Tensor) -> bool:
        """Whether a tensor of a file holds nothing besides, but zeros."""
        again = torch.empty_like(stored)
        self.put(again, self.of(stored))
        return torch.equal(again.view(torch.uint8), stored.view(torch.uint8))

    def _turned(self, stored: Tensor) -> Tensor:
        rows, cols = self.whole
        return stored.view(rows // 128, cols // 4, 32, 4, 4).permute(0, 3, 2, 1, 4)


@dataclass(frozen=True)
class View:
    """A part of a tensor in a file.

    Attributes:
        index: which matrix of a stack; None for all of it.
        rows: first and last row but one of it; None for all.
        turned: the last two dimensions are swapped.
        inverse: the tensor holds reciprocals; the view's values are float32.
        whole: the shape of the tensor.
        tiles: how the tensor has the matrix that the view is.
    """

    index: int | None = None
    rows: tuple[int, int] | None = None
    turned: bool = False
    inverse: bool = False
    whole: tuple[int, ...] = ()
    tiles: Tiles | None = None

    def of(self, stored: Tensor) -> Tensor:
        """The view's values."""
        if self.tiles is not None:
            return self.tiles.of(stored)
        part = self._part(stored)
        return part.float().reciprocal() if self.inverse else part

    def put(self, whole: Tensor, part: Tensor) -> None:
        """Writes what the file is to hold of this view, of any shape, into its tensor."""
        if self.tiles is not None:
            self.tiles.put(whole, part)
            return
        there = self._part(whole)
        there.copy_(part.reshape(there.shape))  # the same memory, whatever the view

    def _part(self, stored: Tensor) -> Tensor:
        part = stored if self.index is None else stored[self.index]
        part = part if self.rows is None else part[slice(*self.rows)]
        return part.mT if self.turned else part


WHOLE = View()
