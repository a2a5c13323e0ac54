"""Quantization parameters in a file that no FP8 weight uses: those that change nothing are noted, others refused.

Tools leave behind what they calibrated with: scales of inputs that are quantized dynamically, zero points that are all zero, the
scale of a weight that was quantized and stored dequantized. None of that changes what the model computes. Zero points that
are not zero, or FP8 values kept as numbers beside a scale that was never applied, would.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import CheckpointError
from .files import FP8_DTYPE, SCALE_DTYPES, Checkpoint, TensorInfo, decode_scale, scale_name
from .notes import Notes


@dataclass(frozen=True)
class Leftovers:
    """Names, ours, of what was calibrated and is not part of a weight.

    Attributes:
        cache: scales of the KV cache and of attention, which say how a cache may be stored.
        unused: all others. They change nothing, and are saved as they were.
    """

    cache: tuple[str, ...]
    unused: tuple[str, ...]


def leftovers(
    tensors: Checkpoint, used: Collection[str], notes: Notes, needed: Callable[[str], bool] = lambda name: False
) -> Leftovers:
    """Finds them, and refuses those that say that the model computes something else.

    Args:
        used: names of the FP8 weights that are loaded, and of the scales they use.
        notes: what is superfluous is noted here.
        needed: whether the model has a parameter that a tensor of this name goes to.

    Raises:
        CheckpointError: leaving one out would change what the model computes, or its weight is missing.
    """
    cache = tuple(name for name in tensors if _CACHE_SCALE.search(name))
    unused = []
    for name in sorted(set(tensors) - set(used) - set(cache)):
        module, _, leaf = name.rpartition(".")
        if leaf not in _PARAMETERS:
            continue
        weight = tensors.get(f"{module}.weight")
        if weight is None and needed(f"{module}.weight"):
            raise CheckpointError(
                f"{tensors[name]}: {module}.weight, which it belongs to, is not in the checkpoint. Download it again."
            )
        if weight is None:
            notes.add("superfluous, there is no such weight", tensors[name].name)
        elif weight.dtype == FP8_DTYPE and weight.name not in used and f"{module}.weight" not in used:
            continue  # a layer the model leaves out, such as one for multi-token prediction
        else:
            _check(tensors, weight, name, leaf)
            what = "its scheme uses none" if weight.dtype == FP8_DTYPE else f"its weight is {weight.dtype} in the file"
            notes.add(f"superfluous, {what}", tensors[name].name)
        unused.append(name)
    return Leftovers(cache, tuple(unused))


def _check(tensors: Checkpoint, weight: TensorInfo, name: str, leaf: str) -> None:
    """Raises where a parameter beside a weight would change its value."""
    info = tensors[name]
    quantized = weight.dtype == FP8_DTYPE
    if leaf.endswith("_zero_point"):
        if _values(tensors, info).any():
            raise CheckpointError(
                f"{info}: zero points that are not zero, but quantization_config says that {weight.name} is symmetric. "
                "Correct it (symmetric: false), or quantize the checkpoint again."
            )
    elif leaf == "weight_global_scale" and quantized:
        if not (_values(tensors, info) == 1).all():
            raise CheckpointError(
                f"{info}: a second scale of {weight.name}, which FP8 weights do not have. Multiply it into the "
                "weight_scale and leave it out, or quantize the checkpoint again."
            )
    elif leaf == "weight_g_idx":
        raise CheckpointError(
            f"{info}: says that the columns of {weight.name} are in another order, which FP8 weights are not. Quantize the "
            "checkpoint again without actorder."
        )
    elif leaf == "weight_shape":
        if tuple(int(n) for n in tensors.read_stored(info).reshape(-1)) != weight.shape:
            raise CheckpointError(f"{info}: is not the shape of {weight}. Download both again.")
    elif leaf == "weight_scale" and weight.dtype in SCALE_DTYPES:
        _check_applied(tensors, weight, info)


def _check_applied(tensors: Checkpoint, weight: TensorInfo, scale: TensorInfo) -> None:
    """Refuses a plain weight whose numbers are FP8 values that its scale was not multiplied into yet."""
    first = tensors.read_rows(weight, 64).float()
    largest = float(decode_scale(tensors.read_stored(scale)).max()) if math.prod(scale.shape) else 0.0
    as_fp8 = first.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    if first.numel() and torch.equal(as_fp8, first) and float(first.abs().max()) > 2 * 448 * largest:
        raise CheckpointError(
            f"{weight}: its numbers are FP8 values, which {scale.name} was not multiplied into: the weight was cast, not "
            "dequantized. Download the file again, or store the weight as float8_e4m3fn."
        )


def _values(tensors: Checkpoint, info: TensorInfo) -> Tensor:
    stored = tensors.read_stored(info)
    return stored.float() if stored.is_floating_point() else stored


def used_names(weights: Iterable[str], inputs: Iterable[str]) -> set[str]:
    """What FP8 weights take from a file: themselves, their scales, and these scales of their inputs."""
    names = list(weights)
    return {*names, *map(scale_name, names), *inputs}


#: What compressed-tensors stores beside a weight.
_PARAMETERS = frozenset(
    [f"{of}_{what}" for of in ("weight", "input", "output") for what in ("scale", "zero_point", "global_scale")]
    + ["weight_g_idx", "weight_shape"]
)
_CACHE_SCALE = re.compile(r"\.([kvq]_scale|kv_scale|[kvq]_zero_point|kv_zero_point|[kv]_proj\.output_scale|[kv]_bias)$")
