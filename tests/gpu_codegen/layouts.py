"""What each scaled matmul reads through raw pointers: shapes and strides of its operands, by kernel.

The CUDA kernels check some of this and assume the rest. Sources: the checks in torch's ScaledBlas.cpp, and in fbgemm's
quantize_ops.py how it lays out what it hands to its own kernels.
"""

from __future__ import annotations

from collections.abc import Callable

from harness import Launch, Operand


def check(launch: Launch, device: str) -> None:
    """Fails with the operand that is not as the kernel reads it."""
    _KERNELS[launch.name](launch, device)


def _is(launch: Launch, name: str, dtype: str, sizes: tuple[int, ...], strides: tuple[int, ...]) -> None:
    got = launch.operands[name]
    same = all(size == 1 or a == b for size, a, b in zip(sizes, got.strides, strides, strict=True))
    assert (got.dtype, got.sizes) == (dtype, sizes), f"{launch.name}: {name} is {got}, not {dtype}{list(sizes)}"
    assert same, f"{launch.name}: {name} is {got}, its strides should be {strides}"


def _row_major(sizes: tuple[int, ...]) -> tuple[int, ...]:
    strides = [1]
    for size in sizes[:0:-1]:
        strides.insert(0, strides[0] * size)
    return tuple(strides)


def _contiguous(launch: Launch, dtype: str, **operands: tuple[int, ...]) -> None:
    for name, sizes in operands.items():
        _is(launch, name, dtype, sizes, _row_major(sizes))


FP8 = "float8_e4m3fn"


def _rowwise(launch: Launch, device: str) -> None:
    (m, k), (n, _) = launch.operands["XQ"].sizes, launch.operands["WQ"].sizes
    _contiguous(launch, FP8, XQ=(m, k), WQ=(n, k))
    _contiguous(launch, "float32", x_scale=(m,), w_scale=(n,))
    if "bias" in launch.operands:
        _contiguous(launch, "bfloat16", bias=(n,))


def _groupwise(launch: Launch, device: str) -> None:
    (m, k), (n, _) = launch.operands["XQ"].sizes, launch.operands["WQ"].sizes
    assert m <= 16 or m % 4 == 0, f"{launch.name}: {m} rows, whose scales TMA cannot load"
    _contiguous(launch, FP8, XQ=(m, k), WQ=(n, k))
    _contiguous(launch, "float32", x_scale=(k // 128, m), w_scale=(k // 128, n // 128))


def _grouped_stacked(launch: Launch, device: str) -> None:
    (m, k), (e, n, _) = launch.operands["XQ"].sizes, launch.operands["WQ"].sizes
    _contiguous(launch, FP8, XQ=(m, k), WQ=(e, n, k))
    _contiguous(launch, "float32", x_scale=(m,), w_scale=(e, n))
    _contiguous(launch, "int64", M_sizes=(e,))


def _groupwise_grouped(launch: Launch, device: str) -> None:
    (m, k), (e, n, _) = launch.operands["XQ"].sizes, launch.operands["WQ"].sizes
    _contiguous(launch, FP8, XQ=(m, k), WQ=(e, n, k))
    _contiguous(launch, "float32", x_scale=(m, k // 128), w_scale=(e, k // 128, n // 128))
    _contiguous(launch, "int64", M_sizes=(e,))


def _scaled_mm(launch: Launch, device: str) -> None:
    (m, k), (_, n) = launch.operands["self"].sizes, launch.operands["mat2"].sizes
    _is(launch, "self", FP8, (m, k), (k, 1))
    _is(launch, "mat2", FP8, (k, n), (1, k))
    scale_a, scale_b = launch.operands["scale_a"], launch.operands["scale_b"]
    if _elements(scale_a) == _elements(scale_b) == 1 and n > 1:  # per tensor
        assert scale_a.dtype == scale_b.dtype == "float32"
    elif scale_b.sizes == (1, n):
        _is(launch, "scale_a", "float32", (m, 1), (1, 1))
        _is(launch, "scale_b", "float32", (1, n), (n, 1))
    elif scale_a.dtype == "float8_e8m0fnu":
        _contiguous(launch, scale_a.dtype, scale_a=(-(-m // 128) * 4 * k,), scale_b=(-(-n // 128) * 4 * k,))
    elif device == "xpu":  # oneDNN reads both by row; torch would copy others at each call
        _contiguous(launch, "float32", scale_a=(m, k // 128), scale_b=(k // 128, n // 128))
    else:
        assert m % 4 == 0, f"{launch.name}: {m} rows, whose scales cuBLAS cannot load"
        _is(launch, "scale_a", "float32", (m, k // 128), (1, m))
        _is(launch, "scale_b", "float32", (k // 128, n // 128), (1, k // 128))
    rowwise = scale_b.sizes == (1, n)
    fast = device == "cuda" and (rowwise or _elements(scale_b) == 1)
    assert launch.settings.get("use_fast_accum", False) is fast, f"{launch.name}: {launch.settings}"


def _scaled_grouped_mm(launch: Launch, device: str) -> None:
    (m, k), (e, _, n) = launch.operands["self"].sizes, launch.operands["mat2"].sizes
    _is(launch, "self", FP8, (m, k), (k, 1))
    _is(launch, "mat2", FP8, (e, k, n), (n * k, 1, k))
    _contiguous(launch, "float32", scale_a=(m,), scale_b=(e, n))
    _contiguous(launch, "int32", offs=(e,))


def _weight_only(launch: Launch, device: str) -> None:
    """Triton gets addresses: everything row-major, the weight's FP8 values as bytes. Operands come by position."""
    x, weight, scale, *extra, out = launch.operands.values()
    m, k, n = x.sizes[0], x.sizes[1], weight.sizes[-2]
    assert (weight.dtype, scale.dtype, out.dtype) == ("uint8", "float32", x.dtype), launch
    assert weight.sizes[-1] == k, launch
    assert scale.sizes[:-2] == weight.sizes[:-2], launch
    assert out.sizes == (m, n), launch
    if launch.name == "weight-only linear":
        assert [e.sizes for e in extra] in ([], [(n,)]), launch
    else:
        assert [e.sizes for e in extra] == [(m,) if "gathered" in launch.name else weight.sizes[:1]], launch
    for operand in launch.operands.values():
        assert operand.contiguous, launch


def _elements(operand: Operand) -> int:
    count = 1
    for size in operand.sizes:
        count *= size
    return count


_KERNELS: dict[str, Callable[[Launch, str], None]] = {
    "fbgemm.f8f8bf16_rowwise": _rowwise,
    "fbgemm.f8f8bf16_groupwise": _groupwise,
    "fbgemm.f8f8bf16_rowwise_grouped_stacked": _grouped_stacked,
    "fbgemm.f8f8bf16_groupwise_grouped": _groupwise_grouped,
    "aten._scaled_mm": _scaled_mm,
    "aten._scaled_grouped_mm": _scaled_grouped_mm,
    "weight-only linear": _weight_only,
    "weight-only grouped": _weight_only,
    "weight-only gathered": _weight_only,
}
