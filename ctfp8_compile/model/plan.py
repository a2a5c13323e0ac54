"""How each parameter of a model is quantized: decided and checked from the files' headers, before a weight is read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checkpoint import files as ckpt
from ..checkpoint.grid import Grid
from ..checkpoint.layout import Layout, Turned
from ..checkpoint.notes import Notes
from ..checkpoint.resolve import resolve
from ..checkpoint.scheme import Scheme, Schemes, strategy_of
from ..checkpoint.view import WHOLE, View


@dataclass(frozen=True)
class StoredScale:
    """How the file stored a scale, so that saving gives back the same bits under the same name.

    Attributes:
        shape: of the view.
        grid: of a weight's scale, which blocks of the weight it is of; None for one of activations.
        view: what of the file's tensor it is.
        bits: the tensor as it was, where the view's values do not give it back: the reciprocal of a reciprocal may be the
            number beside it, and between tiles there may be anything.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    grid: Grid | None = None
    view: View = WHOLE
    bits: Tensor | None = None

    def write(self, scale: Tensor, state: dict[str, Tensor]) -> None:
        """Puts a scale, of the view's shape, where the file had it."""
        if self.view.inverse:
            kept = self.bits is not None and torch.equal(self.view.of(self.bits), scale.float().cpu())
            scale = self.bits if kept else scale.float().reciprocal()  # type: ignore[assignment]
        stored = ckpt.encode_scale(scale, self.dtype)
        if not self.view.whole:
            state[self.name] = stored.clone()
            return
        tiled = self.bits if self.view.tiles is not None else None
        if tiled is not None and torch.equal(self.view.of(tiled).view(torch.uint8), stored.cpu().view(torch.uint8)):
            state[self.name] = tiled.clone()
            return
        if self.name not in state:
            state[self.name] = torch.empty(self.view.whole, dtype=self.dtype, device=stored.device)
        self.view.put(state[self.name], stored)


@dataclass(frozen=True)
class QuantizedParameter:
    """All that is known of one FP8 parameter of a model.

    Attributes:
        scheme: the checkpoint's scheme; of tensors that differ in theirs, one that all of them can be written in.
        layout: which checkpoint tensors it is made of.
        dtype: what it dequantizes to.
        names: by checkpoint weight name, as it is ours, its name in the file.
        scales, input_scales: by the same, how the file stored them.
        shapes: by the same, as `[…, N, K]`.
    """

    scheme: Scheme
    layout: Layout
    dtype: torch.dtype
    names: Mapping[str, str]
    scales: Mapping[str, StoredScale]
    input_scales: Mapping[str, StoredScale]
    shapes: Mapping[str, tuple[int, ...]]

    def spread(self, source: str, scale: Tensor) -> Tensor:
        """The scale of one checkpoint tensor, as the file stores it, for blocks of `scheme`."""
        grid = self.scales[source].grid
        assert grid is not None
        return grid.spread(scale, self.shapes[source], self.scheme.block)

    def stored_scale(self, source: str, weight_scale: Tensor) -> Tensor:
        """Inverse of `spread`, from the scales of the parameter: that of one checkpoint tensor, for the blocks its file has."""
        stored, shape = self.scales[source], self.shapes[source]
        assert stored.grid is not None
        blocks = (*shape[:-2], *Grid(self.scheme.block).shape(*shape[-2:]))
        own = self.layout.split_scale(weight_scale, source, self.scheme, blocks)
        return stored.grid.gather(own, shape, self.scheme.block, stored.shape)


def plan(
    tensors: ckpt.Checkpoint, schemes: Schemes, layout: Layout, dtype: torch.dtype, notes: Notes
) -> QuantizedParameter:
    """Decides how one parameter is quantized and checks all that it needs, from headers alone.

    Args:
        notes: where config and file differ is noted here.

    Raises:
        CheckpointError, SchemeError: naming the tensor.
    """
    tensors = _as_stored(tensors, layout)
    found = {source: resolve(tensors, schemes, source, notes) for source in layout.sources}
    scheme = _of_all({source: reading.scheme for source, reading in found.items()}, tensors, notes)

    def stored(name: str, grid: Grid | None = None) -> StoredScale:
        info = tensors[name]
        bits = None
        if info.view.inverse or info.view.tiles is not None:
            bits = tensors.read_stored(info).clone()
            bits = None if info.view.tiles is not None and info.view.tiles.is_all_of(bits) else bits
        dtype = (ckpt.SCALE_DTYPES | ckpt.EXPONENT_DTYPES)[info.dtype]
        return StoredScale(info.name, dtype, info.shape, grid, info.view, bits)

    static = scheme.activation == "tensor"
    return QuantizedParameter(
        scheme,
        layout,
        dtype,
        {source: tensors[source].name for source in found},
        {source: stored(ckpt.scale_name(source), reading.grid) for source, reading in found.items()},
        {source: stored(ckpt.input_scale_name(source)) for source in found} if static else {},
        {source: tensors[source].shape for source in found},
    )


