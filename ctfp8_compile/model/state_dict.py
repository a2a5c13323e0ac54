"""Loading a state dict with FP8 weights into any nn.Module, without transformers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..checkpoint import files as ckpt
from ..checkpoint.layout import identity
from ..checkpoint.leftovers import leftovers, used_names
from ..checkpoint.notes import Notes
from ..checkpoint.packed import PackedWeight, find, seen_as_weights, sentence
from ..checkpoint.scheme import Schemes
from ..checkpoint.single_file import as_module, open_state_dict
from ..checkpoint.transforms import check_named, is_matrix, read_transforms
from ..errors import CheckpointError, UsageError
from . import rotation
from .freeze import freeze
from .parametrization import attach
from .plan import QuantizedParameter, plan, read_scales
from .stored import remember


def load_state_dict(
    module: nn.Module,
    state_dict: Mapping[str, Tensor] | str | Path,
    quantization_config: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Loads a state dict with FP8 weights into any nn.Module, without transformers.

    Args:
        module: its parameters may be on the meta device; names are those of the state dict, where a prefix such as
            `model.diffusion_model.` may stand before all of them. A parameter `p` that the state dict holds in
            float8_e4m3fn needs `p_scale` beside it (`weight` → `weight_scale`).
        state_dict: FP8 weights, scales, and everything else the module has; a dict, a safetensors file, or a folder of them.
            FP8 weights, which nothing can write to, stay where they are; everything else is copied.
        quantization_config: as in a checkpoint's `config.json`, of any format. None: a ComfyUI file says itself how its
            layers are stored; of others the shapes of scales say it (`weight_scale`, `scale_weight` or
            `weight_scale_inv`), and a warning what they said.

    Weights in other formats that compressed-tensors writes are dequantized; a warning says how many bytes that costs.

    Returns:
        `module`, in eval mode, its quantized parameters still float8_e4m3fn. They dequantize to the dtype the module's
        parameter had. `ctfp8.state_dict(module)` gives the tensors back as they were.

    Raises:
        CheckpointError: a parameter or scale is missing, left over, of the wrong shape or value.
        SchemeError: the config, or the file, does not cover an FP8 weight, or is of no format we know.
    """
    own = module.state_dict()
    notes = Notes()
    source = as_module(open_state_dict(state_dict), own, quantization_config, notes)
    schemes = source.schemes
    schemes.embeddings |= {name for name, part in module.named_modules() if isinstance(part, nn.Embedding)}
    packed = find(source.tensors, schemes)
    tensors = seen_as_weights(source.tensors, packed)
    plans = _plans(module, own, tensors, schemes, notes)
    inputs = [ckpt.input_scale_name(name) for info in plans.values() for name in info.input_scales]
    used = {*own, *used_names(plans, inputs), *(name for name in tensors if is_matrix(name, tensors))}
    transforms = read_transforms(schemes.format.config)
    check_named(tensors, transforms)
    placed = rotation.place(module, transforms, tensors, [(name, name) for name, _ in module.named_modules() if name])
    extra = sorted(set(tensors) - used - set(leftovers(tensors, used, notes).unused))
    if extra:
        raise CheckpointError(
            f"{tensors[extra[0]].name}: in the state dict, but the module has no such parameter ({len(extra)} in all)."
        )
    if packed:
        warnings.warn(f"{sentence(packed.values(), own[next(iter(packed))].dtype)}.", stacklevel=2)
    notes.say()
    scales = {name: read_scales(tensors, info) for name, info in plans.items()}
    matrices = rotation.read(tensors, placed)
    _fill(module, own, tensors, plans, packed)
    for name, info in plans.items():
        path, _, leaf = name.rpartition(".")
        attach(module.get_submodule(path), leaf, info, *scales[name])
    rotation.attach(module, placed, matrices)
    freeze(module)
    remember(module, source, own, plans, packed)
    return module


def _plans(
    module: nn.Module, own: Mapping[str, Tensor], tensors: ckpt.Checkpoint, schemes: Schemes, notes: Notes
) -> dict[str, QuantizedParameter]:
    """How each FP8 parameter is quantized.

    Raises:
        CheckpointError: the state dict lacks a tensor of the module, or has it in another shape or kind.
        UsageError: the module is of a dtype that nothing is computed in.
    """
    buffers = {name for name, _ in module.named_buffers()}
    plans: dict[str, QuantizedParameter] = {}
    for name, parameter in own.items():
        if name not in tensors:
            raise CheckpointError(f"{name}: the module needs it, the state dict lacks it.")
        if tuple(parameter.shape) != tensors[name].shape:
            raise CheckpointError(_other_shape(tensors[name], parameter))
        if not parameter.is_floating_point():
            ckpt.check_dtype(tensors[name], parameter.dtype)  # counters, masks, indices
            continue
        if parameter.dtype.itemsize == 1:
            raise UsageError(
                f"{name}: the module declares it as {str(parameter.dtype).removeprefix('torch.')}, which nothing is computed in. "
                "Build the module in bfloat16, float16 or float32: FP8 weights stay as they are in the file whatever it declares."
            )
        ckpt.check_weight(tensors[name])
        if tensors[name].dtype == ckpt.FP8_DTYPE:
            if len(tensors[name].shape) < 2 or name in buffers:
                raise CheckpointError(
                    f"{tensors[name]}: FP8 in the file, but the module has no weight matrix of this name. Store its value: "
                    "x.float(), times its scale if it has one."
                )
            if len(tensors[name].shape) > 3:
                raise CheckpointError(
                    f"{tensors[name]}: an FP8 weight of more than three dimensions, as convolutions have, is not read. "
                    "Multiply it by its scale, and store that without a scale."
                )
            plans[name] = plan(tensors, schemes, identity(name, tensors[name].shape), parameter.dtype, notes)
    return plans


def _fill(
    module: nn.Module,
    own: Mapping[str, Tensor],
    tensors: ckpt.Checkpoint,
    plans: Mapping[str, QuantizedParameter],
    packed: Mapping[str, PackedWeight],
) -> None:
    """Puts the tensors into the module: FP8 values as they are, all others in the dtype that the module's had."""
    buffers = {name for name, _ in module.named_buffers()}
    for name in own:
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        if name in packed:
            parts = {leaf: tensors.value(part) for leaf, part in packed[name].parts.items()}
            value = packed[name].dequantize(parts, own[name].dtype)
        else:
            value = tensors.read_stored(tensors[name]).detach()
        if name not in plans:
            value = value.to(own[name].dtype, copy=name not in packed)
        if name in buffers:
            owner._buffers[leaf] = value
        else:
            owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)


def _other_shape(info: ckpt.TensorInfo, parameter: Tensor) -> str:
    """Some writers pad a weight's rows to whole blocks: then its first ones are the module's."""
    shape = tuple(parameter.shape)
    padded = shape[:1] < info.shape[:1] and shape[1:] == info.shape[1:]
    part = f", or, if the file only pads it, cut it: weight[:{shape[0]}]" if shape and padded else ""
    return f"{info}: the module declares {list(parameter.shape)}. Build the module with the file's sizes{part}."
