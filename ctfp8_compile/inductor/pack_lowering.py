"""How Inductor reads parameters that are packed in memory (`packed`): as one tensor that begins where the first does."""

from __future__ import annotations

from typing import Any

import torch

from ..compat import ir, lowerings, register_lowering
from ..passes.horizontal_fusion import PACK

aten = torch.ops.aten


@register_lowering(PACK, type_promotion_kind=None)
def _pack(parts: Any) -> Any:
    inputs = [getattr(getattr(part, "data", None), "data", None) for part in parts]
    if not all(isinstance(i, ir.InputBuffer) and not isinstance(i, ir.ConstantBuffer) for i in inputs):
        return lowerings[aten.cat.default](parts, 0)  # frozen to constants, or copied: no longer parameters
    _, *inner = parts[0].get_size()
    return lowerings[aten.as_strided.default](
        parts[0], [sum(part.get_size()[0] for part in parts), *inner], list(parts[0].get_stride())
    )
