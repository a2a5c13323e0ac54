"""The C++ CPU kernels against float64 arithmetic and the reference implementations, on every instruction set of this CPU."""

from __future__ import annotations

import math
import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ctfp8_compile import ops
from ctfp8_compile.ops import cpu as cpu_kernels

FP8 = torch.float8_e4m3fn
op = torch.ops.ctfp8

cpu_kernels.load()
ISAS: list[str] = torch.ops.ctfp8_cpu.isas()

#: Of the sum of absolute products, what float32 accumulation and one rounding to the type may miss.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-6, torch.bfloat16: 4e-6}
ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.ops.ctfp8_cpu.set_isa("")
    torch.set_num_threads(threads)


#: Instruction sets with a kernel for weights that are not quantized.
STREAMING = ("avx512-bf16", "avx512", "avx2")


def fp8(*shape: int, nan: bool = False) -> Tensor:
    raw = torch.randint(0, 256, shape, dtype=torch.uint8)
    if not nan:
        raw = torch.where((raw & 0x7F) == 0x7F, raw - 1, raw)
    return raw.view(FP8)


def misaligned(t: Tensor, offset: int) -> Tensor:
    """The same values at an address that is `offset` bytes past an aligned one, as in a memory-mapped checkpoint."""
    raw = torch.zeros(t.numel() * t.element_size() + 64, dtype=torch.uint8)
    start = -raw.data_ptr() % 64 + offset
    raw = raw[start : start + t.numel() * t.element_size()]
    raw.copy_(t.contiguous().view(torch.uint8).reshape(-1))
    return raw.view(t.dtype).view(t.shape)


#: A block whose scales are powers of two, kept as bytes.
MXFP8 = (1, 32)


def scales(n: int, k: int, block: Sequence[int], *lead: int) -> Tensor:
    if block == MXFP8:
        return torch.randint(105, 122, (*lead, n, math.ceil(k / 32)), dtype=torch.uint8)
    return torch.rand(*lead, math.ceil(n / block[0]), math.ceil(k / block[1])) * 0.02 + 1e-3


