"""How each parameter of a model is quantized: decided and checked from the files' headers, before a weight is read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..checkpoint import files as ckpt
from ..checkpoint.layout import Layout, Turned
from ..checkpoint.scheme import Scheme, Schemes
from ..checkpoint.view import WHOLE, View
from ..errors import SchemeError


@dataclass(frozen=True)
class StoredScale:
    """How the file stored a scale, so that saving gives back the same bits under the same name.

    Attributes:
        shape: of the view.
        view: what of the file's tensor it is.
        bits: of reciprocals, the tensor as it was: the reciprocal of a reciprocal may be the number beside it.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
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
        if self.name not in state:
            state[self.name] = torch.empty(self.view.whole, dtype=self.dtype, device=stored.device)
        self.view.put(state[self.name], stored)


@dataclass(frozen=True)
class QuantizedParameter:
    """All that is known of one FP8 parameter of a model.

    Attributes:
        scheme: the checkpoint's scheme.
        layout: which checkpoint tensors it is made of.
        dtype: what it dequantizes to.
        names: by checkpoint weight name, as it is ours, its name in the file.
        scales, input_scales: by the same, how the file stored them.
    """

    scheme: Scheme
    layout: Layout
    dtype: torch.dtype
    names: Mapping[str, str]
    scales: Mapping[str, StoredScale]
    input_scales: Mapping[str, StoredScale]


def plan(tensors: ckpt.Checkpoint, schemes: Schemes, layout: Layout, dtype: torch.dtype) -> QuantizedParameter:
    """Decides how one parameter is quantized and checks all that it needs, from headers alone.

    Raises:
        CheckpointError, SchemeError: naming the tensor.
    """
    found: dict[str, Scheme] = {}
    for source in layout.sources:
        scheme = schemes.scheme(source.removesuffix(".weight"))
        if scheme is None:
            raise SchemeError(
                f"{tensors[source]}: FP8 in the file, but quantization_config has no group that covers it "
                "(or ignores it). Correct its targets or ignore list."
            )
        ckpt.check_scale(tensors, _as_stored(tensors[source], layout), scheme)
        found[source] = scheme
    first = layout.sources[0]
    for source, scheme in found.items():
        if scheme != found[first]:
            raise SchemeError(
                f"{source} ({scheme}) and {first} ({found[first]}) are merged, but differ in their scheme."
            )

    def stored(name: str) -> StoredScale:
        info = tensors[name]
        bits = tensors.read_stored(info).clone() if info.view.inverse else None
        return StoredScale(
            info.name, (ckpt.SCALE_DTYPES | ckpt.EXPONENT_DTYPES)[info.dtype], info.shape, info.view, bits
        )

    static = found[first].activation == "tensor"
    return QuantizedParameter(
        found[first],
        layout,
        dtype,
        {s: tensors[s].name for s in layout.sources},
        {s: stored(ckpt.scale_name(s)) for s in layout.sources},
        {s: stored(ckpt.input_scale_name(s)) for s in layout.sources} if static else {},
    )


def _as_stored(info: ckpt.TensorInfo, layout: Layout) -> ckpt.TensorInfo:
    """A weight of a file as `[…, N, K]`."""
    return (
        replace(info, shape=(*info.shape[:-2], info.shape[-1], info.shape[-2])) if isinstance(layout, Turned) else info
    )


def read_scales(tensors: ckpt.Checkpoint, info: QuantizedParameter) -> tuple[Tensor, Tensor | None]:
    """Reads, checks and lays out the scales of one parameter: `(weight_scale, input_scale)`; the latter is float32.

    Raises:
        CheckpointError: a scale is NaN, infinite, zero or negative, or no power of two where the config says that all are.
    """
    names = [ckpt.scale_name(s) for s in info.scales] + [ckpt.input_scale_name(s) for s in info.input_scales]
    values, weights = tensors.read(names), names[: len(info.scales)]
    for name, value in values.items():
        ckpt.check_scale_values(tensors[name], value, tensors.format.directed)
        if name in weights and info.scheme.scale_dtype == torch.uint8:
            ckpt.check_powers(tensors[name], value)
    weight_scale = info.layout.scale({s: values[ckpt.scale_name(s)] for s in info.scales}, info.scheme)
    if not info.input_scales:
        return weight_scale, None
    # one value per matrix, grouped by the expert it went to: [S] for a linear, [E, S] for experts
    groups: list[list[Tensor]] = [[] for _ in range(math.prod(info.layout.shape[:-2]))]
    for p in info.layout.placements:
        value = values[ckpt.input_scale_name(p.source)].reshape(-1).float()
        groups[p.start // info.layout.shape[-2]].append(value[p.index or 0] if len(value) > 1 else value[0])
    return weight_scale, torch.stack([torch.stack(g) for g in groups]).view(*info.layout.shape[:-2], -1)
