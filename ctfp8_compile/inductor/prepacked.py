"""A compiled graph gets scales as its kernels read them: made at the first call, and again where a scale is another one.

`passes.prepack` says which. A graph may be called with other parameters than it was compiled with (another layer), and their
values may change (`load_state_dict`), so what was made is known by addresses and versions of what it was made of. Writes through
`.data` or NumPy count no version: on CPUs, where the scales are a number a weight, values are compared, too.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx

from ..model.storage import outliving
from ..passes.prepack import Computation, Prepacked

_MOST = 4096  # sets of parameters that one graph keeps scales for


@dataclass(frozen=True)
class _Values:
    """What was made of one set of scales: `sources` keep its memory, so that an address is not given to another tensor.

    Attributes:
        copies: of the sources on a CPU, as they were.
    """

    sources: tuple[Tensor, ...]
    versions: tuple[int, ...]
    copies: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are still the scales it was made of."""
        return self.versions == _versions(tensors) and all(map(torch.equal, tensors, self.copies))


@dataclass(frozen=True)
class Argument:
    """The graph's argument at a place."""

    place: int


@dataclass(frozen=True)
class Made:
    """What takes the place of an argument."""

    place: int
    of: Computation


def made_of(graph: fx.Graph, prepacked: Sequence[Prepacked]) -> tuple[Made, ...]:
    """What is prepacked, by places among a graph's arguments."""
    at = {node: Argument(i) for i, node in enumerate(n for n in graph.nodes if n.op == "placeholder")}
    return tuple(Made(at[one.sources[0]].place, one.of.calling(at, Argument)) for one in prepacked)


class WithPrepacked:
    """Calls a compiled graph with scales prepacked in the place of what they are made of."""

    def __init__(self, compiled: Callable[..., Any], prepacked: Sequence[Made]):
        self.compiled, self.prepacked = compiled, prepacked
        self.places = [one.place for one in prepacked]
        self.sources = tuple(dict.fromkeys(source for one in prepacked for source in one.of.parameters()))
        self.at = [source.place for source in self.sources]
        self.made: dict[tuple[int, ...], _Values] = {}
        self.lock = threading.Lock()

    def __call__(self, *args: Any) -> Any:
        given = list(args)
        for place, value in zip(self.places, self.values([args[i] for i in self.at]), strict=True):
            given[place] = value
        return self.compiled(*given)

    def values(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """What is made of these scales."""
        key = tuple(map(_address, tensors))
        made = self.made.get(key)
        if made is None or not made.holds(tensors):
            with self.lock:
                if len(self.made) >= _MOST:
                    self.made.clear()
                made = self.made[key] = self._make(tensors)
        return made.values

    @outliving
    def _make(self, tensors: Sequence[Tensor]) -> _Values:
        versions = _versions(tensors)
        values = dict(zip(self.sources, tensors, strict=True))
        made = tuple(one.of(values) for one in self.prepacked)
        if made[0].device.type != "cpu":
            getattr(torch, made[0].device.type).synchronize()  # other threads have streams of their own
        copies = tuple(t.detach().clone() for t in tensors if t.device.type == "cpu")
        return _Values(tuple(t.detach() for t in tensors), versions, copies, made)


_address = Tensor.data_ptr
_version = attrgetter("_version")


def _versions(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """How often each was written to; inference tensors, which do not count, are never written to outside of their mode."""
    try:
        return tuple(map(_version, tensors))
    except RuntimeError:
        return ()