def exact(
    x: Tensor, weight: Tensor, scale: Tensor, block: Sequence[int], bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The product in float64, and the sum of the absolute values of its terms."""
    w = weight.to(torch.float64) * ops.expand_scale(scale, block, *weight.shape[-2:]).double()
    out, size = x.double() @ w.mT, x.double().abs() @ w.abs().mT
    return (out, size) if bias is None else (out + bias.double(), size + bias.double().abs())


def check(out: Tensor, expected: Tensor, size: Tensor) -> None:
    allowed = size * TOLERANCE[out.dtype] + expected.abs() * ROUNDING[out.dtype] + 1e-7
    wrong = (out.double() - expected).abs() - allowed
    assert wrong.numel() == 0 or wrong.max() <= 0, f"off by {wrong.max():.3g} more than allowed"


BLOCKS = st.sampled_from(
    ["channel", [128, 128], [64, 128], [1, 128], [128, 64], [16, 100], [3, 7], [1, 1], [1, 64], [1000, 1000], MXFP8]
)
DTYPES = st.sampled_from([torch.bfloat16, torch.float32, torch.float16])
ROWS = st.one_of(st.integers(0, 9), st.sampled_from([13, 16, 17, 31, 33, 48, 49, 64, 65, 100, 129]))


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=60, deadline=None)
@given(
    m=ROWS,
    n=st.integers(1, 200),
    k=st.integers(1, 700),
    block=BLOCKS,
    dtype=DTYPES,
    offset=st.integers(0, 63),
    data=st.data(),
)
def test_linear(
    isa: str, m: int, n: int, k: int, block: Sequence[int] | str, dtype: torch.dtype, offset: int, data: st.DataObject
) -> None:
    torch.manual_seed(0)
    torch.ops.ctfp8_cpu.set_isa(isa)
    torch.set_num_threads(data.draw(st.sampled_from([1, 2])))
    block = [1, k] if isinstance(block, str) else block
    weight, scale = misaligned(fp8(n, k), offset), scales(n, k, block)
    x = torch.randn(m, k).to(dtype)
    if data.draw(st.booleans()):
        x = torch.randn(k, m).to(dtype).t()
    bias = data.draw(st.sampled_from([None, torch.bfloat16, torch.float32, torch.float64]))
    b = None if bias is None else torch.randn(n).to(bias)
    out = op.dequantized_linear(x, weight, scale, b, block)
    assert out.dtype == dtype
    assert out.shape == (m, n)
    check(out, *exact(x, weight, scale, block, b))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("m", [1, 4, 16, 520])
def test_linear_of_real_size(isa: str, dtype: torch.dtype, m: int) -> None:
    torch.ops.ctfp8_cpu.set_isa(isa)
    n, k = (96, 1500) if m > 16 else (513, 4096)
    for block in ([1, k], [128, 128], MXFP8):
        weight, scale, x = fp8(n, k), scales(n, k, block), torch.randn(m, k).to(dtype)
        check(op.dequantized_linear(x, weight, scale, None, block), *exact(x, weight, scale, block))


@pytest.mark.parametrize("block", [[1, 16500], [128, 128], MXFP8])
@pytest.mark.parametrize("m", [1, 2, 3, 4, 260])
def test_activations_beyond_the_cache(m: int, block: list[int]) -> None:
    """Tiles of the weight are larger then, and its rows pass several abreast."""
    x, weight, scale = torch.randn(m, 16500).bfloat16(), fp8(100, 16500), scales(100, 16500, block)
    check(op.dequantized_linear(x, weight, scale, None, block), *exact(x, weight, scale, block))


@settings(max_examples=80, deadline=None)
@given(
    m=st.integers(0, 6),
    n=st.integers(1, 200),
    k=st.one_of(st.integers(1, 700), st.sampled_from([4096, 4097, 16384, 16385])),
    offset=st.integers(0, 31),
    strided=st.booleans(),
    dtype=DTYPES,
    bias=st.booleans(),
    data=st.data(),
)
def test_a_weight_that_is_not_quantized(
    m: int, n: int, k: int, offset: int, strided: bool, dtype: torch.dtype, bias: bool, data: st.DataObject
) -> None:
    """Few rows of bfloat16 are ours where this CPU has the kernel; all else is torch's, to the bit."""
    torch.manual_seed(0)
    isa = data.draw(st.sampled_from(ISAS))
    torch.ops.ctfp8_cpu.set_isa(isa)
    torch.set_num_threads(data.draw(st.sampled_from([1, 2])))
    ld = k + 3 * strided
    weight = torch.randn(n * ld + offset)[offset:].to(dtype).as_strided((n, k), (ld, 1))
    x = torch.randn(m, k).to(dtype)
    if data.draw(st.booleans()):
        x = torch.randn(k, m).to(dtype).t()
    b = torch.randn(n).to(dtype) if bias else None
    expected, size = x.double() @ weight.double().t(), x.double().abs() @ weight.double().abs().t()
    if b is not None:
        expected, size = expected + b.double(), size + b.double().abs()
    for shape in ((m, k), (1, m, k)):
        out = op.linear(x.reshape(shape), weight, b)
        assert out.dtype == dtype
        assert out.shape == (*shape[:-1], n)
        if isa in STREAMING and dtype == torch.bfloat16 and 1 <= m <= 4 and m * k <= 16384:
            check(out.reshape(m, n), expected, size)
        else:
            assert torch.equal(out, torch.nn.functional.linear(x.reshape(shape), weight, b))


def test_infinities_and_nan_of_such_a_weight_stay() -> None:
    weight = torch.ones(70, 130).bfloat16()
    weight[3, 129], weight[65, 0], weight[69, 64] = float("inf"), float("nan"), float("-inf")
    out = op.linear(torch.ones(1, 130).bfloat16(), weight, None)[0]
    assert out[3] == float("inf")
    assert out[65].isnan()
    assert out[69] == float("-inf")
    assert out.isfinite().sum() == 67


def test_no_worse_than_torch_on_dequantized_weights() -> None:
    x, weight, scale = torch.randn(16, 2048).bfloat16(), fp8(256, 2048), scales(256, 2048, [128, 128])
    expected, _ = exact(x, weight, scale, [128, 128])
    error = lambda out: ((out.double() - expected).norm() / expected.norm()).item()  # noqa: E731
    stock = torch.nn.functional.linear(x, op.dequantize(weight, scale, None, [128, 128], "none", torch.bfloat16))
    assert error(op.dequantized_linear(x, weight, scale, None, [128, 128])) <= error(stock)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("m", [1, 3, 40])
def test_every_code(isa: str, dtype: torch.dtype, m: int) -> None:
    """A weight of one column times one is the decoded FP8 value itself."""
    torch.ops.ctfp8_cpu.set_isa(isa)
    weight = torch.arange(256, dtype=torch.uint8).view(FP8)
    out = op.dequantized_linear(torch.ones(m, 1, dtype=dtype), weight[:, None], torch.ones(256, 1), None, [1, 1])
    torch.testing.assert_close(out.float(), weight.float().expand(m, 256), rtol=0, atol=0, equal_nan=True)
    # and at each place of a chunk, so that every lane is seen
    for place in (0, 7, 8, 15, 16, 33, 63, 64, 100):
        row = torch.zeros(256, 101, dtype=torch.uint8).view(FP8)
        row[:, place] = weight
        x = torch.zeros(m, 101, dtype=dtype)
        x[:, place] = 1
        out = op.dequantized_linear(x, row, torch.ones(256, 1), None, [1, 101])
        torch.testing.assert_close(out.float(), weight.float().expand(m, 256), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 8, 11])
