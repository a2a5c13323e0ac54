"""What `save_pretrained` takes from the files that a model was loaded from, so that it gives back what was read.

A model holds its tensors in its own dtype, and not all of those of a file: a layer for multi-token prediction, a second copy of a
tied weight, the other half of a composite model are left out. Here each tensor of the source comes back with its dtype; its bits
are the file's where the model's value is that of the file, else the model's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..checkpoint import files as ckpt
from ..checkpoint.folder import of_files
from ..checkpoint.formats import Format
from ..errors import CheckpointError, UsageError

_DTYPES = ckpt.SCALE_DTYPES | ckpt.INTEGER_DTYPES | {"F64": torch.float64, "I64": torch.int64, "BOOL": torch.bool}


@dataclass(frozen=True)
class Source:
    """What a model was loaded from.

    Attributes:
        files: of the checkpoint.
        tensors: by the file's names.
        targets: by the file's names, the parameters and buffers that its tensors went to.
    """

    files: tuple[Path, ...] = ()
    tensors: Mapping[str, ckpt.TensorInfo] = field(default_factory=dict)
    targets: Mapping[str, str] = field(default_factory=dict)


def as_read(
    state: Mapping[str, Tensor], source: Source, format: Format, own: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A state dict in the names of a file, with the dtypes of that file and all of its tensors.

    Args:
        state: what the model has, by the file's names.
        own: the model's state dict.

    Returns:
        the state dict, and the metadata of the files' headers.

    Raises:
        UsageError: tensors that the model does not hold are to be taken from files that are not there any more.
    """
    out = dict(state)
    beside = [info for name, info in source.tensors.items() if name not in state and name not in source.targets]
    files = _open(source, format, beside)
    for name, info in source.tensors.items():
        if name in state:
            out[name] = _as_stored(state[name], info, files)
        elif (
            (target := source.targets.get(name))
            and (value := own.get(target)) is not None
            and tuple(value.shape) == info.shape
        ):
            out[name] = _as_stored(value, info, files).clone()  # the second copy of a tied weight
    if files is not None:
        out |= {info.name: files.read_stored(info) for info in beside}  # of what the model's class does not build
    return out, {} if files is None else files.metadata


def _open(source: Source, format: Format, beside: Sequence[ckpt.TensorInfo]) -> ckpt.Checkpoint | None:
    """The files; None where they have changed and nothing but them is needed."""
    try:
        files = of_files(source.files).open(format)
        known = {info.name for info in files.values()}
        if all(info.name in known for info in beside):
            return files
        reason = "a tensor is not there"
    except (CheckpointError, SafetensorError, OSError) as error:
        reason = str(error)
    if not beside:
        return None
    raise UsageError(
        f"{beside[0].name} is in the files that the model was loaded from, and not in the model ({len(beside)} tensors in all, "
        f"such as layers for multi-token prediction). It is saved as it was read, and the files have changed since ({reason}). "
        "Load the checkpoint again."
    )


def _as_stored(value: Tensor, info: ckpt.TensorInfo, files: ckpt.Checkpoint | None) -> Tensor:
    """A value in the dtype that the file has: the file's own bits, if the model's dtype can tell no difference."""
    dtype = _DTYPES.get(info.dtype)
    if dtype is None or value.dtype == dtype or tuple(value.shape) != (info.view.whole or info.shape):
        return value
    if not value.is_floating_point() or not dtype.is_floating_point:
        return value
    if files is None:
        return value.to(dtype)
    stored = files.read_stored(info)
    same = torch.equal(stored.to(value.dtype), value.to(stored.device))
    return stored if same else value.to(dtype)


def refuse_adapters(model: Any) -> None:
    """Raises where adapters are inside: their tensors would be saved under names that nothing loads."""
    for name, module in model.named_modules():
        if type(module).__module__.startswith("peft."):
            raise UsageError(
                f"{name} holds an adapter, which a checkpoint of the model has no place for. Save the adapter with "
                "peft_model.save_pretrained(folder), and the model after peft_model.unload()."
            )
