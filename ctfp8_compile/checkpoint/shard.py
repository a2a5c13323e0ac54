"""Which rows and columns of a parameter one rank of several holds, and so which scales it needs.

A rank's part follows from the parameter's `Layout` and from how its dimensions are cut, by arithmetic alone: no process
group is asked, and any rank can say what another one holds. Scales follow their weights. Where a border falls inside a
block, the block is refined to the greatest common divisor with *every* rank's borders, so that all ranks have one graph.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import CheckpointError, SchemeError
from .files import decode_scale
from .layout import Layout, Placement, Turned
from .scheme import Scheme


@dataclass(frozen=True)
class Cut:
    """How one dimension is divided: into `groups` equal slices of indices, and each slice over the ranks, as `torch.chunk` does.

    Attributes:
        dim: counted from the front.
        groups: 2 for gate and up in one parameter, of which each rank has a slice of both.
    """

    dim: int
    ranks: int
    rank: int
    groups: int = 1

    def runs(self, size: int) -> list[tuple[int, int]]:
        """What this rank holds of `size` indices: `(start, stop)`, in order."""
        group = -(-size // self.groups)
        found = []
        for first in range(0, size, group):
            length = min(group, size - first)
            share = -(-length // self.ranks)
            start, stop = (min(length, n * share) for n in (self.rank, self.rank + 1))
            if start < stop:
                found.append((first + start, first + stop))
        return found

    def before(self, size: int, index: int) -> int:
        """How many of this rank's indices are smaller than this one."""
        return sum(max(0, min(stop, index) - start) for start, stop in self.runs(size))


Cuts = tuple[Cut, ...]


@dataclass(frozen=True)
class Clipped(Cut):
    """A cut of `size` indices, of which only those of a range are looked at, counted from its start.

    Attributes:
        size: of all that was cut.
        within: the range.
    """

    size: int = 0
    within: range = range(0)

    def runs(self, size: int) -> list[tuple[int, int]]:
        found = (
            (max(start, self.within.start), min(stop, self.within.stop)) for start, stop in super().runs(self.size)
        )
        return [(start - self.within.start, stop - self.within.start) for start, stop in found if start < stop]


def within(shape: Sequence[int], cuts: Cuts, first: range) -> tuple[slice, Cuts]:
    """Looks at a range of a tensor's first dimension only.

    Returns:
        where this rank's part holds it, and how `[len(first), *shape[1:]]` is cut.
    """
    cut = next((cut for cut in cuts if cut.dim == 0), None)
    if cut is None:
        return slice(first.start, first.stop), cuts
    clipped = tuple(Clipped(c.dim, c.ranks, c.rank, c.groups, shape[0], first) if c.dim == 0 else c for c in cuts)
    return slice(cut.before(shape[0], first.start), cut.before(shape[0], first.stop)), clipped


def held(shape: Sequence[int], cuts: Cuts) -> tuple[Tensor, ...]:
    """For each dimension, the indices this rank holds, in order."""
    by_dim = {cut.dim: cut for cut in cuts}
    return tuple(
        torch.cat([torch.arange(*run) for run in by_dim[d].runs(n)] or [torch.arange(0)])
        if d in by_dim
        else torch.arange(n)
        for d, n in enumerate(shape)
    )


def local_shape(shape: Sequence[int], cuts: Cuts) -> tuple[int, ...]:
    return tuple(len(indices) for indices in held(shape, cuts))


def put(whole: Tensor, part: Tensor, cuts: Cuts) -> None:
    """Writes a rank's part into the tensor it was cut from."""
    for there, here in _slices(whole.shape, cuts):
        whole[there] = part[here]


def take(whole: Tensor, cuts: Cuts) -> Tensor:
    """Inverse of `put`: a copy of a rank's part."""
    part = torch.empty(local_shape(whole.shape, cuts), dtype=whole.dtype, device=whole.device)
    for there, here in _slices(whole.shape, cuts):
        part[here] = whole[there]
    return part


