"""What we cast to FP8 fits before the cast: torch 2.12 and later saturate on CPUs, releases before give NaN."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from ctfp8_compile.ops import fp8

FP8 = torch.float8_e4m3fn
#: Each way to quantize, of `[4, 64]` numbers: with scales of the checkpoint, which numbers may exceed, and with their own.
STATIC: dict[str, Any] = {
    "a static scale": lambda do, x: fp8.quantize_per_tensor_steps(do, x, torch.tensor([[0.5]])),
    "a static scale a row": lambda do, x: fp8.quantize_per_tensor_steps(do, x, torch.full((4, 1), 0.5)),
    "a cache with a scale": lambda do, x: fp8.quantize_cached_steps(do, x.view(1, 1, 4, 64), torch.tensor([0.5])),
    "a bound": lambda do, x: fp8.quantize_per_token_steps(do, x, 224.0),
}
DYNAMIC: dict[str, Any] = {
    "per token": fp8.quantize_per_token_steps,
    "per tensor": lambda do, x: fp8.quantize_per_tensor_steps(do, x, None),
    "per group": lambda do, x: fp8.quantize_per_group_steps(do, x, 64, 32),
    "powers of two": lambda do, x: fp8.quantize_mx_steps(do, x, 64),
    "a cache with a scale a token": lambda do, x: fp8.quantize_cached_steps(do, x.view(1, 1, 4, 64), None),
}
LARGE = [448.0, 464.0, 464.5, 480.0, 1e6, 3e38, -465.0, -3e38]


def _casts(way: Any, x: torch.Tensor) -> list[torch.Tensor]:
    """Runs the steps, and gives what each cast to FP8 was given; the casts saturate in no release."""
    given: list[torch.Tensor] = []

    def do(op: Any, *args: Any, **kwargs: Any) -> Any:
        if op is torch.ops.prims.convert_element_type.default and args[1] == FP8:
            given.append(args[0])
        return op(*args, **kwargs)

    way(do, x)
    return given


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", [*STATIC, *DYNAMIC])
def test_no_number_beyond_448_is_cast(way, dtype):
    torch.manual_seed(0)
    x = torch.randn(4, 64)
    x[0, : len(LARGE)] = torch.tensor(LARGE)
    x[2, 5] = -1e4
    if way in STATIC:
        x[3, 1], x[3, 2] = math.inf, -math.inf
    (cast,) = _casts((STATIC | DYNAMIC)[way], x.to(dtype))
    assert cast.abs().max() <= 448
    assert not cast.isnan().any()


@pytest.mark.parametrize("way", [way for way in STATIC if way != "a bound"])
def test_numbers_too_large_become_448_and_nan_stays_nan(way):
    x = torch.tensor([*LARGE, math.inf, -math.inf, math.nan]).repeat(32)[: 4 * 64].view(4, 64)
    (cast,) = _casts(STATIC[way], x)
    got, want = cast.to(FP8).float().view(4, 64), (x.double() / 0.5).clamp(-448, 448).float()
    assert torch.equal(got.isnan(), x.isnan())
    assert torch.equal(got.nan_to_num(), want.nan_to_num())