@pytest.mark.parametrize("block", [[1, 1100], [128, 128], MXFP8], ids=["row", "128x128", "MXFP8"])
def test_normal_numbers_and_one_other(isa: str, dtype: torch.dtype, m: int, block: list[int]) -> None:
    """Runs of normal numbers and zeros, which have a path of their own, and in each row one of the 256 FP8 values among them."""
    torch.ops.ctfp8_cpu.set_isa(isa)
    torch.manual_seed(m)
    raw = torch.randint(8, 0x7F, (256, 1100), dtype=torch.uint8) | (torch.randint(0, 2, (256, 1100)) * 128).byte()
    raw[64:] *= (torch.rand(192, 1100) < 0.7).byte()  # zeros
    places = torch.arange(256) * 37 % 1100
    raw[torch.arange(256), places] = torch.arange(256, dtype=torch.uint8)
    weight, scale = raw.view(FP8), scales(256, 1100, block)
    x = torch.randn(m, 1100).to(dtype)
    out = op.dequantized_linear(x, weight, scale, None, block)
    numbers = [row for row in range(256) if row not in (0x7F, 0xFF)]
    expected, size = exact(x, weight, scale, block)
    check(out[:, numbers], expected[:, numbers], size[:, numbers])
    assert out[:, [0x7F, 0xFF]].isnan().all()
    x = torch.eye(1100, dtype=dtype)[places[:12]]  # a single value of each row, exactly
    got = op.dequantized_linear(x[:m], weight, torch.ones(256, 1), None, [1, 1100]).float()
    assert torch.equal(got[:, numbers], weight.float()[numbers][:, places[:m]].T)


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=40, deadline=None)
@given(
    lead=st.sampled_from([(), (3,), (2, 2)]),
    n=st.integers(1, 150),
    k=st.integers(1, 400),
    block=BLOCKS,
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
    offset=st.integers(0, 63),
    tiny=st.booleans(),
)
def test_dequantize_is_bit_exact(
    isa: str,
    lead: tuple[int, ...],
    n: int,
    k: int,
    block: Sequence[int] | str,
    dtype: torch.dtype,
    offset: int,
    tiny: bool,
) -> None:
    torch.manual_seed(0)
    torch.ops.ctfp8_cpu.set_isa(isa)
    block = [1, k] if isinstance(block, str) else block
    weight = misaligned(fp8(*lead, n, k, nan=True), offset)
    scale = scales(n, k, block, *lead)
    if tiny:
        scale = scale - 105 if block == MXFP8 else scale * 1e-37
    out = op.dequantize(weight, scale, None, block, "dynamic", dtype)
    expected = ops.dequantize_reference(weight, scale, block, dtype)
    assert out.dtype == dtype
    assert out.is_contiguous()
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[out.element_size()]
    nan = expected.isnan()
    assert torch.equal(nan, out.isnan())
    assert torch.equal(out.view(integer)[~nan], expected.view(integer)[~nan])


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=25, deadline=None)
@given(
    counts=st.lists(st.sampled_from([0, 0, 1, 2, 9, 20, 70]), min_size=1, max_size=6),
    extra=st.integers(0, 3),
    n=st.integers(1, 130),
    k=st.integers(1, 300),
    block=BLOCKS,
    dtype=DTYPES,
    index=st.sampled_from([torch.int32, torch.int64]),
)
def test_grouped(
    isa: str,
    counts: list[int],
    extra: int,
    n: int,
    k: int,
    block: Sequence[int] | str,
    dtype: torch.dtype,
    index: torch.dtype,
) -> None:
    torch.manual_seed(0)
    torch.ops.ctfp8_cpu.set_isa(isa)
    block = [1, k] if isinstance(block, str) else block
    e = len(counts)
    weight, scale = fp8(e, n, k), scales(n, k, block, e)
    x, offs = torch.randn(sum(counts) + extra, k).to(dtype), torch.tensor(counts).cumsum(0).to(index)
    out = op.dequantized_grouped_mm(x, weight, scale, offs, block)
    begin = 0
    for expert, end in enumerate(offs.tolist()):
        check(out[begin:end], *exact(x[begin:end], weight[expert], scale[expert], block))
        begin = end
    assert torch.equal(out[begin:], torch.zeros_like(out[begin:]))


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=25, deadline=None)
@given(
    t=st.sampled_from([0, 1, 2, 12, 60]),
    e=st.integers(1, 5),
    n=st.integers(1, 130),
    k=st.integers(1, 300),
    block=BLOCKS,
    dtype=DTYPES,
    index=st.sampled_from([torch.int32, torch.int64]),
)
def test_gathered(
    isa: str, t: int, e: int, n: int, k: int, block: Sequence[int] | str, dtype: torch.dtype, index: torch.dtype
) -> None:
    torch.manual_seed(0)
    torch.ops.ctfp8_cpu.set_isa(isa)
    block = [1, k] if isinstance(block, str) else block
    weight, scale = fp8(2 * e, n, k)[::2], scales(n, k, block, e)
    x, ids = torch.randn(t, k).to(dtype), torch.randint(0, e, (t,), dtype=index)
    out = op.dequantized_gathered_mm(x, weight, scale, ids, block)
    assert out.shape == (t, n)
    for row in range(t):
        check(out[row], *(v[0] for v in exact(x[row : row + 1], weight[ids[row]], scale[ids[row]], block)))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("m", [1, 3, 40])
