"""Loading a state dict with FP8 weights into any nn.Module, without transformers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..checkpoint import files as ckpt
from ..checkpoint.inferred import SPELLED, infer
from ..checkpoint.layout import identity
from ..checkpoint.leftovers import leftovers, used_names
from ..checkpoint.notes import Notes
from ..checkpoint.packed import find, seen_as_weights, sentence
from ..checkpoint.scheme import Schemes
from ..checkpoint.transforms import check_named, is_matrix, read_transforms
from ..errors import CheckpointError
from . import rotation
from .freeze import freeze
from .parametrization import attach
from .plan import QuantizedParameter, plan, read_scales

_MARKER = "scaled_fp8"  #: an empty tensor by which files with `scale_weight` say what they are


def load_state_dict(
    module: nn.Module, state_dict: Mapping[str, Tensor], quantization_config: Mapping[str, Any] | None
) -> nn.Module:
    """Loads a state dict with FP8 weights into any nn.Module, without transformers.

    Args:
        module: its parameters may be on the meta device; names are those of the state dict. A parameter `p` that the
            state dict holds in float8_e4m3fn needs `p_scale` beside it (`weight` → `weight_scale`).
        state_dict: FP8 weights, scales, and everything else the module has. FP8 weights, which nothing can write to, stay
            where they are; everything else is copied.
        quantization_config: as in a checkpoint's `config.json`, of any format. None: the shapes of scales say how weights
            are quantized (`weight_scale`, `scale_weight` or `weight_scale_inv`), and a warning what they said.

    Weights in other formats that compressed-tensors writes are dequantized; a warning says how many bytes that costs.

    Returns:
        `module`, in eval mode, its quantized parameters still float8_e4m3fn. They dequantize to the dtype the module's
        parameter had.

    Raises:
        CheckpointError: a parameter or scale is missing, left over, of the wrong shape or value.
        SchemeError: the config does not cover an FP8 weight, or is of no format we know.
    """
    tensors: ckpt.Checkpoint
    if quantization_config is None:
        tensors = ckpt.InMemory({k: v for k, v in state_dict.items() if k != _MARKER}, SPELLED)
        schemes = Schemes(infer(tensors))
    else:
        schemes = Schemes(quantization_config)
        tensors = ckpt.InMemory(state_dict, schemes.format)
    schemes.embeddings |= {name for name, part in module.named_modules() if isinstance(part, nn.Embedding)}
    packed = find(tensors, schemes)
    tensors = seen_as_weights(tensors, packed)
    own = module.state_dict()
    buffers = {name for name, _ in module.named_buffers()}
    plans: dict[str, QuantizedParameter] = {}
    notes = Notes()
    used: set[str] = set()
    for name, parameter in own.items():
        if name not in tensors:
            raise CheckpointError(f"{name}: the module needs it, the state dict lacks it.")
        used.add(name)
        if tuple(parameter.shape) != tensors[name].shape:
            raise CheckpointError(f"{tensors[name]}: the module declares {list(parameter.shape)}.")
        if not parameter.is_floating_point():
            ckpt.check_dtype(tensors[name], parameter.dtype)  # counters, masks, indices
            continue
        ckpt.check_weight(tensors[name])
        if tensors[name].dtype == ckpt.FP8_DTYPE:
            if len(tensors[name].shape) < 2 or name in buffers:
                raise CheckpointError(
                    f"{tensors[name]}: FP8 in the file, but the module has no weight matrix of this name."
                )
            plans[name] = plan(tensors, schemes, identity(name, tensors[name].shape), parameter.dtype, notes)
            used |= used_names([name], map(ckpt.input_scale_name, plans[name].input_scales))
    transforms = read_transforms(schemes.format.config)
    check_named(tensors, transforms)
    placed = rotation.place(module, transforms, tensors, [(name, name) for name, _ in module.named_modules() if name])
    used |= {name for name in tensors if is_matrix(name, tensors)}
    extra = sorted(set(tensors) - used - set(leftovers(tensors, used, notes).unused))
    if extra:
        raise CheckpointError(
            f"{extra[0]}: in the state dict, but the module has no such parameter ({len(extra)} in all)."
        )
    if packed:
        warnings.warn(f"{sentence(packed.values(), own[next(iter(packed))].dtype)}.", stacklevel=2)
    notes.say()
    scales = {name: read_scales(tensors, info) for name, info in plans.items()}
    matrices = rotation.read(tensors, placed)
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
            continue
        owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        if name in plans:
            attach(owner, leaf, plans[name], *scales[name])
    rotation.attach(module, placed, matrices)
    freeze(module)
    return module