def _as_stored(tensors: ckpt.Checkpoint, layout: Layout) -> ckpt.Checkpoint:
    """A checkpoint in which weights are `[E, N, K]` that its file has as `[E, K, N]`, and their scales likewise."""
    if not isinstance(layout, Turned):
        return tensors
    changed = {}
    for source in layout.sources:
        weight, scale = tensors[source], tensors.get(ckpt.scale_name(source))
        changed[source] = weight.turned()
        if scale is not None and len(scale.shape) == 3 and scale.shape[-2:] != (weight.shape[-1], 1):
            changed[ckpt.scale_name(source)] = scale.turned()
    return tensors.changed((), changed)


def _of_all(found: Mapping[str, Scheme], tensors: ckpt.Checkpoint, notes: Notes) -> Scheme:
    """One scheme for tensors that become one parameter: blocks that divide those of each."""
    first, *others = dict.fromkeys(found.values())
    if not others:
        return first
    kinds = [first, *others]
    high, wide = (math.gcd(*(scheme.block[dim] for scheme in kinds)) for dim in (0, 1))
    activation = _activation_of_all({scheme.activation for scheme in kinds})
    scheme = Scheme(strategy_of((high, wide)), (high, wide), activation, all(scheme.exponents for scheme in kinds))
    if any(kind.block != first.block for kind in kinds):
        odd = next(source for source, kind in found.items() if kind != first)
        notes.add(f"merged with others of another scheme ({first}); all are read as {scheme}", tensors[odd].name)
    return scheme


def _activation_of_all(found: set[str]) -> str:
    """What inputs are quantized by, of tensors merged into one: weights alone are FP8 where they differ."""
    if found == {"tensor", "token"}:  # experts that calibration never saw have no static scale
        return "token"
    return found.pop() if len(found) == 1 else "none"


def read_scales(tensors: ckpt.Checkpoint, info: QuantizedParameter) -> tuple[Tensor, Tensor | None]:
    """Reads, checks and lays out the scales of one parameter: `(weight_scale, input_scale)`; the latter is float32.

    Raises:
        CheckpointError: a scale is NaN, infinite, negative, zero where the weight is not, or no power of two where the config
            says that all are.
    """
    tensors = _as_stored(tensors, info.layout)
    weights = {}
    for source in info.scales:
        weights[source] = read_weight_scale(tensors, source, info.scales[source].grid)
        if info.scheme.scale_dtype == torch.uint8:
            ckpt.check_powers(tensors[ckpt.scale_name(source)], weights[source])
    weight_scale = info.layout.scale({s: info.spread(s, scale) for s, scale in weights.items()}, info.scheme)
    if not info.input_scales:
        return weight_scale, None
    values = tensors.read(ckpt.input_scale_name(s) for s in info.input_scales)
    for name, value in values.items():
        ckpt.check_scale_values(tensors[name], value)
    # one value per matrix, grouped by the expert it went to: [S] for a linear, [E, S] for experts
    groups: list[list[Tensor]] = [[] for _ in range(math.prod(info.layout.shape[:-2]))]
    for p in info.layout.placements:
        value = values[ckpt.input_scale_name(p.source)].reshape(-1).float()
        groups[p.start // info.layout.shape[-2]].append(value[p.index or 0] if len(value) > 1 else value[0])
    return weight_scale, torch.stack([torch.stack(g) for g in groups]).view(*info.layout.shape[:-2], -1)


def read_weight_scale(tensors: ckpt.Checkpoint, source: str, grid: Grid | None) -> Tensor:
    """The scale of one FP8 weight as its file stores it, checked.

    Raises:
        CheckpointError: see `read_scales`.
    """
    info, weight = tensors[ckpt.scale_name(source)], tensors[source]
    scale = tensors.value(info)
    zero = ckpt.decode_scale(scale) == 0
    if grid is not None and zero.any():  # right where all that it scales is zero, as of an expert that was never used
        under = grid.spread(zero, weight.shape, (1, 1))
        if (tensors.value(weight).view(torch.uint8)[under] & 0x7F).any():
            zero = torch.zeros_like(zero)
    ckpt.check_scale_values(info, scale, zero, tensors.format.directed)
    return scale
