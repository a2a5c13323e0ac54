"""The `ctfp8::` operators: schema, meta function and reference implementation of each beside each other.

All of them describe a weight in the same way:

- `weight`: `[..., N, K]` float8_e4m3fn
- `weight_scale`: `[..., ceil(N / block[0]), ceil(K / block[1])]` float32; or uint8, a byte e for 2^(e - 127), with
  `block = [1, 32]` (MXFP8)
- `block`: rows and columns that share a scale. A scale per channel is `block = [1, K]`.

`dequantize` is the marker that a loaded FP8 parameter leaves in a traced graph. Rules rewrite its consumers to the other
operators; each has a reference implementation in plain ATen, so a rewritten graph runs on any device:

- `dequantized_…`: a matmul of an activation as it is (CPU);
- `quantize_…`, then `scaled_…`: a matmul of FP8 with FP8. Activations are `[M, K]`, `scale_a` is `[M, 1]` float32, or
  `[M, K / group]` for a scale per token and group of columns (bytes for MXFP8's groups of 32). A target lowers these to
  operators of its own.

`cached` is the marker of keys or values `[batch, heads, length, columns]` that a cache keeps as FP8 in uint8, with float32
scales `[1]` or `[heads]`, or without, and then a token's last byte e stands for its scale 2^(e - 127). `attention` is that of
queries `[batch, heads, tokens, columns]` to a cache, stored so or as numbers; its mask is bool or a summand.

`linear` is torch's, of a weight that is not quantized; on CPUs with AVX512-BF16 it streams a bfloat16 weight (GEMV) where there
are no more than four rows of activations.

`pack` says that parameters are packed one behind the other, so that one matmul can read them all; where they do
not, it concatenates them along the first dimension (see `ctfp8_compile.passes.horizontal_fusion`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from .fp8 import (
    FP8,
    apply,
    cached_steps,
    dequantize_reference,
    expand_scale,
    quantize_mx_steps,
    quantize_per_group_steps,
    quantize_per_tensor_steps,
    quantize_per_token_steps,
)

F = TypeVar("F", bound=Callable[..., Any])

_lib = torch.library.Library("ctfp8", "DEF")


def operator(schema: str, *, meta: Callable[..., Any]) -> Callable[[F], F]:
    """Defines `ctfp8::` + schema; the function below is its reference implementation, for every device.

    Args:
        meta: takes the same arguments and returns empty tensors of the result's shape and dtype.
    """
    name = schema.partition("(")[0]

    def define(reference: F) -> F:
        _lib.define(schema)
        _lib.impl(name, reference, "CompositeExplicitAutograd")
        torch.library.register_fake(f"ctfp8::{name}", meta, lib=_lib)
        return reference

    return define


#: Elements dequantized at a time by the eager reference, so that its float32 intermediate stays small.
_CHUNK = 1 << 22


@operator(
    "dequantize(Tensor weight, Tensor weight_scale, Tensor? input_scale, int[] block, str activation, ScalarType dtype)"
    " -> Tensor",
    meta=lambda weight, weight_scale, input_scale, block, activation, dtype: torch.empty_like(
        weight, dtype=dtype, memory_format=torch.contiguous_format
    ),
)
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


@operator(
    "dequantized_linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, int[] block) -> Tensor",
    meta=lambda x, weight, weight_scale, bias, block: x.new_empty((*x.shape[:-1], weight.shape[0])),
)
def _dequantized_linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, block: list[int]
) -> Tensor:
    w = dequantize_reference(weight, weight_scale, block, x.dtype)
    return torch.nn.functional.linear(x, w, None if bias is None else bias.to(x.dtype))


@operator(
    "dequantized_grouped_mm(Tensor x, Tensor weight, Tensor weight_scale, Tensor offs, int[] block) -> Tensor",
    meta=lambda x, weight, weight_scale, offs, block: x.new_empty((x.shape[0], weight.shape[-2])),
)
def _dequantized_grouped_mm(x: Tensor, weight: Tensor, weight_scale: Tensor, offs: Tensor, block: list[int]) -> Tensor:
    out = x.new_zeros((x.shape[0], weight.shape[-2]))
    start = 0
    for expert, end in enumerate(offs.tolist()):
        if end > start:
            w = dequantize_reference(weight[expert], weight_scale[expert], block, x.dtype)
            out[start:end] = x[start:end] @ w.t()
        start = end
    return out


@operator(
    "dequantized_gathered_mm(Tensor x, Tensor weight, Tensor weight_scale, Tensor ids, int[] block) -> Tensor",
    meta=lambda x, weight, weight_scale, ids, block: x.new_empty((x.shape[0], weight.shape[-2])),
)
def _dequantized_gathered_mm(x: Tensor, weight: Tensor, weight_scale: Tensor, ids: Tensor, block: list[int]) -> Tensor:
    out = x.new_empty((x.shape[0], weight.shape[-2]))
    for row, expert in enumerate(ids.tolist()):
        w = dequantize_reference(weight[expert], weight_scale[expert], block, x.dtype)
        out[row] = w @ x[row]
    return out


@operator(
    "linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    meta=lambda x, weight, bias: x.new_empty((*x.shape[:-1], weight.shape[0])),
)
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(x, weight, bias)


@operator(
    "pack(Tensor[] parts) -> Tensor",
    meta=lambda parts: parts[0].new_empty((sum(part.shape[0] for part in parts), *parts[0].shape[1:])),
)
def _pack(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts)


def _codes_and_scales(x: Tensor, *scales: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=FP8), x.new_empty(scales, dtype=torch.float32)


@operator(
    "quantize_per_token(Tensor x, float? bound=None) -> (Tensor, Tensor)",
    meta=lambda x, bound=None: _codes_and_scales(x, x.shape[0], 1),
)
def _quantize_per_token(x: Tensor, bound: float | None = None) -> tuple[Tensor, Tensor]:
    fp8, scale = quantize_per_token_steps(apply, x, bound)
    return fp8.contiguous(), scale


@operator(
    "quantize_per_group(Tensor x, int group) -> (Tensor, Tensor)",
    meta=lambda x, group: _codes_and_scales(x, x.shape[0], x.shape[1] // group),
)
def _quantize_per_group(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    return quantize_per_group_steps(apply, x, x.shape[-1], group)


@operator(
    "quantize_mx(Tensor x) -> (Tensor, Tensor)",
    meta=lambda x: (x.new_empty(x.shape, dtype=FP8), x.new_empty((x.shape[0], x.shape[1] // 32), dtype=torch.uint8)),
)
def _quantize_mx(x: Tensor) -> tuple[Tensor, Tensor]:
    return quantize_mx_steps(apply, x, x.shape[-1])


@operator(
    "quantize_per_tensor(Tensor x, Tensor? input_scale) -> (Tensor, Tensor)",
    meta=lambda x, input_scale: _codes_and_scales(x, *((1, 1) if input_scale is None else input_scale.shape)),
)
def _quantize_per_tensor(x: Tensor, input_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    fp8, scale = quantize_per_tensor_steps(apply, x, input_scale)
    scale = scale.clone() if input_scale is not None else scale  # an operator must not return its input
    return fp8.contiguous(), scale


@operator(
    "scaled_mm(Tensor x, Tensor weight, Tensor scale_a, Tensor weight_scale, Tensor? bias, int[] block, "
    "ScalarType out_dtype) -> Tensor",
    meta=lambda x, weight, scale_a, weight_scale, bias, block, out_dtype: x.new_empty(
        (x.shape[0], weight.shape[0]), dtype=out_dtype
    ),
)
def _scaled_mm(
    x: Tensor, weight: Tensor, scale_a: Tensor, weight_scale: Tensor, bias: Tensor | None, block: list[int],
    out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    group = x.shape[-1] // scale_a.shape[-1] if x.shape[-1] else 1
    wide = x.to(torch.float32) * expand_scale(scale_a, [1, group], x.shape[0], x.shape[1])
    out = wide @ dequantize_reference(weight, weight_scale, block, torch.float32).t()
    return (out if bias is None else out + bias).to(out_dtype)


@operator(
    "scaled_grouped_mm(Tensor x, Tensor weight, Tensor scale_a, Tensor weight_scale, Tensor offs, int[] block, "
    "ScalarType out_dtype) -> Tensor",
    meta=lambda x, weight, scale_a, weight_scale, offs, block, out_dtype: x.new_empty(
        (x.shape[0], weight.shape[-2]), dtype=out_dtype
    ),
)
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


def _width(stored: Tensor, scale: Tensor | None) -> int:
    """Columns of a stored key or value: its last byte is its scale where it is FP8 and has no other."""
    return stored.shape[-1] - int(stored.dtype == torch.uint8 and scale is None)


@operator(
    "cached(Tensor stored, Tensor? scale, ScalarType dtype) -> Tensor",
    meta=lambda stored, scale, dtype: stored.new_empty((*stored.shape[:-1], _width(stored, scale)), dtype=dtype),
)
def _cached(stored: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    return cached_steps(apply, stored, stored.shape[-1], scale, dtype)


@operator(
    "attention(Tensor query, Tensor keys, Tensor values, Tensor? key_scale, Tensor? value_scale, Tensor? mask, float scale)"
    " -> Tensor",
    meta=lambda query, keys, values, key_scale, value_scale, mask, scale: query.new_empty(
        (query.shape[0], query.shape[2], query.shape[1], _width(values, value_scale))
    ).transpose(1, 2),
)
def _attention(
    query: Tensor, keys: Tensor, values: Tensor, key_scale: Tensor | None, value_scale: Tensor | None, mask: Tensor | None,
    scale: float,
) -> Tensor:  # fmt: skip
    keys, values = (
        t.float() if t.dtype != torch.uint8 else _cached(t, s, torch.float32)
        for t, s in ((keys, key_scale), (values, value_scale))
    )
    group = query.shape[1] // keys.shape[1]
    scores = query.float() @ keys.repeat_interleave(group, 1).mT * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    out = torch.ops.aten._safe_softmax(scores, -1) @ values.repeat_interleave(group, 1)
    return out.to(query.dtype).transpose(1, 2).contiguous().transpose(1, 2)


#: By kind of matmul (`lowering.kernel.KINDS`), the operator that takes an unquantized activation and an FP8 weight.
DEQUANTIZED = {
    "linear": torch.ops.ctfp8.dequantized_linear.default,
    "grouped_mm": torch.ops.ctfp8.dequantized_grouped_mm.default,
    "gathered_mm": torch.ops.ctfp8.dequantized_gathered_mm.default,
}
