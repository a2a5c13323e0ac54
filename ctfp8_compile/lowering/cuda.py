"""CUDA: activations are quantized, matmuls run on FP8 tensor cores.

| capability | linear | experts |
|---|---|---|
| sm90, sm100 | `_scaled_mm` for one scale each; fbgemm (MSLK where that is installed), rowwise or groupwise; else `_scaled_mm`, 128x128 blocks on sm90 | fbgemm's; on sm90 else `_scaled_grouped_mm` |
| sm89, sm103, sm110, sm120, sm121 | `_scaled_mm` | weight-only |
| sm80 | weight-only | weight-only |
| sm75 | weight-only for up to 16 rows in float16 | the same |
| earlier | dequantized | dequantized |

What no FP8 × FP8 kernel takes is for the weight-only kernel; and, on sm90, up to 8 rows of experts. Blocks are for `_scaled_mm`
where there are many rows, or nobody knows how many.
"""  # noqa: E501

from __future__ import annotations

from . import fbgemm, scaled_mm, weight_only
from .kernel import Kernel

_ONE_SCALE, _ROWWISE = scaled_mm.linear(fast_accum=True)

#: Best first, for most problems: see `Kernel.preferred`.
KERNELS: tuple[Kernel, ...] = (
    _ONE_SCALE,
    *fbgemm.kernels("fbgemm"),
    *fbgemm.kernels("mslk"),
    _ROWWISE,
    scaled_mm.BLOCKWISE,
    scaled_mm.MX,
    scaled_mm.GROUPED,
    weight_only.KERNEL,
)
