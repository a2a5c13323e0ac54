"""One linear with an FP8 weight, the float64 model of a quantized activation, and scaled matmuls that run on the CPU."""

from __future__ import annotations

import warnings

import torch
from conftest import fp8_config, quantize
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import ctfp8_compile as ctfp8

_library = torch.library.Library("aten", "IMPL")


def _grouped_on_cpu(
    x, w, scale_a, scale_b, offs=None, bias=None, scale_result=None, out_dtype=None, use_fast_accum=False
):
    assert w.stride(-2) == 1, "the weight must be column-major"
    assert scale_a.shape == (x.shape[0],)
    assert scale_b.shape == (w.shape[0], w.shape[2])
    return torch.ops.ctfp8.scaled_grouped_mm(
        x, w.transpose(-2, -1), scale_a[:, None], scale_b[:, :, None], offs, [1, x.shape[1]], out_dtype
    )


def _rows_on_cpu(x, w, scale_a, scale_b, bias=None, scale_result=None, out_dtype=None, use_fast_accum=False):
    return torch.ops.ctfp8.scaled_mm(x, w.t(), scale_a, scale_b.t(), bias, [1, x.shape[1]], out_dtype)


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    _library.impl("_scaled_grouped_mm", _grouped_on_cpu, "CPU")
    if torch.__version__ < (2, 12):  # torch's own CPU kernel has no scales per row
        _library.impl("_scaled_mm", _rows_on_cpu, "CPU")


class BlockwiseOnCpu(TorchDispatchMode):
    """torch's CPU `_scaled_mm` has no blocks: theirs are multiplied here, their layouts held to what the device's checks ask.

    On CUDA scales lie by column, and rows come in fours; on XPU both lie by row, which oneDNN would copy them to.
    """

    calls = 0

    def __init__(self, device: str = "cuda"):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op is not torch.ops.aten._scaled_mm.default or args[2].shape[1] == 1:
            return op(*args, **(kwargs or {}))
        x, w, scale_a, scale_b, bias, _, out_dtype = args[:7]  # use_fast_accum: False is its default, and left out
        (m, k), n = x.shape, w.shape[1]
        assert w.stride() == (1, k)
        if self.device == "xpu":
            assert (scale_a.shape, scale_a.is_contiguous()) == ((m, k // 128), True)
            assert scale_b.shape in ((k // 128, n // 128), (k // 128, n))
            assert scale_b.is_contiguous()
        else:
            assert m % 4 == 0
            assert (scale_a.shape, scale_a.stride()) == ((m, k // 128), (1, m))
            assert (scale_b.shape, scale_b.stride()) == ((k // 128, n // 128), (1, -(k // 128 // -4) * 4))
        self.calls += 1
        block = [n // scale_b.shape[1], 128]
        return torch.ops.ctfp8.scaled_mm(x, w.t(), scale_a, scale_b.t(), bias, block, out_dtype)


class MxOnCpu(TorchDispatchMode):
    """The same for MXFP8: scales are put back in order, by the formula of where Blackwell's tensor cores look for each."""

    calls = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op is not torch.ops.aten._scaled_mm.default or args[2].dtype != torch.float8_e8m0fnu:
            return op(*args, **(kwargs or {}))
        x, w, scale_a, scale_b, bias, _, out_dtype = args[:7]
        (m, k), n = x.shape, w.shape[1]
        assert w.stride() == (1, k)
        self.calls += 1
        scales = (_in_order(s, rows, k // 32) for s, rows in ((scale_a, m), (scale_b, n)))
        return torch.ops.ctfp8.scaled_mm(x, w.t(), *scales, bias, [1, 32], out_dtype)


def _in_order(scale, rows, cols):
    tiles = -(-rows // 128), -(-cols // 4)
    assert scale.dtype == torch.float8_e8m0fnu
    assert scale.is_contiguous()
    assert scale.numel() == tiles[0] * tiles[1] * 512
    r, c = torch.arange(rows)[:, None], torch.arange(cols)
    at = (r // 128 * tiles[1] + c // 4) * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4
    return scale.view(torch.uint8).reshape(-1)[at]


#: aten._scaled_mm on sm89 needs torch 2.12 or later.
SM89 = "cuda:sm120" if torch.__version__ < (2, 12) else "cuda:sm89"


def fp8_round(x):
    """Round to nearest even to e4m3, by arithmetic in float64: 3 bits of mantissa, exponents from -6, steps of 2^-9 below."""
    x = x.double().clamp(-448, 448)
    exponent = torch.floor(torch.log2(x.abs().clamp(min=2.0**-30))).clamp(min=-6)
    step = torch.exp2(exponent - 3)
    return torch.round(x / step) * step


def quantized_activation(x, activation, input_scale=None):
    """The float64 value that an activation has after its quantization."""
    x = x.double()
    if activation is None:
        return x
    if activation == "token":
        scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 448
    elif activation == "tensor":
        scale = input_scale.double()
    elif activation == "mx":
        groups = x.unflatten(-1, (-1, 32))
        amax = groups.abs().amax(-1, keepdim=True).clamp(min=2.0**-118)
        power = torch.exp2(torch.floor(torch.log2(amax)))
        scale = (torch.where(amax >= 1.75 * power, 2 * power, power) / 256).expand_as(groups).flatten(-2)
    elif activation == "tensor_dynamic":
        scale = x.abs().amax().clamp(min=1e-12) / 448
    else:
        groups = x.unflatten(-1, (-1, 128))
        scale = (groups.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 448).expand_as(groups).flatten(-2)
    # scales are float32, and so is the quotient that is rounded
    quotient = (x.float() / scale.float()).double()
    return fp8_round(quotient) * scale.float().double()


class Layer(nn.Module):
    def __init__(self, n, k, bias=False):
        super().__init__()
        self.a = nn.Linear(k, n, bias=bias)

    def forward(self, x):
        return self.a(x)


def layer(n, k, dtype, strategy="channel", activation="token", bias=False, block=(128, 128)):
    torch.manual_seed(0)
    weight, scale = quantize(torch.randn(n, k) * 0.1, strategy, block)
    state = {"a.weight": weight, "a.weight_scale": scale}
    if activation == "tensor":
        state["a.input_scale"] = torch.tensor([0.02])
    if bias:
        state["a.bias"] = torch.randn(n, dtype=dtype)
    config = fp8_config(strategy, activation, block)
    return ctfp8.load_state_dict(Layer(n, k, bias).to(dtype), state, config), state
