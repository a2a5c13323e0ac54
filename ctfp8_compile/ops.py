"""The `ctfp8::` operators: schema, meta function and reference implementation side by side.

All of them describe a weight in the same way:

- `weight`: `[..., N, K]` float8_e4m3fn
- `weight_scale`: `[..., ceil(N / block[0]), ceil(K / block[1])]` float32
- `block`: rows and columns that share a scale. A scale per channel is `block = [1, K]`.

`dequantize` is the marker that a loaded FP8 parameter leaves in a traced graph. The other operators are what rules
rewrite its consumers to; each has a reference implementation in plain ATen, so a rewritten graph runs on any device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn

_lib = torch.library.Library("ctfp8", "DEF")
_lib.define(
    "dequantize(Tensor weight, Tensor weight_scale, Tensor? input_scale, int[] block, str activation, "
    "ScalarType dtype) -> Tensor"
)
_lib.define(
    "dequantized_linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, int[] block) -> Tensor",
)
_lib.define(
    "dequantized_grouped_mm(Tensor x, Tensor weight, Tensor weight_scale, Tensor offs, int[] block) -> Tensor",
)
_lib.define(
    "dequantized_gathered_mm(Tensor x, Tensor weight, Tensor weight_scale, Tensor ids, int[] block) -> Tensor",
)

#: Elements dequantized at a time by the eager reference, so that its float32 intermediate stays small.
_CHUNK = 1 << 22


def expand_scale(weight_scale: Tensor, block: list[int], rows: int, cols: int) -> Tensor:
    """One scale per element group, broadcastable to `[..., rows, cols]`.

    Args:
        weight_scale: `[..., ceil(rows / block[0]), ceil(cols / block[1])]`.
    """
    for dim, size, step in ((-2, rows, block[0]), (-1, cols, block[1])):
        if weight_scale.shape[dim] != 1 and step != 1:
            weight_scale = weight_scale.repeat_interleave(step, dim).narrow(dim, 0, size)
    return weight_scale


def dequantize_reference(weight: Tensor, weight_scale: Tensor, block: list[int], dtype: torch.dtype) -> Tensor:
    """`(float32(weight) * weight_scale)` rounded once to `dtype`: compressed-tensors' own arithmetic, bit for bit."""
    scale = expand_scale(weight_scale, block, weight.shape[-2], weight.shape[-1])
    return (weight.to(torch.float32) * scale).to(dtype)


def _dequantize(
    weight: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor | None,
    block: list[int],
    activation: str,
    dtype: torch.dtype,
) -> Tensor:
    if weight.numel() <= _CHUNK:
        return dequantize_reference(weight, weight_scale, block, dtype)
    if weight.dim() > 2:
        out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        for i in range(weight.shape[0]):
            out[i] = _dequantize(weight[i], weight_scale[i], None, block, activation, dtype)
        return out
    step = max(1, _CHUNK // weight.shape[-1] // block[0]) * block[0]
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    for i in range(0, weight.shape[0], step):
        rows = weight[i : i + step]
        scale = weight_scale[i // block[0] : i // block[0] + math.ceil(rows.shape[0] / block[0])]
        out[i : i + step] = dequantize_reference(rows, scale, block, dtype)
    return out


_lib.impl("dequantize", _dequantize, "CompositeExplicitAutograd")


@torch.library.register_fake("ctfp8::dequantize")
def _(
    weight: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor | None,
    block: list[int],
    activation: str,
    dtype: torch.dtype,
) -> Tensor:
    return torch.empty_like(weight, dtype=dtype, memory_format=torch.contiguous_format)


def _dequantized_linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, block: list[int]
) -> Tensor:
    w = dequantize_reference(weight, weight_scale, block, x.dtype)
    return torch.nn.functional.linear(x, w, None if bias is None else bias.to(x.dtype))


_lib.impl("dequantized_linear", _dequantized_linear, "CompositeExplicitAutograd")


@torch.library.register_fake("ctfp8::dequantized_linear")
def _(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, block: list[int]) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _dequantized_grouped_mm(x: Tensor, weight: Tensor, weight_scale: Tensor, offs: Tensor, block: list[int]) -> Tensor:
    out = x.new_zeros((x.shape[0], weight.shape[-2]))
    start = 0
    for expert, end in enumerate(offs.tolist()):
        if end > start:
            w = dequantize_reference(weight[expert], weight_scale[expert], block, x.dtype)
            out[start:end] = x[start:end] @ w.t()
        start = end
    return out


_lib.impl("dequantized_grouped_mm", _dequantized_grouped_mm, "CompositeExplicitAutograd")


@torch.library.register_fake("ctfp8::dequantized_grouped_mm")
def _(x: Tensor, weight: Tensor, weight_scale: Tensor, offs: Tensor, block: list[int]) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[-2]))


def _dequantized_gathered_mm(x: Tensor, weight: Tensor, weight_scale: Tensor, ids: Tensor, block: list[int]) -> Tensor:
    out = x.new_empty((x.shape[0], weight.shape[-2]))
    for row, expert in enumerate(ids.tolist()):
        w = dequantize_reference(weight[expert], weight_scale[expert], block, x.dtype)
        out[row] = w @ x[row]
    return out


_lib.impl("dequantized_gathered_mm", _dequantized_gathered_mm, "CompositeExplicitAutograd")


@torch.library.register_fake("ctfp8::dequantized_gathered_mm")
def _(x: Tensor, weight: Tensor, weight_scale: Tensor, ids: Tensor, block: list[int]) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[-2]))


#: By kind of matmul (`lowering.kernel.KINDS`), the operator that takes an unquantized activation and an FP8 weight.
DEQUANTIZED = {
    "linear": torch.ops.ctfp8.dequantized_linear.default,
    "grouped_mm": torch.ops.ctfp8.dequantized_grouped_mm.default,
    "gathered_mm": torch.ops.ctfp8.dequantized_gathered_mm.default,
}
