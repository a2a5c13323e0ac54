"""A tensor as a safetensors header describes it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from .view import WHOLE, View


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as a safetensors header describes it: `name` is the file's, `dtype` the format's, such as `F8_E4M3`.

    Attributes:
        shape: of the view.
        view: what of the file's tensor it is.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    view: View = WHOLE

    def __str__(self) -> str:
        return f"{self.name} ({self.dtype} {list(self.view.whole or self.shape)} in {self.file.name})"

    def turned(self) -> TensorInfo:
        """The same tensor with its last two dimensions swapped."""
        shape = (*self.shape[:-2], self.shape[-1], self.shape[-2])
        view = replace(self.view, turned=not self.view.turned, whole=self.view.whole or self.shape)
        return replace(self, shape=shape, view=view)
