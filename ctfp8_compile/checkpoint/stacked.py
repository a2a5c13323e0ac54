"""Experts one by one whose scales are stacked, as transformers' own `fp8` writer saves a MoE model.

    experts.0.gate_proj.weight  [I, H]       experts.gate_up_proj_scale_inv  [E, ceil(2I/128), ceil(H/128)], or [E, 1, 1] of both
    experts.0.up_proj.weight    [I, H]
    experts.0.down_proj.weight  [H, I]       experts.down_proj_scale_inv     [E, ceil(H/128), ceil(I/128)]

Each expert's weight gets a scale of its own: a view of the stack.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from ..counted import counted
from ..errors import CheckpointError
from .tensor_info import TensorInfo
from .view import View

_STACK = re.compile(r"(?P<experts>.*)\.(?P<leaf>gate_up_proj|gate_proj|up_proj|down_proj)_(?P<kind>\w+)$")
#: What a stack is of, by the rest of its name, and how the names of its parts end.
_KINDS = {
    "scale_inv": "weight_scale", "weight_scale_inv": "weight_scale", "scale": "weight_scale", "weight_scale": "weight_scale",
    "activation_scale": "input_scale", "input_scale": "input_scale",
}  # fmt: skip


def unstack(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The same tensors, in which a stack of scales is one view for each expert's weight.

    Raises:
        CheckpointError: the scales of gate and up cannot be told apart, or there are not as many as experts.
    """
    out: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        found = _STACK.match(name)
        parts = _parts(tensors, found, info) if found and found["kind"] in _KINDS else {}
        out |= parts or {name: info}
    return out


def _parts(tensors: Mapping[str, TensorInfo], found: re.Match[str], info: TensorInfo) -> dict[str, TensorInfo]:
    experts, leaf = found["experts"], found["leaf"]
    leaves = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
    if f"{experts}.{leaf}" in tensors or f"{experts}.0.{leaves[0]}.weight" not in tensors:
        return {}
    number = next(n for n in range(len(tensors)) if f"{experts}.{n}.{leaves[0]}.weight" not in tensors)
    if info.shape[:1] != (number,):
        raise CheckpointError(
            f"{info}: the scales of {counted(number, 'expert')} are stacked as [{number}, …] where they are not "
            "stored one by one. "
            "Quantize the checkpoint again."
        )
    out = {}
    for n in range(number):
        for i, part in enumerate(leaves):
            shape, rows = info.shape[1:], None
            if len(leaves) > 1 and len(shape) == 2 and shape[0] > 1:
                rows = _half(info, i, tensors[f"{experts}.{n}.{part}.weight"])
                shape = (rows[1] - rows[0], *shape[1:])
            view = View(n, rows, whole=info.shape)
            out[f"{experts}.{n}.{part}.{_KINDS[found['kind']]}"] = replace(info, shape=shape, view=view)
    return out


def _half(info: TensorInfo, which: int, weight: TensorInfo) -> tuple[int, int]:
    """The rows of gate's scales, or of up's."""
    rows = info.shape[1]
    if rows % 2 or (rows // 2 != 1 and weight.shape[0] % (rows // 2)):
        raise CheckpointError(
            f"{info}: a block of scales lies over the border between gate and up, whose weights are stored one by one, such as "
            f"{weight}. Quantize the checkpoint again with a block size that divides {weight.shape[0]}."
        )
    return which * rows // 2, (which + 1) * rows // 2
