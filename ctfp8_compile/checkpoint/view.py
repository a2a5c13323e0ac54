"""What one of our tensors is of a tensor of a file: the whole, a part of it, the reciprocal of either."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class View:
    """A part of a tensor in a file.

    Attributes:
        index: which matrix of a stack; None for all of it.
        rows: first and last row but one of it; None for all.
        turned: the last two dimensions are swapped.
        inverse: the tensor holds reciprocals; the view's values are float32.
        whole: the shape of the tensor.
    """

    index: int | None = None
    rows: tuple[int, int] | None = None
    turned: bool = False
    inverse: bool = False
    whole: tuple[int, ...] = ()

    def of(self, stored: Tensor) -> Tensor:
        """The view's values."""
        part = self._part(stored)
        return part.float().reciprocal() if self.inverse else part

    def put(self, whole: Tensor, part: Tensor) -> None:
        """Writes what the file is to hold of this view, of any shape, into its tensor."""
        there = self._part(whole)
        there.copy_(part.reshape(there.shape))  # the same memory, whatever the view

    def _part(self, stored: Tensor) -> Tensor:
        part = stored if self.index is None else stored[self.index]
        part = part if self.rows is None else part[slice(*self.rows)]
        return part.mT if self.turned else part


WHOLE = View()
