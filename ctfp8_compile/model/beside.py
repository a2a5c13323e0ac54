"""What runs beside a model without being a part of it, such as layers that draft tokens; `explain` shows it, too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

_KEY = "_ctfp8_beside"


@dataclass(frozen=True)
class Beside:
    """A module and how it is called.

    Attributes:
        prefix: of the names of its own parameters; the others are the model's.
        shown: what stands for that in a report.
    """

    module: nn.Module
    args: tuple[Any, ...]
    prefix: str
    shown: str


def put_beside(model: nn.Module, make: Callable[[], list[Beside]]) -> None:
    """`make` is asked each time; it is not kept in the model's tree of modules."""
    vars(model)[_KEY] = make


def beside(model: nn.Module) -> Iterator[Beside]:
    """What runs beside a model, or beside one that it wraps."""
    for module in model.modules():
        if (make := vars(module).get(_KEY)) is not None:
            yield from make()
