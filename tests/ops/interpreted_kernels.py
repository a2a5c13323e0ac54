"""The weight-only kernels under Triton's interpreter, against float64. `test_triton.py` runs this file in its own process."""

from __future__ import annotations

import os

import pytest
import support.interpreted  # noqa: F401 - says what is wrong without TRITON_INTERPRET, and mends its dot
import torch
import triton
import triton.language as tl
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from ctfp8_compile import ops
from ctfp8_compile.ops.triton import kernels, operators

FP8 = torch.float8_e4m3fn
#: Relative error of the result's own rounding, which the interpreter cuts off for bfloat16.
ROUNDING = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-11, torch.float32: 2.0**-24}


@triton.jit
def decode_kernel(fp8, out, dtype: tl.constexpr):
    at = tl.arange(0, 256)
    tl.store(out + at, kernels.decode(tl.load(fp8 + at), dtype).to(tl.float32) * kernels.UNIT)


@pytest.mark.parametrize("dtype", [tl.bfloat16, tl.float16, tl.float32], ids=str)
def test_every_code_is_decoded_to_the_bit(dtype):
    fp8 = torch.arange(256, dtype=torch.uint8)
    got = torch.empty(256)
    decode_kernel[(1,)](fp8, got, dtype)
    want = fp8.view(FP8).float()
    numbers = ~want.isnan()  # 0x7F and 0xFF are refused when a checkpoint is loaded
    assert numbers.sum() == 254
    assert torch.equal(got[numbers].view(torch.int32), want[numbers].view(torch.int32))  # the sign of zero, too


def some_weight(*shape: int) -> torch.Tensor:
    """Every FP8 value but the two NaNs, subnormals as often as others."""
    fp8 = torch.randint(0, 254, shape, dtype=torch.uint8)
    return torch.where(fp8 >= 127, fp8 + 1, fp8).view(FP8)


def some_scale(shape: tuple[int, ...], block: tuple[int, int]) -> torch.Tensor:
    return torch.rand(*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1])) * 2**-6 + 2**-8


