"""A tensor as a safetensors header describes it."""

from __future__ import annotations

from dataclasses import dataclass
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
