"""What is around a graph that Inductor compiled: parameters packed, scales prepacked, weights out of their files."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..model.storage import detach_from_mmap
from .packed import Groups, WithPacked
from .prepacked import Made, WithPrepacked


@dataclass(frozen=True)
class Finished:
    """By places among the graph's arguments, so that it can be pickled.

    Attributes:
        leaves_files: whether weights leave the checkpoint's mapped files at the first call.
    """

    prepacked: tuple[Made, ...] = ()
    packed: Groups = ()
    leaves_files: bool = False

    def around(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """The graph as the caller of the model calls it."""
        if self.prepacked:
            compiled = WithPrepacked(compiled, self.prepacked)
        if self.packed:
            compiled = WithPacked(compiled, self.packed)
        # outermost: what is packed in a file must not be taken for moved, and then leave it one by one
        return _detaching_first(compiled) if self.leaves_files else compiled


#: Told: whoever records what this thread compiles.
_listening = threading.local()


@contextmanager
def telling(listener: Callable[..., None]) -> Iterator[None]:
    """The listener is told of each graph that our backend finishes in this thread: as `tell` is."""
    outer, _listening.told = getattr(_listening, "told", None), listener
    try:
        yield
    finally:
        _listening.told = outer


def tell(*about: Any) -> None:
    """Our backend has finished a graph: compiled, Inductor's options, what is around it, the target."""
    if (told := getattr(_listening, "told", None)) is not None:
        told(*about)


def _detaching_first(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """The weights are among the graph's arguments: at its first call they, and no input, leave the checkpoint's files."""
    called = False

    def call(*args: Any) -> Any:
        nonlocal called
        if not called:
            detach_from_mmap(args)
            called = True
        return compiled(*args)

    return call
