"""Where the rows of a checkpoint's weights lie in a model's parameter, and so which rows share a scale.

transformers merges, stacks, concatenates, interleaves or transposes weights while loading. Whatever it does to a
parameter is described here by one fact per checkpoint tensor: its rows go to `start, start + step, ...` of the
parameter's rows. Weights, scales and saving back all follow from it, so no merge needs code of its own.

A block scale covers `block[0]` rows of *its own* tensor. Where tensors of other heights were merged, block borders of
the second one no longer fall on multiples of `block[0]`; the block is then refined to the greatest common divisor, and
scales are repeated. Interleaved rows refine it to 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import SchemeError
from .files import encode_scale
from .scheme import Scheme


@dataclass(frozen=True)
class Placement:
    """Rows of one `[rows, K]` matrix of a checkpoint inside a parameter.

    Attributes:
        source: checkpoint name of the tensor.
        index: which matrix of it, where the tensor in the file is three-dimensional; else None.
        start, step: row `i` of the source is row `start + i * step` of the flattened parameter `[-1, K]`.
        rows: number of rows.
    """

    source: str
    index: int | None
    start: int
    step: int
    rows: int

    @property
    def span(self) -> slice:
        return slice(self.start, self.start + self.rows * self.step, self.step)


@dataclass(frozen=True)
class Layout:
    """A parameter as we store it, `[..., N, K]` (rows are outputs), and what each row comes from.

    Attributes:
        shape: stored shape, `[N, K]` or `[E, N, K]`.
        transposed: the model wants `[..., K, N]`; storage keeps `[..., N, K]` and the dequantized result is transposed.
        placements: one per checkpoint matrix; together they cover each row once.
    """

    shape: tuple[int, ...]
    transposed: bool
    placements: tuple[Placement, ...]

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(p.source for p in self.placements))

    def block(self, scheme: Scheme) -> tuple[int, int]:
        """Rows and columns of the stored parameter that share a scale."""
        columns = scheme.block[1] or self.shape[-1]
        if scheme.block[0] == 1 or any(p.step != 1 for p in self.placements):
            return (1, columns)
        starts = (p.start % self.shape[-2] for p in self.placements)
        return (math.gcd(scheme.block[0] or self.shape[-2], *starts), columns)

    def weight(self, sources: Mapping[str, Tensor]) -> Tensor:
        """The stored parameter from checkpoint tensors; no copy where it is one of them unchanged."""
        only = sources[self.placements[0].source]
        if len(self.sources) == 1 and tuple(only.shape) == self.shape and all(p.step == 1 for p in self.placements):
            return only
        out = torch.empty(self.shape, dtype=only.dtype, device=only.device)
        flat = out.view(-1, self.shape[-1])
        for p in self.placements:
            source = sources[p.source]
            flat[p.span] = source if p.index is None else source[p.index]
        return out

    def scale(self, sources: Mapping[str, Tensor], scheme: Scheme) -> Tensor:
        """The scales of the stored parameter, `[..., ceil(N / block[0]), ceil(K / block[1])]` in `scheme.scale_dtype`.

        Args:
            sources: by *weight* name, the scale tensors as the checkpoint stores them.
        """
        rows = self.block(scheme)[0]
        height = math.ceil(self.shape[-2] / rows)
        width = math.ceil(self.shape[-1] / self.block(scheme)[1])
        out = torch.empty((*self.shape[:-2], height, width), dtype=scheme.scale_dtype)
        flat = out.view(-1, width)
        for p in self.placements:
            blocks = encode_scale(_matrix_scale(sources[p.source], p, scheme), scheme.scale_dtype)
            # first row of each of our blocks → the block of the source that holds it
            chosen = torch.arange(0, p.rows, rows) // (scheme.block[0] or p.rows)
            flat[self._blocks(p, rows)] = blocks[chosen]
        return out

    def split_weight(self, weight: Tensor, source: str) -> Tensor:
        """Inverse of `weight`: one checkpoint tensor from the stored parameter."""
        flat = weight.reshape(-1, self.shape[-1])
        parts = [flat[p.span] for p in self.placements if p.source == source]
        return self._gather(parts, source, self.shape[-1])

    def split_scale(self, scale: Tensor, source: str, scheme: Scheme, like: tuple[int, ...]) -> Tensor:
        """Inverse of `scale`: the scales of one checkpoint tensor, in the shape the file had (`like`), float32."""
        rows = self.block(scheme)[0]
        flat = scale.reshape(-1, scale.shape[-1])
        parts = []
        for p in self.placements:
            if p.source == source:
                ours = flat[self._blocks(p, rows)]
                first = torch.arange(0, p.rows, scheme.block[0] or p.rows, device=scale.device) // rows
                parts.append(ours[first])
        return torch.cat(parts).reshape(-1)[: math.prod(like)].reshape(like)  # one scale for all matrices: keep one

    def _blocks(self, p: Placement, rows: int) -> slice:
        """Rows of the flattened scale that hold the blocks of a placement."""
        if rows == 1:
            return p.span
        matrix, local = divmod(p.start, self.shape[-2])
        first = matrix * math.ceil(self.shape[-2] / rows) + local // rows
        return slice(first, first + math.ceil(p.rows / rows))

    def _gather(self, parts: list[Tensor], source: str, width: int) -> Tensor:
        indexed = any(p.index is not None for p in self.placements if p.source == source)
        if len(parts) == 1 and not indexed:
            return parts[0]
        return torch.cat(parts).view(len(parts), -1, width)


@dataclass(frozen=True)
class Turned(Layout):
    """Of one checkpoint tensor `[E, K, N]` (columns are outputs), as gpt-oss and Llama 4 declare their experts.

    Its matrices are transposed while they are loaded, so that they are stored, and multiplied, as all others.
    """

    def weight(self, sources: Mapping[str, Tensor]) -> Tensor:
        return super().weight({name: tensor.mT for name, tensor in sources.items()}).contiguous()

    def split_weight(self, weight: Tensor, source: str) -> Tensor:
        return super().split_weight(weight, source).mT.contiguous()


def turned(source: str, shape: Sequence[int]) -> Turned:
    """The layout of a parameter that is one checkpoint tensor `[E, K, N]`."""
    plain = identity(source, (*shape[:-2], shape[-1], shape[-2]))
    return Turned(plain.shape, True, plain.placements)


def identity(source: str, shape: Sequence[int]) -> Layout:
    """The layout of a parameter that is one checkpoint tensor unchanged."""
    rows = shape[-2]
    matrices = [None] if len(shape) == 2 else list(range(math.prod(shape[:-2])))
    return Layout(tuple(shape), False, tuple(Placement(source, i, (i or 0) * rows, 1, rows) for i in matrices))


def trace(
    shapes: Mapping[str, tuple[int, ...]],
    wanted: Mapping[str, tuple[int, ...]],
    convert: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]],
) -> dict[str, Layout]:
    """Finds out what a conversion does to rows, by converting row numbers instead of weights.

    Args:
        shapes: checkpoint tensors by name, `[rows, K]` or `[E, rows, K]`.
        wanted: the parameters the conversion makes, by name, in the shape the *model* declares.
        convert: the conversion; called with int64 tensors `[..., rows, 1]` that number all rows.

    Raises:
        SchemeError: the conversion does more than move whole rows.
    """
    numbers, owners, base = {}, [], 0
    for name, shape in shapes.items():
        rows = math.prod(shape[:-1])
        numbers[name] = torch.arange(base, base + rows).view(*shape[:-1], 1)
        owners.append((base, name, shape))
        base += rows
    layouts = {}
    for target, result in convert(numbers).items():
        shape = wanted[target]
        k = next(iter(shapes.values()))[-1]
        if tuple(result.shape) == (*shape[:-1], 1) and shape[-1] == k:
            transposed, stored = False, shape
        elif tuple(result.shape) == (*shape[:-2], 1, shape[-1]) and shape[-2] == k:
            transposed, stored = True, (*shape[:-2], shape[-1], shape[-2])
        else:
            raise SchemeError(
                f"{target} {list(shape)}: its checkpoint tensors, such as {next(iter(shapes))} "
                f"{list(next(iter(shapes.values())))}, give {list(result.shape)} rows; the file does not fit the config."
            )
        layouts[target] = Layout(stored, transposed, _placements(target, result.reshape(-1), owners))
        for source in layouts[target].sources:
            if shapes[source][-1] != k:
                raise SchemeError(f"{source} {list(shapes[source])}: {target} is made of tensors of {k} columns.")
    return layouts


def _placements(target: str, numbers: Tensor, owners: list[tuple[int, str, tuple[int, ...]]]) -> tuple[Placement, ...]:
    """Arithmetic progressions in a parameter's row numbers, one per checkpoint matrix."""
    position = torch.full((int(numbers.max()) + 1,), -1) if numbers.numel() else numbers
    position[numbers] = torch.arange(numbers.numel())
    placements = []
    for base, name, shape in owners:
        height = shape[-2]
        for i in range(math.prod(shape[:-2])):
            at = position[base + i * height : base + (i + 1) * height]
            if at.numel() == 0 or int(at.max()) < 0:
                continue  # this tensor goes to another parameter of the same conversion
            step = int(at[1] - at[0]) if height > 1 else 1
            if step < 1 or not torch.equal(at, int(at[0]) + step * torch.arange(height)):
                raise SchemeError(f"{target}: loading rearranges the rows of {name} in a way FP8 scales cannot follow.")
            placements.append(Placement(name, None if len(shape) == 2 else i, int(at[0]), step, height))
    if sum(p.rows for p in placements) != numbers.numel():
        raise SchemeError(
            f"{target}: loading splits or repeats rows of its checkpoint tensors, which FP8 cannot follow."
        )
    return tuple(placements)


def _matrix_scale(scale: Tensor, p: Placement, scheme: Scheme) -> Tensor:
    """The scale of one checkpoint matrix as `[row blocks, column blocks]`, from any shape a file may have."""
    if p.index is not None and scale.dim() > 0:
        scale = scale[p.index] if scale.numel() > 1 else scale
    if scheme.strategy in ("tensor", "channel"):
        return scale.reshape(-1, 1)
    return scale.reshape(scale.shape[0], -1)  # ModelOpt's are [row blocks, 1, column blocks, 1]