def test_every_exponent(isa: str, m: int) -> None:
    """A column of ones times each power of two that a checkpoint may have; the smallest may become zero."""
    torch.ops.ctfp8_cpu.set_isa(isa)
    exponents = torch.arange(247, dtype=torch.uint8)[:, None].expand(247, 3).contiguous()
    weight = torch.zeros(247, 70)
    weight[:, [0, 31, 33, 69]] = torch.tensor([1.0, -2.0, 0.5, 4.0])
    x = torch.ones(m, 70, dtype=torch.bfloat16)
    out = op.dequantized_linear(x, weight.to(FP8), exponents, None, [1, 32])
    expected = (3.5 * torch.exp2(exponents[:, 0].double() - 127)).to(torch.bfloat16)
    torch.testing.assert_close(out.double(), expected.double().expand(m, 247), rtol=0, atol=1e-34)


def test_slices_and_layouts() -> None:
    weight, x = fp8(64, 96), torch.randn(2, 3, 40).bfloat16()
    scale = torch.rand(64, 1)
    for w, s in (
        (weight[8:40, 5:45], scale[8:40]),
        (weight[::2, :40], scale[::2]),
        (weight[:40, :].view(torch.uint8).t().contiguous().t().view(FP8)[:, :40], scale[:40]),
    ):
        expected, size = exact(x, w, s, [1, 40])
        check(op.dequantized_linear(x, w, s, None, [1, 40]), expected, size)
    assert op.dequantized_linear(x[0, 0], weight[:, :40], scale, None, [1, 40]).shape == (64,)