def dequantized(weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    return weight.double() * ops.expand_scale(scale.double(), list(block), *weight.shape[-2:])


def check(got: torch.Tensor, want: torch.Tensor, size: torch.Tensor, dtype: torch.dtype) -> None:
    """Each result is its float64, rounded; sums are float32, which errs by the magnitudes that were added."""
    assert got.dtype == dtype
    assert got.shape == want.shape
    error = (got.double() - want).abs()
    finest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert (error <= ROUNDING[dtype] * want.abs() + 2.0**-21 * size + finest).all(), (error / size).max()


BLOCKS = [None, "rows", (16, 32), (64, 64), (24, 40), (5, 16), (48, 1000), (128, 128)]
#: A handful of examples always; CTFP8_EXAMPLES asks for more of them, at random.
EXAMPLES = int(os.environ.get("CTFP8_EXAMPLES", "0"))
FEW = settings(
    max_examples=EXAMPLES or 12,
    derandomize=not EXAMPLES,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
dtypes = st.sampled_from([torch.bfloat16, torch.float16, torch.float32])


def block_of(kind, n, k):
    """`None` is a scale a channel, `"rows"` one for all."""
    return (1, k) if kind is None else (n, k) if kind == "rows" else kind


@FEW
@given(
    m=st.sampled_from([1, 2, 7, 9, 17, 31, 40, 70]),
    n=st.sampled_from([1, 8, 16, 33, 64, 80]),
    k=st.sampled_from([1, 16, 31, 64, 96, 130, 256, 300]),
    kind=st.sampled_from(BLOCKS),
    bias=st.sampled_from([None, "same", "float32"]),
    dtype=dtypes,
    seed=st.integers(0, 1000),
)
def test_linear(m, n, k, kind, bias, dtype, seed):
    torch.manual_seed(seed)
    block = block_of(kind, n, k)
    weight = some_weight(n, k)
    scale, x = some_scale(weight.shape, block), torch.randn(m, k).to(dtype)
    b = None if bias is None else torch.randn(n).to(dtype if bias == "same" else torch.float32)
    got = operators.linear(x, weight, scale, b, list(block))
    w = dequantized(weight, scale, block)
    want = x.double() @ w.t() + (0 if b is None else b.double())
    check(got, want, x.double().abs() @ w.abs().t() + (0 if b is None else b.double().abs()), dtype)


@FEW
@given(
    counts=st.lists(st.sampled_from([0, 1, 3, 8, 20, 45]), min_size=1, max_size=6),
    behind=st.sampled_from([0, 0, 3]),
    n=st.sampled_from([8, 33, 80]),
    k=st.sampled_from([16, 31, 96, 130]),
    kind=st.sampled_from(BLOCKS),
    dtype=dtypes,
    index=st.sampled_from([torch.int32, torch.int64]),
    seed=st.integers(0, 1000),
)
def test_grouped(counts, behind, n, k, kind, dtype, index, seed):
    torch.manual_seed(seed)
    block, rows = block_of(kind, n, k), sum(counts) + behind
    weight = some_weight(len(counts), n, k)
    scale, x = some_scale(weight.shape, block), torch.randn(rows, k).to(dtype)
    offs = torch.tensor(counts).cumsum(0).to(index)
    got = operators.grouped_mm(x, weight, scale, offs, list(block))
    w = dequantized(weight, scale, block)
    want, size = torch.zeros(rows, n, dtype=torch.float64), torch.zeros(rows, n, dtype=torch.float64)
    for expert, (end, count) in enumerate(zip(offs.tolist(), counts, strict=True)):
        want[end - count : end] = x[end - count : end].double() @ w[expert].t()
        size[end - count : end] = x[end - count : end].double().abs() @ w[expert].abs().t()
    check(got, want, size, dtype)


@FEW
@given(
    rows=st.sampled_from([1, 2, 5, 16, 24, 40]),
    experts=st.integers(1, 6),
    n=st.sampled_from([8, 33, 80]),
    k=st.sampled_from([16, 31, 96, 130]),
    kind=st.sampled_from(BLOCKS),
    dtype=dtypes,
    index=st.sampled_from([torch.int32, torch.int64]),
    seed=st.integers(0, 1000),
)
def test_gathered(rows, experts, n, k, kind, dtype, index, seed):
    torch.manual_seed(seed)
    block = block_of(kind, n, k)
    weight = some_weight(experts, n, k)
    scale, x = some_scale(weight.shape, block), torch.randn(rows, k).to(dtype)
    ids = torch.randint(0, experts, (rows,)).to(index)
    got = operators.gathered_mm(x, weight, scale, ids, list(block))
    w = dequantized(weight, scale, block)[ids]
    want = torch.einsum("tnk,tk->tn", w, x.double())
    check(got, want, torch.einsum("tnk,tk->tn", w.abs(), x.double().abs()), dtype)


def test_more_rows_than_a_window_holds(monkeypatch):
    monkeypatch.setattr(operators, "_WINDOW", 16)
    torch.manual_seed(0)
    weight, x, ids = some_weight(3, 20, 32), torch.randn(50, 32), torch.randint(0, 3, (50,))
    scale = some_scale(weight.shape, (1, 32))
    got = operators.gathered_mm(x, weight, scale, ids, [1, 32])
    w = dequantized(weight, scale, (1, 32))[ids]
    check(got, torch.einsum("tnk,tk->tn", w, x.double()),
          torch.einsum("tnk,tk->tn", w.abs(), x.double().abs()), torch.float32)  # fmt: skip


def test_the_tiles_of_many_rows():
    """Large tiles, masked on every side, in an order of programs that is not that of the rows."""
    torch.manual_seed(0)
    m, n, k = 150, 140, 100
    weight, x = some_weight(n, k), torch.randn(m, k)
    launched = operators.tiles.Tile(128, 128, 64, 1, 4, 3)
    for tile in (launched, operators.tiles.Tile(16, 16, 64, 1, 4, 3)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(operators.tiles, "choose", lambda *args, tile=tile: tile)
            scale = some_scale(weight.shape, (1, k))
            got = operators.linear(x, weight, scale, None, [1, k])
        w = dequantized(weight, scale, (1, k))
        check(got, x.double() @ w.t(), x.double().abs() @ w.abs().t(), torch.float32)


def test_shapes_and_no_rows():
    weight, scale = some_weight(8, 16), torch.ones(8, 1)
    x = torch.randn(2, 3, 16)
    got = operators.linear(x, weight, scale, None, [1, 16])
    assert got.shape == (2, 3, 8)
    torch.testing.assert_close(got, x @ weight.float().t())
    turned = torch.randn(16, 5).t()  # not row-major
    torch.testing.assert_close(operators.linear(turned, weight, scale, None, [1, 16]), turned @ weight.float().t())
    assert operators.linear(torch.randn(0, 16), weight, scale, None, [1, 16]).shape == (0, 8)
    none = torch.zeros(2, dtype=torch.int32)
    assert operators.grouped_mm(
        torch.randn(0, 16), weight[None].repeat(2, 1, 1), scale[None].repeat(2, 1, 1), none, [1, 16]
    ).shape == (0, 8)
