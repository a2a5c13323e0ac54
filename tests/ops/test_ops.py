"""Arithmetic: bit-exact with compressed-tensors, close to float64, and metas that agree with implementations."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize as ct_dequantize
from conftest import quantize, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

from ctfp8_compile import ops


def _dequantize(weight, scale, block, dtype):
    return torch.ops.ctfp8.dequantize(weight, scale, None, block, "token", dtype)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 300),
    cols=st.integers(1, 300),
    strategy=st.sampled_from(["tensor", "channel", "block"]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
)
def test_dequantize_is_bit_exact_with_compressed_tensors(rows, cols, strategy, dtype):
    weight, scale = quantize(torch.randn(rows, cols), strategy)
    args = QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy=strategy,
                            block_structure=[128, 128] if strategy == "block" else None)  # fmt: skip
    want = ct_dequantize(weight.float(), scale, args=args, dtype=torch.float32).to(dtype)
    block = [128, 128] if strategy == "block" else [1, cols]
    ours = scale if strategy == "block" else scale.reshape(-1, 1).expand(rows, 1).contiguous()
    assert torch.equal(_dequantize(weight, ours, block, dtype), want)


def test_every_fp8_code():
    fp8 = torch.arange(256, dtype=torch.uint8).view(ops.FP8).view(2, 128)
    out = _dequantize(fp8, torch.ones(2, 1), [1, 128], torch.float32)
    sign, exponent, mantissa = (torch.arange(256) >> 7), (torch.arange(256) >> 3) & 15, torch.arange(256) & 7
    value = torch.where(exponent > 0, (1 + mantissa / 8) * 2.0 ** (exponent - 7), mantissa / 8 * 2.0**-6)
    want = torch.where(sign > 0, -value, value).view(2, 128)
    want.view(-1)[[127, 255]] = float("nan")
    assert torch.equal(out.isnan(), want.isnan())
    assert torch.equal(out.nan_to_num(), want.nan_to_num())


@pytest.mark.parametrize("shape", [(5000, 1100), (3, 1500, 1100)])
@pytest.mark.parametrize("block", [[1, 1100], [128, 128], [64, 128]])
def test_chunked_dequantize_equals_the_reference(shape, block):
    rows = shape[-2]
    weight = torch.randn(shape).to(ops.FP8)
    scale = torch.rand(*shape[:-2], -(-rows // block[0]), -(-shape[-1] // block[1])) + 0.1
    got = _dequantize(weight, scale, block, torch.bfloat16)
    assert torch.equal(got, ops.dequantize_reference(weight, scale, block, torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("strategy", ["tensor", "channel", "block"])
def test_matmuls_against_float64(strategy, dtype):
    torch.manual_seed(0)
    weight, scale = quantize(torch.randn(3 * 96, 160) * 0.1, strategy)
    scale = scale if strategy == "block" else scale.reshape(-1, 1).expand(288, 1).contiguous()
    block = [128, 128] if strategy == "block" else [1, 160]
    x = torch.randn(2, 7, 160).to(dtype)
    bias = torch.randn(288).to(dtype)
    want = x.double() @ ops.dequantize_reference(weight, scale, block, torch.float64).t() + bias.double()
    got = torch.ops.ctfp8.dequantized_linear(x, weight, scale, bias, block)
    assert got.dtype == dtype
    plain = torch.nn.functional.linear(x, ops.dequantize_reference(weight, scale, block, dtype), bias)
    assert relative_error(got, want) <= 1.05 * relative_error(plain, want) + 1e-7


def _experts(experts=4, n=48, k=64):
    torch.manual_seed(0)
    weight = (torch.randn(experts, n, k)).to(ops.FP8)
    scale = torch.rand(experts, n, 1) * 0.01 + 0.001
    wide = ops.dequantize_reference(weight, scale, [1, k], torch.float64)
    return weight, scale, wide


def test_grouped_with_empty_groups():
    weight, scale, wide = _experts()
    x, offs = torch.randn(9, 64), torch.tensor([3, 3, 8, 9], dtype=torch.int32)
    got = torch.ops.ctfp8.dequantized_grouped_mm(x, weight, scale, offs, [1, 64])
    expert = torch.tensor([0, 0, 0, 2, 2, 2, 2, 2, 3])
    assert relative_error(got, torch.einsum("mk,mnk->mn", x.double(), wide[expert])) < 1e-6


def test_gathered():
    weight, scale, wide = _experts()
    x, ids = torch.randn(5, 64), torch.tensor([3, 0, 0, 2, 3])
    got = torch.ops.ctfp8.dequantized_gathered_mm(x, weight, scale, ids, [1, 64])
    assert relative_error(got, torch.einsum("mk,mnk->mn", x.double(), wide[ids])) < 1e-6


def test_metas_agree_with_implementations():
    weight, scale, _ = _experts()
    block = [1, 64]
    x, offs, ids = (
        torch.randn(9, 64),
        torch.tensor([3, 3, 8, 9], dtype=torch.int32),
        torch.tensor([3, 0, 0, 2, 3, 1, 1, 1, 0]),
    )
    tests = ("test_faketensor",)  # test_schema multiplies its inputs, which torch has no FP8 kernel for
    for op, args in [
        (torch.ops.ctfp8.dequantize.default, (weight, scale, None, block, "token", torch.bfloat16)),
        (torch.ops.ctfp8.dequantized_linear.default, (x, weight[0], scale[0], torch.randn(48), block)),
        (torch.ops.ctfp8.dequantized_grouped_mm.default, (x, weight, scale, offs, block)),
        (torch.ops.ctfp8.dequantized_gathered_mm.default, (x, weight, scale, ids, block)),
    ]:
        result = torch.library.opcheck(op, args, test_utils=tests)
        assert set(result.values()) == {"SUCCESS"}