def test_one_scale_broadcasts_as_in_the_reference() -> None:
    x, weight = torch.randn(3, 64), fp8(32, 64)
    for scale in (torch.rand(1, 1), torch.rand(32, 1), torch.rand(1, 2)):
        out = op.dequantized_linear(x, weight, scale, None, [1, 32])
        check(out, *exact(x, weight, scale, [1, 32]))


def test_empty_sizes() -> None:
    bias = torch.randn(5)
    none = torch.ones(5, 0)
    assert torch.equal(op.dequantized_linear(torch.ones(2, 0), fp8(5, 0), none, bias, [1, 0]), bias.expand(2, 5))
    assert torch.equal(op.dequantized_linear(torch.ones(2, 0), fp8(5, 0), none, None, [1, 128]), torch.zeros(2, 5))
    assert op.dequantized_linear(torch.ones(2, 7), fp8(0, 7), torch.ones(0, 1), None, [1, 7]).shape == (2, 0)
    assert op.dequantized_linear(torch.ones(0, 4, 7), fp8(3, 7), torch.ones(3, 1), None, [1, 7]).shape == (0, 4, 3)


@pytest.mark.parametrize("m", [2, 30])
def test_not_a_number_stays_in_its_row(m: int) -> None:
    weight = fp8(9, 70)
    weight.view(torch.uint8)[4, 69] = 0xFF
    for dtype in (torch.bfloat16, torch.float32):
        out = op.dequantized_linear(torch.ones(m, 70, dtype=dtype), weight, torch.ones(9, 1), None, [1, 70])
        assert out.isnan().nonzero()[:, 1].unique().tolist() == [4]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("m", [1, 5, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_large_activations_with_small_scales(isa: str, m: int, dtype: torch.dtype) -> None:
    """Their products with FP8 values are beyond float32, with the scales applied they are not."""
    torch.ops.ctfp8_cpu.set_isa(isa)
    x = (torch.randn(m, 300) * 3e36).to(dtype)
    weight, bias = fp8(3, 20, 300), torch.randn(20) * 1e30
    for block in ([1, 300], [16, 128]):
        scale = scales(20, 300, block, 3) * 1e-4
        out, size = exact(x, weight[0], scale[0], block, bias)
        check(op.dequantized_linear(x, weight[0], scale[0], bias, block), out, size)
        ids = torch.randint(-3, 3, (m,))
        parts = [exact(x[i : i + 1], weight[j], scale[j], block) for i, j in enumerate(ids.tolist())]
        check(
            op.dequantized_gathered_mm(x, weight, scale, ids, block), *(torch.cat(p) for p in zip(*parts, strict=True))
        )


def test_scratch_of_a_large_call_is_given_back() -> None:
    weight, scale = fp8(8, 4096), torch.ones(8, 1)
    x = torch.ones(16384, 4096, dtype=torch.bfloat16)  # prepared, these take 134 MB

    def own() -> int:
        return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]

    op.dequantized_linear(x[:4], weight, scale, None, [1, 4096])
    before = own()
    op.dequantized_linear(x, weight, scale, None, [1, 4096])
    assert own() - before < 40e6


@pytest.mark.parametrize("isa", ISAS)
def test_threads_and_repeats_agree(isa: str) -> None:
    torch.ops.ctfp8_cpu.set_isa(isa)
    for m in (1, 7, 40):
        x, weight, scale = torch.randn(m, 1000).bfloat16(), fp8(300, 1000), scales(300, 1000, [128, 128])
        torch.set_num_threads(1)
        one = op.dequantized_linear(x, weight, scale, None, [128, 128])
        torch.set_num_threads(2)
        for _ in range(3):
            assert torch.equal(op.dequantized_linear(x, weight, scale, None, [128, 128]), one)


def test_threads_are_those_of_torch() -> None:
    for count in (1, 2):
        torch.set_num_threads(count)
        assert torch.ops.ctfp8_cpu.threads() == count


@pytest.mark.parametrize("m", [9, 16, 70, 130])
def test_brgemm(m: int) -> None:
    """torch's block multiplication, which takes over where the CPU has AMX, gives the same."""
    if not torch.ops.ctfp8_cpu.use_brgemm(True):
        pytest.skip("torch has no bfloat16 brgemm for this CPU")
    try:
        for n, k, block in ((100, 300, [1, 300]), (130, 257, [128, 128]), (48, 1024, [64, 128]), (7, 65, [3, 7])):
            x, weight, scale = torch.randn(m, k).bfloat16(), fp8(n, k), scales(n, k, block)
            check(op.dequantized_linear(x, weight, scale, None, block), *exact(x, weight, scale, block))
    finally:
        torch.ops.ctfp8_cpu.use_brgemm(False)


W, S, X = fp8(8, 16), torch.ones(8, 1), torch.ones(2, 16)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: op.dequantized_linear(X.double(), W, S, None, [1, 16]), "x must be bfloat16, float16 or float32"),
        (lambda: op.dequantized_linear(X[:, :8], W, S, None, [1, 16]), "last dimension of x must be 16"),
        (lambda: op.dequantized_linear(X, W.float(), S, None, [1, 16]), "weight must be float8_e4m3fn"),
        (lambda: op.dequantized_linear(X, W, S.half(), None, [1, 16]), "weight_scale must be float32"),
        (lambda: op.dequantized_linear(X, W, S[:5], None, [1, 16]), "weight_scale must be 8 x 1"),
        (lambda: op.dequantized_linear(X, W, S, torch.ones(3), [1, 16]), "bias must have 8 elements"),
        (lambda: op.dequantized_linear(X, W, S, None, [16]), "block must be two positive sizes"),
        (lambda: op.dequantized_linear(X, W[None], S, None, [1, 16]), "weight must have 2 dimensions"),
        (
            lambda: op.dequantized_gathered_mm(X, W[None], S[None], torch.tensor([0, 1]), [1, 16]),
            "ids must be from -1 to 0",
        ),
        (lambda: op.dequantized_gathered_mm(X, W[None], S[None], torch.tensor([0, -2]), [1, 16]), "row 1 has -2"),
        (
            lambda: op.dequantized_gathered_mm(X, W[None], S[None], torch.tensor([0]), [1, 16]),
            "expert of each of 2 rows",
        ),
        (lambda: op.dequantized_grouped_mm(X, W[None], S[None], torch.tensor([3]), [1, 16]), "offs must rise"),
        (
            lambda: op.dequantized_grouped_mm(X, W[None], S[None], torch.tensor([2.0]), [1, 16]),
            "vector of int32 or int64",
        ),
        (lambda: op.dequantize(W, S[None], None, [1, 16], "none", torch.float32), "leading dimensions"),
        (lambda: torch.ops.ctfp8_cpu.set_isa("mmx"), "choose one of"),
    ],
)
def test_sentences(call: object, sentence: str) -> None:
    with pytest.raises(RuntimeError, match=sentence):
        call()  # type: ignore[operator]


@pytest.mark.long
def test_no_access_outside_the_arrays(tmp_path: Path) -> None:
    """All kernels under AddressSanitizer and UndefinedBehaviorSanitizer, on arrays that end where their memory ends."""
    sources = Path(cpu_kernels.__file__).parent / "csrc"
    program = tmp_path / "kernels"
    flags = ["-std=c++20", "-O0", "-Wno-psabi", "-fsanitize=address,undefined", "-fno-sanitize=alignment",
             "-fno-sanitize-recover=undefined"]  # fmt: skip
    files = [Path(__file__).parents[1] / "asan" / "kernels.cpp", *sorted(sources.glob("isa_*.cpp"))]
    subprocess.run(["g++", *flags, f"-I{sources}", *map(str, files), "-o", str(program)], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    *found, cases = done.stdout.splitlines()
    assert found == ISAS
    assert int(cases.split()[0]) >= 4500 * len(ISAS)


def test_state() -> None:
    assert cpu_kernels.loaded()
    assert cpu_kernels.isa().split("+")[0] == ISAS[0]
    assert ISAS[-1] == "portable"
