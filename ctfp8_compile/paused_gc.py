"""Garbage collection, paused while much is made that stays."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

_PAUSED = 100_000  # objects more than before; Python's default is 700 to 2,000
_lock = Lock()
_inside = 0  # how many do, in all threads
_usual = gc.get_threshold()


@contextmanager
def paused_gc() -> Iterator[None]:
    """While modules are imported, a graph is read or compiled: else a tenth to a third of the time goes into collections.

    A collector that was turned off stays so.
    """
    global _inside, _usual
    with _lock:
        if not _inside:
            _usual = gc.get_threshold()
            if _usual[0]:
                gc.set_threshold(max(_usual[0], _PAUSED), *_usual[1:])
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                gc.set_threshold(*_usual)
