"""Weight-only matmuls as operators: on CUDA and XPU a Triton kernel, elsewhere the `dequantized_…` operator of the same meaning.

`weight_only_…` take what `dequantized_…` take (`ctfp8_compile.ops.operators`) and give the same, but scales are multiplied onto
the float32 accumulator, so the weight is not rounded to the activation's dtype. They are `torch.library.triton_op`s:
Inductor sees the kernel and launches it itself, `torch.export` keeps the operator.

Triton is imported when a kernel is launched, never before.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import wrap_triton

from ...compat import TRITON_LOGGER
from . import tiles

#: Kinds of device whose Triton backend runs the kernels.
GPUS = ("cuda", "xpu")
#: Rows of a gathered matmul among which a matrix is read once.
_WINDOW = 128


def missing(device: str) -> str | None:
    """The sentence why this machine's `device` cannot run the kernels, or None; an absent device is not asked."""
    backend = {"cuda": "nvidia", "xpu": "intel"}[device]
    if not getattr(torch, device).is_available():
        return None
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    if importlib.util.find_spec(f"triton.backends.{backend}") is None:
        return f"the Triton that is installed has no backend for {device}"
    return None


def _operator(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Defines `ctfp8::` + the function's name. torch warns if Triton is missing; here that matters at a launch only."""
    logger = logging.getLogger(TRITON_LOGGER)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return torch.library.triton_op(f"ctfp8::{fn.__name__}", fn, mutates_args=())
    finally:
        logger.setLevel(level)


@_operator
def weight_only_linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, block: Sequence[int]
) -> Tensor:
    """`x [..., K] @ dequantize(weight [N, K]).T + bias`."""
    if x.device.type not in GPUS:
        return torch.ops.ctfp8.dequantized_linear(x, weight, weight_scale, bias, block)
    return linear(x, weight, weight_scale, bias, block)


@_operator
def weight_only_grouped_mm(
    x: Tensor, weight: Tensor, weight_scale: Tensor, offs: Tensor, block: Sequence[int]
) -> Tensor:
    """Rows of `x [M, K]`, sorted by expert; those of expert e, which end at `offs[e]`, times `weight[e]`."""
    if x.device.type not in GPUS:
        return torch.ops.ctfp8.dequantized_grouped_mm(x, weight, weight_scale, offs, block)
    return grouped_mm(x, weight, weight_scale, offs, block)


@_operator
def weight_only_gathered_mm(
    x: Tensor, weight: Tensor, weight_scale: Tensor, ids: Tensor, block: Sequence[int]
) -> Tensor:
    """Row t of `x [T, K]` times `weight[ids[t]]`."""
    if x.device.type not in GPUS:
        return torch.ops.ctfp8.dequantized_gathered_mm(x, weight, weight_scale, ids, block)
    return gathered_mm(x, weight, weight_scale, ids, block)


#: By kind of matmul (`lowering.kernel.KINDS`), the operator for an unquantized activation and an FP8 weight on a GPU.
WEIGHT_ONLY = {
    "linear": torch.ops.ctfp8.weight_only_linear.default,
    "grouped_mm": torch.ops.ctfp8.weight_only_grouped_mm.default,
    "gathered_mm": torch.ops.ctfp8.weight_only_gathered_mm.default,
}


# ------------------------------------------------------------------------------------------------------------- launching


def linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, block: Sequence[int]) -> Tensor:
    """Launches the kernel on tensors of any device."""
    features, cols = weight.shape
    rows = x.reshape(-1, cols).contiguous()
    count = rows.shape[0]
    out = rows.new_empty((count, features))
    if not _empty(count, features):
        tile, options = _options(x, count, weight, block)
        grid = (_tiles(count, tile.rows) * _tiles(features, tile.outputs),)
        wrap_triton(_kernels().linear_kernel)[grid](
            rows, _fp8(weight), weight_scale.contiguous(), None if bias is None else bias.contiguous(), out,
            count, features, cols, weight_scale.shape[-1],
            GROUP=8, **options,
        )  # fmt: skip
    return out.view(*x.shape[:-1], features)


def grouped_mm(x: Tensor, weight: Tensor, weight_scale: Tensor, offs: Tensor, block: Sequence[int]) -> Tensor:
    """Launches the kernel on tensors of any device."""
    (experts, features, cols), count = weight.shape, x.shape[0]
    out = x.new_empty((count, features))
    if not _empty(count, features):
        tile, options = _options(x, _share(count, experts), weight, block, experts)
        slots = _tiles(count, tile.rows) + experts  # each expert may end in a tile that is not full
        slots = min(slots, count) if isinstance(count, int) else slots
        wrap_triton(_kernels().grouped_kernel)[(slots, _tiles(features, tile.outputs))](
            x.contiguous(), _fp8(weight), weight_scale.contiguous(), offs.contiguous(), out,
            count, features, cols, *weight_scale.shape[-2:], experts,
            EXPERTS=tiles.power_of_two(experts + 1), **options,
        )  # fmt: skip
    return out


def gathered_mm(x: Tensor, weight: Tensor, weight_scale: Tensor, ids: Tensor, block: Sequence[int]) -> Tensor:
    """Launches the kernel on tensors of any device."""
    (_, features, cols), count = weight.shape, x.shape[0]
    out = x.new_empty((count, features))
    if not _empty(count, features):
        tile, options = _options(x, 1, weight, block, count if isinstance(count, int) else 1)
        window = min(_WINDOW, max(16, tiles.power_of_two(count))) if isinstance(count, int) else _WINDOW
        wrap_triton(_kernels().gathered_kernel)[(count, _tiles(features, tile.outputs))](
            x.contiguous(), _fp8(weight), weight_scale.contiguous(), ids.contiguous(), out,
            count, features, cols, *weight_scale.shape[-2:],
            WINDOW=window, **options,
        )  # fmt: skip
    return out


def _kernels() -> Any:
    from . import kernels  # noqa: PLC0415 - Triton is optional

    return kernels


def _options(
    x: Tensor, rows: Any, weight: Tensor, block: Sequence[int], matrices: int = 1
) -> tuple[tiles.Tile, dict[str, Any]]:
    """The tile, and what every kernel is compiled for."""
    features, cols = weight.shape[-2:]
    block_cols = block[1] if block[1] < cols else 0
    tile = tiles.choose(rows, features, cols, block_cols, matrices, x.element_size(), _shared(x.device))
    even = cols % tile.cols == 0 and block_cols % tile.cols == 0 and cols % (block_cols or cols) == 0
    return tile, {
        "BLOCK_ROWS": min(block[0], features),
        "BLOCK_COLS": block_cols,
        "BM": tile.rows,
        "BN": tile.outputs,
        "BK": tile.cols,
        "SPLIT": tile.split,
        "EVEN": even,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def _shared(device: torch.device) -> int:
    """Kilobytes of shared memory that a program may have."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    return tiles.SHARED.get(capability, tiles.SHARED_BY_DEFAULT)


def _fp8(weight: Tensor) -> Tensor:
    """The weight's bytes: Triton has no e4m3 before sm89."""
    return weight.contiguous().view(torch.uint8)


def _share(count: Any, experts: int) -> Any:
    """The rows an expert gets if all get as many."""
    return -(-count // experts) if isinstance(count, int) else count


def _tiles(size: Any, step: int) -> Any:
    return (size + step - 1) // step


def _empty(*sizes: Any) -> bool:
    return any(isinstance(size, int) and size == 0 for size in sizes)
