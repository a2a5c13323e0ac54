"""Parameters made of tensors that are stored in different ways: some FP8, some plain, some in another format.

A parameter has one dtype. Where all parts are FP8 it is FP8 (`plan` finds blocks that divide those of each); otherwise it is
what the model declares, bfloat16 as a rule, and its FP8 parts are dequantized once, while loading.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checkpoint import files as ckpt
from ..checkpoint.grid import Grid
from ..checkpoint.layout import Layout
from ..checkpoint.notes import Notes
from ..checkpoint.packed import PackedWeight
from ..checkpoint.resolve import resolve
from ..checkpoint.scheme import Schemes
from ..counted import agreeing, such_as
from ..errors import CheckpointError
from .plan import read_weight_scale


@dataclass(frozen=True)
class MixedParameter:
    """All that is known of one.

    Attributes:
        layout: which checkpoint tensors it is made of.
        dtype: what the model declares.
        stored: by checkpoint name, the tensors; of one in another format, the tensor that holds its packed values.
        grids: by checkpoint name of FP8 weights.
        packed: by checkpoint name of weights in other formats.
        scales: by checkpoint name of FP8 weights, as stored.
        others: by checkpoint name of weights in other formats, all their tensors but the packed values.
    """

    layout: Layout
    dtype: torch.dtype
    stored: Mapping[str, ckpt.TensorInfo]
    grids: Mapping[str, Grid]
    packed: Mapping[str, PackedWeight]
    scales: Mapping[str, Tensor]
    others: Mapping[str, Mapping[str, Tensor]]

    def value(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The parameter as the model declares it, from what the file stores, on the device of that."""
        shape = self.layout.shape
        device = next(iter(parts.values())).device
        out = torch.empty(shape, dtype=self.dtype, device=device)
        flat = out.view(-1, shape[-1])
        for name in self.layout.sources:
            part = self._part(name, parts[name])
            for p in self.layout.placements:
                if p.source == name:
                    flat[p.span] = part if p.index is None else part[p.index]
        return out.transpose(-1, -2).contiguous() if self.layout.transposed else out

    def _part(self, name: str, stored: Tensor) -> Tensor:
        if name in self.packed:
            others = {leaf: tensor.to(stored.device) for leaf, tensor in self.others[name].items()}
            return self.packed[name].dequantize({**others, self.packed[name].leaf: stored}, self.dtype)
        if name not in self.grids:
            return stored.to(self.dtype)
        if ckpt.has_nan(stored):
            raise CheckpointError(f"{name}: holds NaN values (0x7f or 0xff). The file is damaged; quantize it again.")
        grid, shape = self.grids[name], tuple(stored.shape)
        block = grid.common(*shape[-2:])
        scale = ckpt.decode_scale(grid.spread(self.scales[name], shape, block)).to(stored.device)
        rows, cols = (torch.arange(n) // (b or n) for n, b in zip(shape[-2:], block, strict=True))
        wide = scale[..., rows.to(stored.device), :][..., cols.to(stored.device)]
        return (stored.float() * wide).to(self.dtype)

    def again(self, tensors: ckpt.Checkpoint) -> tuple[Tensor, dict[str, Tensor]]:
        """The parameter's value, and by their names in the file all tensors that it is made of, read anew."""
        parts = {name: tensors.read_stored(info) for name, info in self.stored.items()}
        stored = {self.stored[name].name: part for name, part in parts.items()}
        stored |= {(info := tensors[ckpt.scale_name(n)]).name: tensors.read_stored(info) for n in self.grids}
        for weight in self.packed.values():
            stored |= {part.name: tensors.read_stored(part) for part in weight.parts.values()}
        return self.value(parts), stored


def is_mixed(layout: Layout, tensors: ckpt.Checkpoint, packed: Mapping[str, PackedWeight]) -> bool:
    """Whether the parts of a parameter are stored in different ways, which one tensor of one dtype cannot hold."""
    kinds: set[object] = set()
    for name in layout.sources:
        if name in packed:
            values = packed[name].packed
            kinds.add((values.dtype, values.shape[-1]))
        else:
            kinds.add(tensors[name].dtype == ckpt.FP8_DTYPE)
    return len(kinds) > 1


def mix(
    tensors: ckpt.Checkpoint,
    schemes: Schemes,
    layout: Layout,
    dtype: torch.dtype,
    packed: Mapping[str, PackedWeight],
    notes: Notes,
) -> MixedParameter:
    """Decides how the parts of one such parameter are read, checks all that they need, and reads what is small.

    Raises:
        CheckpointError, SchemeError: naming the tensor.
    """
    grids, own = {}, {name: packed[name] for name in layout.sources if name in packed}
    for name in layout.sources:
        if tensors[name].dtype == ckpt.FP8_DTYPE:
            grids[name] = resolve(tensors, schemes, name, notes).grid
    return MixedParameter(
        layout,
        dtype,
        {name: own[name].packed if name in own else tensors[name] for name in layout.sources},
        grids,
        own,
        {name: read_weight_scale(tensors, name, grid) for name, grid in grids.items()},
        {
            name: {leaf: tensors.value(part) for leaf, part in weight.parts.items() if part != weight.packed}
            for name, weight in own.items()
        },
    )


def sentence(mixed: Mapping[str, MixedParameter]) -> str:
    """What it costs: `2 parameters, such as T, are made of …`."""
    target, info = next(iter(mixed.items()))
    stored = sum(ckpt.nbytes(part) for each in mixed.values() for part in each.stored.values())
    values = sum(math.prod(each.layout.shape) * each.dtype.itemsize for each in mixed.values())
    fp8 = next(iter(info.grids), None)
    examples = [info.stored[name] for name in (fp8, _unlike(info.layout.sources, fp8, info)) if name is not None]
    return (
        f"{such_as(len(mixed), 'parameter', target)} {agreeing(len(mixed), 'is', 'are')} made of tensors that are stored in "
        "different ways, such as "
        f"{' and '.join(map(str, examples))}: {agreeing(len(mixed), 'it becomes', 'they become')} "
        f"{str(info.dtype).removeprefix('torch.')} and {agreeing(len(mixed), 'takes', 'take')} {values:,} bytes of "
        f"memory where the file has {stored:,}"
    )


def _unlike(names: Iterable[str], first: str | None, info: MixedParameter) -> str | None:
    dtype = None if first is None else info.stored[first].dtype
    return next((name for name in names if info.stored[name].dtype != dtype), None)
