"""The `ctfp8::` operators: schema, meta function and reference implementation side by side.

All of them describe a weight in the same way:

- `weight`: `[..., N, K]` float8_e4m3fn
- `weight_scale`: `[..., ceil(N / block[0]), ceil(K / block[1])]` float32
- `block`: rows and columns that share a scale. A scale per channel is `block = [1, K]`.

`dequantize` is the marker that a loaded FP8 parameter leaves in a traced graph. Rules rewrite its consumers to the other
operators; each has a reference implementation in plain ATen, so a rewritten graph runs on any device:

- `dequantized_…`: a matmul of an activation as it is (CPU);
- `quantize_…`, then `scaled_…`: a matmul of FP8 with FP8. Activations are `[M, K]`, `scale_a` is `[M, 1]` float32, or
  `[M, K / group]` for a scale per token and group of columns. A target lowers these to operators of its own.

`side_by_side` says that parameters lie one behind the other in memory, so that one matmul can read them all; where they do
not, it concatenates them along the first dimension (see `ctfp8_compile.side_by_side`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
#: The smallest largest value a scale is computed from, so that a row of zeros does not divide by zero.
AMAX_MIN = 1e-12

aten = torch.ops.aten
_convert = torch.ops.prims.convert_element_type.default

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

_lib.define("quantize_per_token(Tensor x) -> (Tensor, Tensor)")
_lib.define("quantize_per_group(Tensor x, int group) -> (Tensor, Tensor)")
_lib.define("quantize_per_tensor(Tensor x, Tensor? input_scale) -> (Tensor, Tensor)")
_lib.define(
    "scaled_mm(Tensor x, Tensor weight, Tensor scale_a, Tensor weight_scale, Tensor? bias, int[] block, "
    "ScalarType out_dtype) -> Tensor"
)
_lib.define(
    "scaled_grouped_mm(Tensor x, Tensor weight, Tensor scale_a, Tensor weight_scale, Tensor offs, int[] block, "
    "ScalarType out_dtype) -> Tensor"
)

_lib.define("side_by_side(Tensor[] parts) -> Tensor")

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


def _side_by_side(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts)


_lib.impl("side_by_side", _side_by_side, "CompositeExplicitAutograd")


@torch.library.register_fake("ctfp8::side_by_side")
def _(parts: list[Tensor]) -> Tensor:
    return parts[0].new_empty((sum(part.shape[0] for part in parts), *parts[0].shape[1:]))


Do = Callable[..., Any]
"""Applies an ATen operator: to tensors (`apply`), or by adding a node to a graph. The arithmetic below is written once."""


def apply(op: Any, *args: Any) -> Any:
    return op(*args)


def quantize_per_token_steps(do: Do, x: Any) -> tuple[Any, Any]:
    """`scale_a = max(|row|) / 448` in float32; `x / scale_a` rounded to nearest even: `([M, K] FP8, [M, 1])`."""
    wide = do(_convert, x, torch.float32)
    return _quantize_steps(do, wide, do(aten.amax.default, do(aten.abs.default, wide), [-1], True))


def quantize_per_group_steps(do: Do, x: Any, cols: int, group: int) -> tuple[Any, Any]:
    """The same for every `group` columns of a row: `([M, K] FP8, [M, K / group])`; `cols` is K."""
    wide = do(aten.reshape.default, do(_convert, x, torch.float32), [-1, cols // group, group])
    codes, scale = _quantize_steps(do, wide, do(aten.amax.default, do(aten.abs.default, wide), [-1], True))
    return do(aten.reshape.default, codes, [-1, cols]), do(aten.squeeze.dim, scale, -1)


def quantize_per_tensor_steps(do: Do, x: Any, input_scale: Any) -> tuple[Any, Any]:
    """A scale for all, dynamic where `input_scale` is None: `([M, K] FP8, [1, 1])`, or `[M, 1]` where that has rows."""
    wide = do(_convert, x, torch.float32)
    if input_scale is None:
        return _quantize_steps(do, wide, do(aten.amax.default, do(aten.abs.default, wide), [0, 1], True))
    return _round_steps(do, wide, input_scale), input_scale


def _quantize_steps(do: Do, wide: Any, amax: Any) -> tuple[Any, Any]:
    scale = do(aten.div.Tensor, do(aten.clamp_min.default, amax, AMAX_MIN), FP8_MAX)
    return _round_steps(do, wide, scale), scale


def _round_steps(do: Do, wide: Any, scale: Any) -> Any:
    clamped = do(aten.clamp.default, do(aten.div.Tensor, wide, scale), -FP8_MAX, FP8_MAX)
    return do(_convert, clamped, FP8)


def _quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    return quantize_per_token_steps(apply, x)


def _quantize_per_group(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    return quantize_per_group_steps(apply, x, x.shape[-1], group)


def _quantize_per_tensor(x: Tensor, input_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    codes, scale = quantize_per_tensor_steps(apply, x, input_scale)
    return codes, scale.clone() if input_scale is not None else scale  # an operator must not return its input


_lib.impl("quantize_per_token", _quantize_per_token, "CompositeExplicitAutograd")
_lib.impl("quantize_per_group", _quantize_per_group, "CompositeExplicitAutograd")
_lib.impl("quantize_per_tensor", _quantize_per_tensor, "CompositeExplicitAutograd")


@torch.library.register_fake("ctfp8::quantize_per_token")
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=FP8), x.new_empty((x.shape[0], 1), dtype=torch.float32)


@torch.library.register_fake("ctfp8::quantize_per_group")
def _(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=FP8), x.new_empty((x.shape[0], x.shape[1] // group), dtype=torch.float32)


@torch.library.register_fake("ctfp8::quantize_per_tensor")
def _(x: Tensor, input_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    shape = (1, 1) if input_scale is None else input_scale.shape
    return x.new_empty(x.shape, dtype=FP8), x.new_empty(shape, dtype=torch.float32)


def _scaled_mm(
    x: Tensor, weight: Tensor, scale_a: Tensor, weight_scale: Tensor, bias: Tensor | None, block: list[int],
    out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    group = x.shape[-1] // scale_a.shape[-1] if x.shape[-1] else 1
    wide = x.to(torch.float32) * expand_scale(scale_a, [1, group], x.shape[0], x.shape[1])
    out = wide @ dequantize_reference(weight, weight_scale, block, torch.float32).t()
    return (out if bias is None else out + bias).to(out_dtype)


_lib.impl("scaled_mm", _scaled_mm, "CompositeExplicitAutograd")


@torch.library.register_fake("ctfp8::scaled_mm")
def _(
    x: Tensor, weight: Tensor, scale_a: Tensor, weight_scale: Tensor, bias: Tensor | None, block: list[int],
    out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=out_dtype)


def _scaled_grouped_mm(
    x: Tensor, weight: Tensor, scale_a: Tensor, weight_scale: Tensor, offs: Tensor, block: list[int],
    out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    out = x.new_zeros((x.shape[0], weight.shape[-2]), dtype=out_dtype)
    scale_a = scale_a.expand(x.shape[0], -1)
    start = 0
    for expert, end in enumerate(offs.tolist()):
        rows = slice(start, end)
        out[rows] = _scaled_mm(x[rows], weight[expert], scale_a[rows], weight_scale[expert], None, block, out_dtype)
        start = end
    return out


_lib.impl("scaled_grouped_mm", _scaled_grouped_mm, "CompositeExplicitAutograd")


@torch.library.register_fake("ctfp8::scaled_grouped_mm")
def _(
    x: Tensor, weight: Tensor, scale_a: Tensor, weight_scale: Tensor, offs: Tensor, block: list[int],
    out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return x.new_empty((x.shape[0], weight.shape[-2]), dtype=out_dtype)


#: By kind of matmul (`lowering.kernel.KINDS`), the operator that takes an unquantized activation and an FP8 weight.
DEQUANTIZED = {
    "linear": torch.ops.ctfp8.dequantized_linear.default,
    "grouped_mm": torch.ops.ctfp8.dequantized_grouped_mm.default,
    "gathered_mm": torch.ops.ctfp8.dequantized_gathered_mm.default,
}
