"""The quantization config of a state dict that came without one, from the shapes of its scales."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from ..counted import such_as
from ..errors import CheckpointError, SchemeError
from . import formats
from .files import FP8_DTYPE, Checkpoint, TensorInfo, input_scale_name, scale_name
from .formats.comfyui import Layer
from .resolve import by_shape

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


def inferred(tensors: Checkpoint) -> Mapping[str, Any] | None:
    """What `infer` says of files that came without a config; None where no FP8 weight has a scale."""
    beside = (scale_name(name) in tensors for name, info in tensors.items() if info.dtype == FP8_DTYPE)
    return infer(tensors) if any(beside) else None


def infer(tensors: Checkpoint, layers: Mapping[str, Layer] | None = None, said: bool = False) -> Mapping[str, Any]:
    """A config that covers every FP8 weight. Unless the file `said` so itself, a warning says what was found.

    Activations are quantized where there is a static scale for them, and nowhere else: nothing says that they are.

    Args:
        layers: of a ComfyUI file, by module, what it says.

    Raises:
        SchemeError: a scale has a shape that says nothing.
    """
    groups: dict[tuple[tuple[str, Any], ...], list[str]] = defaultdict(list)
    for name, info in tensors.items():
        if info.dtype == FP8_DTYPE and (scale := tensors.get(scale_name(name))) is not None:
            words = _words(info, scale)
            layer = (layers or {}).get(name.removesuffix(".weight"), Layer())
            static = "tensor" if input_scale_name(name) in tensors else "none"
            words["activation"] = "none" if layer.full_precision else "mx" if layer.tiled else static
            groups[tuple(words.items())].append(name.removesuffix(".weight"))
    if not groups:
        raise SchemeError(
            "the state dict has no FP8 weight with a scale of its name beside it (weight_scale, scale_weight, "
            "weight_scale_inv). Pass the quantization_config it was made with; if its weights were cast to FP8 as they are, put "
            "a weight_scale of torch.ones(()) beside each."
        )
    most = max(groups.values(), key=len)
    config: dict[str, Any] = {}
    for number, (key, names) in enumerate(groups.items()):
        words = dict(key)
        activation = words.pop("activation")
        targets = ["Linear"] if names is most else names
        config[f"group_{number}"] = formats.group(targets, formats.fp8_weights(**words), activation)
    if said:
        return formats.config_of_groups(config, [])
    shapes = "; ".join(
        f"{such_as(len(names), 'weight', names[0]).removesuffix(',')}: " + ", ".join(f"{k} {v}" for k, v in key)
        for key, names in groups.items()
    )
    warnings.warn(
        f"no quantization_config was given; the shapes of scales say: {shapes}. Pass one if activations are to be quantized "
        "in another way.",
        stacklevel=3,
    )
    return formats.config_of_groups(config, [])


def _words(weight: TensorInfo, scale: TensorInfo) -> dict[str, Any]:
    """Strategy and size, in compressed-tensors' words."""
    try:
        scheme = by_shape(weight, scale)
    except CheckpointError as error:
        raise SchemeError(
            f"{scale}: its shape does not say how {weight} is quantized. Pass the quantization_config it was made with."
        ) from error
    words: dict[str, Any] = {"strategy": scheme.strategy}
    if scheme.strategy == "group":
        words["group_size"] = scheme.block[1]
    elif scheme.strategy == "block":
        words["block_structure"] = scheme.block
    return words | ({"scale_dtype": "torch.uint8"} if scheme.exponents else {})
