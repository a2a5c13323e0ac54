"""The quantization config of a state dict that came without one, from the shapes of its scales."""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from ..errors import SchemeError
from . import formats
from .files import EXPONENT_DTYPES, FP8_DTYPE, Checkpoint, TensorInfo, input_scale_name, scale_name

#: How such files spell scales: as compressed-tensors, as `fp8` checkpoints, or the other way round.
SPELLED = formats.Format(
    "",
    {},
    {
        ".scale_weight": ".weight_scale",
        ".scale_input": ".input_scale",
        "_scale_inv": "_scale",
        ".activation_scale": ".input_scale",
    },
)


def infer(tensors: Checkpoint) -> Mapping[str, Any]:
    """A config that covers every FP8 weight; a warning says what was found.

    Activations are quantized where there is a static scale for them, and nowhere else: nothing says that they are.

    Raises:
        SchemeError: a scale has a shape that says nothing.
    """
    groups: dict[tuple[tuple[str, Any], ...], list[str]] = defaultdict(list)
    for name, info in tensors.items():
        if info.dtype == FP8_DTYPE and (scale := tensors.get(scale_name(name))) is not None:
            words = _words(info, scale)
            words["activation"] = "tensor" if input_scale_name(name) in tensors else "none"
            groups[tuple(words.items())].append(name.removesuffix(".weight"))
    if not groups:
        raise SchemeError(
            "the state dict has no FP8 weight with a scale of its name beside it (weight_scale, scale_weight, "
            "weight_scale_inv). Pass the quantization_config it was made with."
        )
    most = max(groups.values(), key=len)
    config: dict[str, Any] = {}
    for number, (key, names) in enumerate(groups.items()):
        words = dict(key)
        activation = words.pop("activation")
        targets = ["Linear"] if names is most else names
        config[f"group_{number}"] = formats.group(targets, formats.fp8_weights(**words), activation)
    said = "; ".join(
        f"{len(names)} weights, such as {names[0]}: " + ", ".join(f"{k} {v}" for k, v in key)
        for key, names in groups.items()
    )
    warnings.warn(
        f"no quantization_config was given; the shapes of scales say: {said}. Pass one if activations are to be quantized "
        "in another way.",
        stacklevel=3,
    )
    return formats.config_of_groups(config, [])


def _words(weight: TensorInfo, scale: TensorInfo) -> dict[str, Any]:
    """Strategy and size, in compressed-tensors' words."""
    lead, (rows, cols) = weight.shape[:-2], weight.shape[-2:]
    found = scale.shape[len(lead) :] if scale.shape[: len(lead)] == lead else scale.shape
    if math.prod(scale.shape) == 1 or math.prod(found) == 1:
        return {"strategy": "tensor"}
    if found in ((rows,), (rows, 1)):
        return {"strategy": "channel"}
    if scale.dtype in EXPONENT_DTYPES and found == (rows, math.ceil(cols / 32)):
        return {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
    if found == (math.ceil(rows / 128), math.ceil(cols / 128)):
        return {"strategy": "block", "block_structure": (128, 128)}
    if len(found) == 2 and found[0] == rows and found[1] > 1 and cols % found[1] == 0:
        return {"strategy": "group", "group_size": cols // found[1]}
    raise SchemeError(
        f"{scale}: its shape does not say how {weight} is quantized. Pass the quantization_config it was made with."
    )
