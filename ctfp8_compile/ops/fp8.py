"""The arithmetic of FP8 scales and FP8 values, written once for tensors and for graphs."""

from __future__ import annotations

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


Do = Callable[..., Any]
"""Applies an ATen operator: to tensors (`apply`), or by adding a node to a graph. The arithmetic below is written once."""


def apply(op: Any, *args: Any, **kwargs: Any) -> Any:
    return op(*args, **kwargs)


def expand_scale(weight_scale: Tensor, block: list[int], rows: int, cols: int) -> Tensor:
    """One scale per element group, broadcastable to `[..., rows, cols]`.

    Args:
        weight_scale: `[..., ceil(rows / block[0]), ceil(cols / block[1])]`; a byte e is the power of two 2^(e - 127).
    """
    if weight_scale.dtype == torch.uint8:
        weight_scale = exponent_steps(apply, weight_scale)
    for dim, size, step in ((-2, rows, block[0]), (-1, cols, block[1])):
        if weight_scale.shape[dim] != 1 and step != 1:
            weight_scale = weight_scale.repeat_interleave(step, dim).narrow(dim, 0, size)
    return weight_scale


def dequantize_reference(weight: Tensor, weight_scale: Tensor, block: list[int], dtype: torch.dtype) -> Tensor:
    """`(float32(weight) * weight_scale)` rounded once to `dtype`: compressed-tensors' own arithmetic, bit for bit."""
    scale = expand_scale(weight_scale, block, weight.shape[-2], weight.shape[-1])
    return (weight.to(torch.float32) * scale).to(dtype)


def dequantize_plainly(weight: Tensor, weight_scale: Tensor, block: list[int], dtype: torch.dtype) -> Tensor:
    """The same, of operators that torch.onnx knows: 2^(e - 127) is computed, not read off the bits of a float32."""
    scale = torch.pow(2.0, weight_scale.to(torch.float32) - 127) if weight_scale.dtype == torch.uint8 else weight_scale
    shape = [int(size) for size in scale.shape]
    for dim in (-2, -1):
        size, step, count = int(weight.shape[dim]), block[dim], shape[dim]
        if count != 1 and step != 1:
            at = len(shape) + dim
            wide = scale.unsqueeze(at + 1).expand(*shape[: at + 1], step, *shape[at + 1 :])
            shape[at] = count * step
            scale = wide.reshape(shape)
            if shape[at] != size:
                scale, shape[at] = scale.narrow(at, 0, size), size
    return (weight.to(torch.float32) * scale).to(dtype)


def exponent_steps(do: Do, exponents: Any) -> Any:
    """`2^(e - 127)` of bytes e, as float32: a byte is the exponent of a float32; that of 0 is not normal. 255 is no scale."""
    bits = do(aten.mul.Tensor, do(_convert, exponents, torch.int32), 1 << 23)
    return do(aten.view.dtype, do(aten.clamp_min.default, bits, 1 << 22), torch.float32)


def cached_steps(do: Do, stored: Any, columns: int, scale: Any, dtype: torch.dtype) -> Any:
    """Keys or values as numbers, from FP8 in uint8, with scales `[1]` or `[heads]`, or with each token's as its last byte."""
    fp8 = stored
    if scale is None:
        fp8 = do(aten.slice.Tensor, stored, 3, 0, columns - 1)
        scale = exponent_steps(do, do(aten.slice.Tensor, stored, 3, columns - 1, columns))
    else:
        scale = do(aten.reshape.default, scale, [1, -1, 1, 1])
    wide = do(_convert, do(aten.view.dtype, fp8, FP8), torch.float32)
    return do(_convert, do(aten.mul.Tensor, wide, scale), dtype)


def quantize_cached_steps(do: Do, x: Any, scale: Any) -> Any:
    """The reverse; a scale of a token's own is the smallest power of two with which none of its numbers is beyond FP8."""
    wide = do(_convert, x, torch.float32)
    if scale is not None:
        fp8 = _round_steps(do, wide, do(aten.reshape.default, scale, [1, -1, 1, 1]))
        return do(aten.view.dtype, fp8, torch.uint8)
    amax = do(aten.amax.default, do(aten.abs.default, wide), [-1], True)
    ratio = do(aten.div.Tensor, do(aten.clamp_min.default, amax, AMAX_MIN), FP8_MAX)
    bits = do(aten.add.Tensor, do(aten.view.dtype, ratio, torch.int32), (1 << 23) - 1)
    exponents = do(aten.bitwise_right_shift.Tensor_Scalar, bits, 23)
    exponents = do(_convert, do(aten.clamp_max.default, exponents, 254), torch.uint8)
    fp8 = _round_steps(do, wide, exponent_steps(do, exponents))
    return do(aten.cat.default, [do(aten.view.dtype, fp8, torch.uint8), exponents], -1)


def quantize_per_token_steps(do: Do, x: Any, bound: float | None = None) -> tuple[Any, Any]:
    """`scale_a = max(|row|) / 448` in float32; `x / scale_a` rounded to nearest even: `([M, K] FP8, [M, 1])`.

    Args:
        bound: what the row's maximum is no larger than; elements beyond it become it.
    """
    wide = do(_convert, x, torch.float32)
    amax = do(aten.amax.default, do(aten.abs.default, wide), [-1], True)
    return _quantize_steps(do, wide, amax if bound is None else do(aten.clamp_max.default, amax, bound))


def quantize_per_group_steps(do: Do, x: Any, cols: int, group: int) -> tuple[Any, Any]:
    """The same for every `group` columns of a row: `([M, K] FP8, [M, K / group])`; `cols` is K."""
    wide = do(aten.reshape.default, do(_convert, x, torch.float32), [-1, cols // group, group])
    fp8, scale = _quantize_steps(do, wide, do(aten.amax.default, do(aten.abs.default, wide), [-1], True))
    return do(aten.reshape.default, fp8, [-1, cols]), do(aten.squeeze.dim, scale, -1)


def quantize_mx_steps(do: Do, x: Any, cols: int) -> tuple[Any, Any]:
    """`([M, K] FP8, [M, K / 32] uint8)`: a byte e for the scale 2^(e - 127) of 32 columns, as compressed-tensors chooses it:
    the power of two below their maximum, or above it from 1.75 of it on, divided by 2^8."""
    wide = do(aten.reshape.default, do(_convert, x, torch.float32), [-1, cols // 32, 32])
    amax = do(aten.amax.default, do(aten.abs.default, wide), [-1], True)
    bits = do(aten.add.Tensor, do(aten.view.dtype, amax, torch.int32), 1 << 21)
    exponent = do(aten.clamp_min.default, do(aten.sub.Tensor, do(aten.__rshift__.Scalar, bits, 23), 8), 0)
    exponents = do(_convert, exponent, torch.uint8)
    fp8 = _round_steps(do, wide, exponent_steps(do, exponents))
    return do(aten.reshape.default, fp8, [-1, cols]), do(aten.squeeze.dim, exponents, -1)


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
    # clamp_min and clamp_max: Inductor has a lowering for these after its decompositions, and none for clamp
    above = do(aten.clamp_min.default, do(aten.div.Tensor, wide, scale), -FP8_MAX)
    return do(_convert, do(aten.clamp_max.default, above, FP8_MAX), FP8)
