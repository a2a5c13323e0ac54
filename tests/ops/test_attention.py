"""The CPU kernel of attention to a cache against float64 arithmetic, on every instruction set of this CPU."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ctfp8_compile.ops import FP8, apply
from ctfp8_compile.ops import cpu as cpu_kernels
from ctfp8_compile.ops.fp8 import quantize_cached_steps
from ctfp8_compile.ops.operators import _attention

cpu_kernels.load()
ISAS: list[str] = torch.ops.ctfp8_cpu.isas()
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
ROUNDING = {F32: 2e-6, F16: 3e-3, BF16: 2.0**-8}


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.ops.ctfp8_cpu.set_isa("")
    torch.set_num_threads(threads)


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scales: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    return torch.ops.ctfp8.attention(q, k, v, *(scales or (None, None)), mask, 1 / math.sqrt(q.shape[-1]))


def numbers(stored: Tensor, scale: Tensor | None) -> Tensor:
    if stored.dtype != torch.uint8:
        return stored.double()
    if scale is not None:
        return stored.view(FP8).double() * scale.double().reshape(1, -1, 1, 1)
    return stored[..., :-1].contiguous().view(FP8).double() * 2.0 ** (stored[..., -1:].double() - 127)


def check(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scales: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    out = attention(q, k, v, mask, scales)
    assert out.dtype == q.dtype
    wide, wide_v = (numbers(t, s) for t, s in zip((k, v), scales or (None, None), strict=True))
    group = q.shape[1] // k.shape[1]
    # torch's own kernel, which takes keys and values, and rounds the softmax, in the query's dtype
    theirs = group * q.shape[2] > 64 or q.dtype == F16
    if theirs:
        wide, wide_v = wide.to(q.dtype).double(), wide_v.to(q.dtype).double()
    scores = q.double() @ wide.repeat_interleave(group, 1).mT / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.double()
    expected = scores.softmax(-1).nan_to_num() @ wide_v.repeat_interleave(group, 1)
    # the softmax's weights, bfloat16 there, are off by half a step
    rounded = q.dtype == BF16 and torch.ops.ctfp8_cpu.isa().startswith("avx512-bf16")
    allowed = ROUNDING[q.dtype] * (expected.abs() + wide_v.abs().amax() / (1 if theirs else 2 if rounded else 16))
    # what a score is off by, of its own size, a weight is off by, of its own
    allowed = allowed * (1 + scores.nan_to_num(neginf=0).abs().amax() / 8)
    assert ((out.double() - expected).abs() <= allowed).all()
    return out


def seen(kind: str, batch: int, tokens: int, length: int, filled: int, window: int) -> Tensor | None:
    """Which tokens each query sees, as models say it: bool `[batch or 1, 1, tokens, length]`."""
    if kind == "none":
        return None
    at, query = torch.arange(length), torch.arange(tokens)[:, None] + filled - tokens
    mask = (at <= query)[None, None]
    if kind == "window":
        mask = mask & (at > query - window)
    if kind == "padding":
        mask = mask & (at >= torch.arange(batch)[:, None] * 7).view(batch, 1, 1, length)
    if kind == "nothing":
        mask = mask & (torch.arange(batch) % 2 == 1).view(batch, 1, 1, 1)
    return mask


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=50, deadline=None)
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 3, 4, 7, 8, 16]),
    tokens=st.sampled_from([1, 1, 1, 2, 5, 70]),
    width=st.sampled_from([1, 7, 8, 16, 24, 33, 64, 80, 128]),
    value_width=st.sampled_from([0, 0, 5, 40]),
    length=st.integers(1, 1100),
    kind=st.sampled_from(["none", "filled", "window", "padding", "nothing"]),
    dtype=st.sampled_from([BF16, BF16, F32, F16]),
    stored=st.sampled_from(["numbers", "a byte a token", "one scale", "a scale a head"]),
    data=st.data(),
)
def test_attention(
    isa: str, batch: int, heads: int, group: int, tokens: int, width: int, value_width: int, length: int, kind: str,
    dtype: torch.dtype, stored: str, data: st.DataObject,
) -> None:  # fmt: skip
    torch.manual_seed(length)
    torch.ops.ctfp8_cpu.set_isa(isa)
    torch.set_num_threads(data.draw(st.sampled_from([1, 2])))
    tokens = min(tokens, length)
    q = torch.randn(batch, heads * group, tokens, width).to(dtype) * 2
    if data.draw(st.booleans()):
        q = q.transpose(1, 2).contiguous().transpose(1, 2)
    k, v = torch.randn(batch, heads, length, width), torch.randn(batch, heads, length, value_width or width)
    scales = None
    if stored == "numbers":
        k, v = k.to(dtype), v.to(dtype)
    else:
        if stored != "a byte a token":
            scales = (torch.rand(2, 1 if stored == "one scale" else heads) * 0.01 + 0.01).unbind()
        k, v = (quantize_cached_steps(apply, t, s) for t, s in zip((k, v), scales or (None, None), strict=True))
    filled, window = data.draw(st.integers(tokens, length)), data.draw(st.integers(1, 200))
    mask = seen(kind, batch, tokens, length, filled, window)
    if mask is not None and data.draw(st.booleans()):
        mask = torch.zeros(()).masked_fill(~mask, -math.inf).to(dtype)
    check(q, k, v, mask, scales)


@pytest.mark.parametrize("isa", ISAS)
def test_what_nobody_sees_is_not_read_and_nan_is_not_lost(isa: str) -> None:
    torch.ops.ctfp8_cpu.set_isa(isa)
    q, k, v = torch.randn(1, 4, 1, 64), torch.randn(1, 2, 512, 64), torch.randn(1, 2, 512, 64)
    mask = seen("window", 1, 1, 512, 300, 100)
    assert mask is not None
    expected = check(q, k, v, mask)
    k[:, :, 320:], v[:, :, 320:], k[:, :, :192], v[:, :, :192] = (math.nan,) * 4
    assert torch.equal(attention(q, k, v, mask), expected)
    k[0, 1, 250, 3] = math.nan
    out = attention(q, k, v, mask)
    assert out[0, :2].isfinite().all()
    assert out[0, 2:].isnan().all()


def test_a_mask_for_each_head_and_numbers_as_masks() -> None:
    q, k, v = torch.randn(2, 6, 3, 32), torch.randn(2, 2, 200, 32), torch.randn(2, 2, 200, 32)
    check(q, k, v, torch.randn(2, 6, 3, 200) * 3)
    check(q, k, v, torch.full((1, 1, 1, 200), torch.finfo(F32).min))


def test_the_kernel_is_the_reference() -> None:
    q, k, v = torch.randn(1, 4, 1, 32).to(BF16), torch.randn(1, 2, 100, 32), torch.randn(1, 2, 100, 32)
    k, v = (quantize_cached_steps(apply, t, None) for t in (k, v))
    mask = seen("window", 1, 1, 100, 80, 30)
    reference = _attention(q, k, v, None, None, mask, 0.2)
    torch.testing.assert_close(
        torch.ops.ctfp8.attention(q, k, v, None, None, mask, 0.2), reference, rtol=0.01, atol=0.01
    )
    torch.library.opcheck(
        torch.ops.ctfp8.attention.default, (q, k, v, None, None, mask, 0.2), test_utils="test_faketensor"
    )


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_token_rounds_to_its_own_power_of_two(dtype: torch.dtype) -> None:
    x = (torch.randn(2, 3, 50, 64) * torch.logspace(-9, 9, 50)[:, None]).to(dtype)
    x[0, 0, 0] = 0
    x[0, 0, 1, 5] = 448 * 2.0**20
    packed = quantize_cached_steps(apply, x, None)
    assert packed.shape == (2, 3, 50, 65)
    back = numbers(packed, None)
    top = x.double().abs().amax(-1, keepdim=True)
    assert ((back - x.double()).abs() <= x.double().abs() / 16 + top * 2.0**-17).all()
    assert back[0, 0, 1, 5] == 448 * 2.0**20
    assert torch.equal(torch.ops.ctfp8.cached(packed, None, F32).double(), back)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(k=torch.zeros(1, 3, 8, 16)), "a divisor of the heads"),
        (dict(k=torch.zeros(1, 2, 8, 16, dtype=F16)), "as the query"),
        (dict(v=torch.zeros(1, 2, 9, 16)), "do not fit"),
        (dict(mask=torch.zeros(1, 1, 1, 7)), "mask must be"),
    ],
)
def test_what_does_not_fit_is_said(change: dict[str, Tensor], message: str) -> None:
    given = dict(q=torch.zeros(1, 4, 1, 16), k=torch.zeros(1, 2, 8, 16), v=torch.zeros(1, 2, 8, 16)) | change
    with pytest.raises(RuntimeError, match=message):
        attention(**given)
