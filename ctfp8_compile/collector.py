"""Python's garbage collector, told to look less often while much is made that stays."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_SELDOM = 100_000  # objects more than before; Python's default is 700 to 2,000


@contextmanager
def collecting_seldom() -> Iterator[None]:
    """While modules are imported, a graph is read or compiled: else a tenth to a third of the time goes into looking.

    A collector that was turned off stays so.
    """
    often, *older = gc.get_threshold()
    gc.set_threshold(max(often, _SELDOM) if often else 0, *older)
    try:
        yield
    finally:
        gc.set_threshold(often, *older)