def of_rank(cuts: Cuts, rank: int) -> Cuts:
    return tuple(replace(cut, rank=rank) for cut in cuts)


@dataclass(frozen=True)
class Shard(Layout):
    """The layout of the part of a parameter that one rank holds.

    Its placements are of the rows that the rank holds of each checkpoint matrix, so `weight` takes these rows and no others;
    where matrices are turned while they are loaded it takes whole tensors, since rows are columns there.
    Scales are cut from the whole parameter's, see `cut_scale`.
    """

    whole: Layout
    cuts: Cuts

    def block(self, scheme: Scheme) -> tuple[int, int]:
        rows, columns = self.whole.block(scheme)
        dims = len(self.shape)
        return self._refined(dims - 2, rows), self._refined(dims - 1, columns) if scheme.block[1] else self.shape[-1]

    def weight(self, sources: Mapping[str, Tensor]) -> Tensor:
        if isinstance(self.whole, Turned):
            (source,) = self.whole.sources
            return take(sources[source].mT, self.cuts)
        for p in self.placements:
            found = tuple(sources[p.source].shape[-2:])
            if found != (p.rows, self.shape[-1]):
                raise CheckpointError(
                    f"{p.source}: {list(found)} were read of it for this rank, {[p.rows, self.shape[-1]]} are needed; "
                    "the file does not fit the config."
                )
        return super().weight(sources)

    def __str__(self) -> str:
        """Which part of the parameter it is, such as `1/2 of the rows`."""
        dims = ("rows", "columns") if len(self.shape) == 2 else ("matrices", "rows", "columns")
        return " and ".join(f"1/{cut.ranks} of the {dims[cut.dim]}" for cut in self.cuts)

    def cut_block(self, scheme: Scheme) -> tuple[int, int] | None:
        """The block of the whole parameter, if a border between ranks cuts it; `block` says what it becomes."""
        whole = self.whole.block(scheme)
        return whole if all(scheme.block) and whole != self.block(scheme) else None

    def cut_scale(self, scale: Tensor, scheme: Scheme) -> Tensor:
        """This rank's scales, from those of the whole parameter; float32 where bytes are of a group that a border cuts."""
        high, wide = self.whole.block(scheme)
        mine, across = self.block(scheme)
        *experts, rows, columns = held(self.whole.shape, self.cuts)
        own = scale[experts[0]] if experts else scale
        part = own[..., rows[::mine] // high, :][..., columns[::across] // wide].contiguous()
        return part if self.cut_block(scheme) is None else decode_scale(part)

    def put_scale(self, whole: Tensor, part: Tensor, scheme: Scheme) -> None:
        """Inverse of `cut_scale`: writes this rank's scales into those of the whole parameter."""
        high, wide = self.whole.block(scheme)
        mine, across = self.block(scheme)
        *experts, rows, columns = held(self.whole.shape, self.cuts)
        i, j = (
            at % size == 0 for at, size in ((rows, high), (columns, wide))
        )  # a block is written by who has its corner
        lead = experts[0][:, None, None] if experts else ...
        part = part[..., i.nonzero()[:, 0] // mine, :][..., j.nonzero()[:, 0] // across]
        whole[lead, (rows[i] // high)[:, None], columns[j] // wide] = part

    def _refined(self, dim: int, size: int) -> int:
        """The largest part of a block that no border of any rank falls into."""
        cut = next((cut for cut in self.cuts if cut.dim == dim), None)
        whole = self.whole.shape[dim]
        if cut is None or size >= whole:
            return size
        borders = [size]
        for rank in range(cut.ranks):
            here = 0
            for start, stop in replace(cut, rank=rank).runs(whole):
                borders += [start, here]
                here += stop - start
        return math.gcd(*borders)


def blocks_of(layout: Layout, cuts: Cuts) -> Shard:
    """What one rank holds of a parameter, as far as scales go: it may be nothing, and no row of a file is placed."""
    return Shard(local_shape(layout.shape, cuts), layout.transposed, (), layout, cuts)


def cure(cut: Sequence[tuple[Shard, Scheme]]) -> str:
    """What keeps whole the blocks of parameters that borders between ranks cut."""
    if all(len(part.shape) == 3 for part, _ in cut):
        return "ep_size keeps them whole"

    def fits(ranks: int) -> bool:
        over = (replace(part, cuts=tuple(replace(c, ranks=ranks, rank=0) for c in part.cuts)) for part, _ in cut)
        return all(part.cut_block(scheme) is None for part, (_, scheme) in zip(over, cut, strict=True))

    fewer = range(cut[0][0].cuts[0].ranks - 1, 1, -1)
    return f"tp_size={next(filter(fits, fewer), 1)} keeps them whole"


def shard(layout: Layout, cuts: Cuts) -> Shard:
    """What one rank holds of a parameter.

    Raises:
        SchemeError: nothing, or rows that transformers would not read for it.
    """
    indices = held(layout.shape, cuts)
    name = layout.placements[0].source
    if not all(len(i) for i in indices):
        cut = next(cut for cut in cuts if not len(indices[cut.dim]))
        raise SchemeError(
            f"{name}: a dimension of {layout.shape[cut.dim]} leaves nothing for rank {cut.rank} of {cut.ranks}. "
            "Use fewer ranks."
        )
    height = layout.shape[-2]
    matrices = indices[0] if len(layout.shape) == 3 else torch.zeros(1, dtype=torch.long)
    rows = (matrices[:, None] * height + indices[-2]).reshape(-1)
    position = torch.full((math.prod(layout.shape[:-1]),), -1)
    position[rows] = torch.arange(len(rows))
    seen: dict[str, int] = {}
    placements = []
    for p in layout.placements:
        at = position[p.span]
        own = (at >= 0).nonzero()[:, 0]
        if not len(own):
            continue
        there = at[own]
        step = int(there[1] - there[0]) if len(own) > 1 else 1
        read = isinstance(layout, Turned) or _is_read(p, own, layout, cuts)  # turned: whole tensors are
        if not read or not torch.equal(there, there[0] + step * torch.arange(len(own))):
            raise SchemeError(
                f"{p.source}: the plan cuts the rows of a parameter it is merged into where transformers does not cut it. "
                "Use expert parallelism (ep_size), or a number of ranks that divides its rows."
            )
        index = None
        if p.index is not None:
            index = seen[p.source] = seen.get(p.source, -1) + 1  # other ranks' matrices are not read
        placements.append(Placement(p.source, index, int(there[0]), step, len(own)))
    return Shard(tuple(len(i) for i in indices), layout.transposed, tuple(placements), layout, cuts)


def _is_read(p: Placement, own: Tensor, layout: Layout, cuts: Cuts) -> bool:
    """Whether transformers reads just these rows of a matrix: it cuts each tensor of a file as if it were the parameter."""
    cut = next((cut for cut in cuts if cut.dim == len(layout.shape) - 2), None)
    if cut is None:
        return len(own) == p.rows
    one_of_many = len(layout.shape) == 3 and p.index is None  # the matrix of each expert is one slice
    read = [torch.arange(*run) for run in replace(cut, groups=1 if one_of_many else cut.groups).runs(p.rows)]
    return torch.equal(own, torch.cat(read or [own[:0]]))


def _slices(shape: Sequence[int], cuts: Cuts) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
    """Each run of indices as slices of the whole tensor, and of the part."""
    pairs: list[tuple[tuple[slice, ...], tuple[slice, ...]]] = [((), ())]
    by_dim = {cut.dim: cut for cut in cuts}
    for d, n in enumerate(shape):
        runs = by_dim[d].runs(n) if d in by_dim else [(0, n)]
        here, along = 0, []
        for start, stop in runs:
            along.append((slice(start, stop), slice(here, here + stop - start)))
            here += stop - start
        pairs = [((*a, there), (*b, mine)) for a, b in pairs for there, mine in along]
    yield from pairs
