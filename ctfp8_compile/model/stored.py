"""The tensors of a module that `load_state_dict` loaded, as they were read: their names, dtypes, shapes and bits.

A module holds its tensors in its own dtype, and its FP8 weights behind parametrizations, so that `module.state_dict()` is not
what was loaded.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..checkpoint import files as ckpt
from ..checkpoint.packed import PackedWeight
from ..checkpoint.single_file import StateDict
from ..errors import CheckpointError, UsageError
from .parametrization import Dequantize, quantized_parameters, stored_weight
from .plan import QuantizedParameter, StoredScale

_ORIGIN = "_ctfp8_origin"
_DTYPES = ckpt.SCALE_DTYPES | ckpt.INTEGER_DTYPES | {"F64": torch.float64, "I64": torch.int64, "BOOL": torch.bool}


@dataclass(frozen=True)
class Origin:
    """What a module was loaded from.

    Attributes:
        plain: by the module's names, its tensors as stored, but for FP8 weights.
        bytes: names in the file of FP8 weights that it keeps as U8.
        beside: by names in the file, what is no parameter: markers, scales that nothing uses.
        lost: weights in other formats, which were dequantized.
        files: the files, empty if it was a dict.
        metadata: of their headers.
    """

    plain: Mapping[str, ckpt.TensorInfo]
    bytes: frozenset[str]
    beside: Mapping[str, Tensor]
    lost: Mapping[str, tuple[ckpt.TensorInfo, ...]] = field(default_factory=dict)
    files: tuple[Path, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)


def remember(
    module: nn.Module,
    source: StateDict,
    own: Collection[str],
    plans: Mapping[str, QuantizedParameter],
    packed: Mapping[str, PackedWeight],
) -> None:
    """Keeps with a module what `state_dict` needs.

    Args:
        own: names of its parameters and buffers.
        plans: of those that are FP8.
        packed: of those that were dequantized.
    """
    tensors = source.tensors
    taken = {scale.name for info in plans.values() for scale in _scales(info)}
    taken |= {part.name for weight in packed.values() for part in weight.parts.values()}
    taken |= {tensors[name].name for name in own if name in tensors}
    beside = {info.name: info for info in (*tensors.values(), *source.markers.values()) if info.name not in taken}
    in_files = not isinstance(tensors, ckpt.InMemory)
    origin = Origin(
        {name: tensors[name] for name in own if name not in plans and name not in packed},
        frozenset(info.name for info in source.plain.values() if info.dtype == "U8"),
        {name: source.plain.read_stored(info).clone() for name, info in beside.items()},
        {name: tuple(weight.parts.values()) for name, weight in packed.items()},
        tuple(sorted({info.file for info in source.plain.values()})) if in_files else (),
        tensors.metadata,
    )
    object.__setattr__(module, _ORIGIN, origin)


def _scales(info: QuantizedParameter) -> Iterator[StoredScale]:
    yield from info.scales.values()
    yield from info.input_scales.values()


def state_dict(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a module that `ctfp8.load_state_dict` loaded, as it was given them: names, dtypes, shapes and bits.

    Tensors that the module holds in a smaller dtype than its file has are read from the file again, where they are unchanged;
    of a module loaded from a dict, they are cast to the dtype that they had.

    Raises:
        UsageError: the module was not loaded by `load_state_dict`; or a weight that was dequantized is to be read from the
            file again, which has changed since.
    """
    origin = _origin(module)
    out = {name: tensor.clone() for name, tensor in origin.beside.items()}
    files = _again(origin)
    for name, value in module.state_dict().items():
        if name in origin.plain:
            out[origin.plain[name].name] = _as_stored(value, origin.plain[name], files)
    for name, owner, dequantize in quantized_parameters(module):
        tensors = tensors_of(dequantize, stored_weight(owner, name.rpartition(".")[2]))
        out |= {n: (t.view(torch.uint8) if n in origin.bytes else t).clone() for n, t in tensors.items()}
    for parts in origin.lost.values():
        if files is None:
            raise UsageError(
                f"{parts[0].name} was dequantized while loading, and cannot be given back as it was. Load the module from "
                "its file, load_state_dict(module, path, …), and leave that where it is."
            )
        out |= {part.name: files.read_stored(part).clone() for part in parts}
    return out


def save_state_dict(module: nn.Module, file: str | Path) -> None:
    """Writes what `ctfp8.state_dict` gives to a safetensors file, with the header that was read.

    Raises:
        UsageError: see `state_dict`; or it is the file that the module was loaded from.
    """
    origin = _origin(module)
    if Path(file).resolve() in {path.resolve() for path in origin.files}:
        raise UsageError(f"{file}: the module's weights are mapped from that file; save to another one.")
    save_file({k: v.contiguous() for k, v in state_dict(module).items()}, file, dict(origin.metadata) or None)


def tensors_of(dequantize: Dequantize, weight: Tensor) -> dict[str, Tensor]:
    """Weights and scales of one FP8 parameter under the names, shapes and dtypes that their file has, perhaps in its memory."""
    info = dequantize.info
    out = {info.names[source]: info.layout.split_weight(weight, source) for source in info.scales}
    return out | scales_of(dequantize)


def scales_of(dequantize: Dequantize) -> dict[str, Tensor]:
    """The scales alone."""
    info = dequantize.info
    out: dict[str, Tensor] = {}
    for source, stored in info.scales.items():
        stored.write(info.stored_scale(source, dequantize.weight_scale), out)
    for source, stored in info.input_scales.items():
        stored.write(dequantize.static_scale(source), out)
    return out


def _origin(module: nn.Module) -> Origin:
    origin = vars(module).get(_ORIGIN)
    if not isinstance(origin, Origin):
        raise UsageError(
            "this module was not loaded by ctfp8.load_state_dict, so nothing is known of the file it came from. A model of "
            "transformers is saved with ctfp8.save_pretrained(model, folder)."
        )
    return origin


def _again(origin: Origin) -> ckpt.Checkpoint | None:
    """The files; None where there are none, or they have changed."""
    try:
        files = ckpt.Checkpoint(origin.files) if origin.files else None
    except CheckpointError:
        return None
    needed = [info.name for info in origin.plain.values()]
    return files if files is not None and all(name in files for name in needed) else None


def _as_stored(value: Tensor, info: ckpt.TensorInfo, files: ckpt.Checkpoint | None) -> Tensor:
    dtype = _DTYPES.get(info.dtype, value.dtype)
    if value.dtype == dtype or not (value.is_floating_point() and dtype.is_floating_point):
        return value.detach().clone()
    if files is not None:
        stored = files.read_stored(info)
        if stored.shape == value.shape and torch.equal(stored.to(value.dtype), value.to(stored.device)):
            return stored.clone()
    return value.detach().to(dtype)
