"""Parameters of a compiled graph that are packed in memory: they are moved there. `pack_lowering`: how Inductor reads them.

`horizontal_fusion.declare` says which. A graph may be called with other parameters than it was compiled with (another layer, a
model moved to another device), so that they do is made sure at every call, by comparing addresses.

They are packed in one storage: an allocator may put tensors one behind the other by chance, and torch then refuses to
read all of them through the first one. So that addresses tell one from the other, ours begin where no allocation does.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, fx

from ..graph import fake_value
from ..model.storage import outliving

_MOST = 4096  # sets of parameters that one graph remembers
#: Where in its allocation a group begins, bytes: allocations on GPUs begin at multiples of twice as many.
_BEGIN = 256


#: Of each group: `(argument, its distance in bytes from the first)`.
Groups = Sequence[Sequence[tuple[int, int]]]


def places_of(graph: fx.Graph, groups: Sequence[Sequence[fx.Node]]) -> Groups:
    """What is packed, by places among a graph's arguments."""
    at = {node: i for i, node in enumerate(n for n in graph.nodes if n.op == "placeholder")}
    found = []
    for group in groups:
        ends = itertools.accumulate(fake_value(node).nbytes for node in group)
        found.append([(at[node], begin) for node, begin in zip(group, (0, *ends), strict=False)])
    return found


class WithPacked:
    """Calls a compiled graph after making sure that the parameters of each group are packed."""

    def __init__(self, compiled: Callable[..., Any], groups: Groups):
        self.compiled, self.groups = compiled, groups
        self.pick = itemgetter(*(i for group in self.groups for i, _ in group))
        #: Addresses that were found packed: at the last call, and at calls before it.
        self.last: tuple[int, ...] = ()
        self.known: set[tuple[int, ...]] = set()

    def __call__(self, *args: Any) -> Any:
        if not self.as_before(args):
            self._make_sure(args)
        return self.compiled(*args)

    def as_before(self, args: tuple[Any, ...]) -> bool:
        """Whether all parameters are where they were at the last call."""
        return tuple(map(_address, self.pick(args))) == self.last

    def _make_sure(self, args: tuple[Any, ...]) -> None:
        addresses = tuple(map(_address, self.pick(args)))
        if addresses not in self.known:
            if any(_apart(args, group) for group in self.groups):
                with _MOVING:  # another thread may have moved them meanwhile, or be about to
                    for group in self.groups:
                        if _apart(args, group):
                            move_together([args[i] for i, _ in group])
            addresses = tuple(map(_address, self.pick(args)))
            if len(self.known) >= _MOST:
                self.known.clear()
            self.known.add(addresses)
        self.last = addresses


#: One for all graphs, because they may share parameters.
_MOVING = threading.Lock()
_address = Tensor.data_ptr


def _apart(args: Sequence[Any], group: Sequence[tuple[int, int]]) -> bool:
    first = args[group[0][0]]
    begin, storage = first.data_ptr(), first.untyped_storage().data_ptr()
    if first.device.type != "cpu" and begin % (2 * _BEGIN) == 0:
        return True
    return any(
        args[i].data_ptr() != begin + distance or args[i].untyped_storage().data_ptr() != storage
        for i, distance in group
    )


@outliving
def move_together(tensors: Sequence[Tensor]) -> None:
    """Moves tensors into one allocation, one behind the other along the first dimension; they become views of it.

    A tensor becomes a view when its bytes are there: another thread that finds all of them packed may read them.
    """
    first = tensors[0]
    rows = [t.shape[0] for t in tensors]
    begin = _BEGIN // first.element_size()
    storage = torch.empty(begin + sum(t.numel() for t in tensors), dtype=first.dtype, device=first.device)
    whole = storage[begin:].view(sum(rows), *first.shape[1:])
    parts = whole.split(rows)
    for tensor, part in zip(tensors, parts, strict=True):
        part.copy_(tensor)
    if whole.device.type != "cpu":
        getattr(torch, whole.device.type).synchronize()  # other threads have streams of their own
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.data = part
