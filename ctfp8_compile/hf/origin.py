"""Where a model came from: what was read of its files, and what of the model was not made from them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import files as ckpt
from ..checkpoint.folder import Folder, of_files, of_folder
from ..checkpoint.formats import Format
from ..checkpoint.source import Source
from ..errors import CheckpointError
from ..model.parametrization import quantized_parameters
from ..model.rotation import rotations
from .compat import cached_file
from .conversions import Arrivals, arrivals


@dataclass
class Origin:
    """Where a model came from, as it was when it was loaded.

    Attributes:
        tensors: of the checkpoint, by our names; `source` has them by their own.
        declared: the tensors that the model's class declares, on the meta device.
        arriving: which of `tensors` they were made from.
        computed: those that no file had and the class made by itself.
        stock: transformers loaded the model; `prepare` took it over.
    """

    source: Source
    folder: Folder
    tensors: ckpt.Checkpoint
    declared: Mapping[str, Tensor]
    arriving: Arrivals
    computed: dict[str, Tensor] = field(default_factory=dict)
    stock: bool = False

    def keep_computed(self, model: Any) -> None:
        """Remembers what the class made by itself: not written again as long as it is that."""
        state, made = plain_state(model), set(self.arriving.targets())
        loaded = {place(model, name, tensor) for name, tensor in state.items() if name in made}
        self.computed = {
            name: tensor.detach().clone()
            for name, tensor in state.items()
            if name not in made and tensor.device.type != "meta" and place(model, name, tensor) not in loaded
        }

    def groups(self, special: Collection[str]) -> Iterator[Group]:
        """Parameters with the tensors that make them, but for those that are looked after elsewhere."""
        for first, sources in self.arriving.by_target.items():
            declared = tuple(name for name in self.arriving.targets_of(first) if name in self.declared)
            if not any(name in special for name in declared):
                yield Group(first, declared, tuple(sources), self.arriving)


def of_stock(model: Any, format: Format) -> Origin | None:
    """The same of a model that transformers loaded and `prepare` took over; None where its files are not found any more."""
    folder = _stock_folder(model)
    if folder is None:
        return None
    tensors = folder.open(format)
    names = {name: tuple(tensor.shape) for name, tensor in plain_state(model).items()}
    names |= {name: owner.info.layout.shape for name, _, owner in quantized_parameters(model)}
    declared = {name: torch.empty(shape, device="meta") for name, shape in names.items()}
    origin = Origin(
        Source.of(tensors), folder, tensors.headers(), declared, arrivals(model, tensors, declared), stock=True
    )
    origin.keep_computed(model)
    return origin


def _stock_folder(model: Any) -> Folder | None:
    """The files that transformers read, by the name and the commit that it wrote into the config."""
    name, commit = model.config._name_or_path, getattr(model.config, "_commit_hash", None)
    try:
        if Path(name).is_dir():
            return of_folder(name)
        for file in (ckpt.INDEX_FILE, ckpt.SINGLE_FILE):
            found = cached_file(
                name, file, revision=commit, local_files_only=True, _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
            )  # fmt: skip
            if found is not None:
                return of_folder(Path(found).parent) if file == ckpt.INDEX_FILE else of_files([found])
    except (CheckpointError, OSError):
        return None
    return None


def plain_state(model: Any) -> dict[str, Tensor]:
    """The tensors of a model but the FP8 weights and their scales, and the matrices of transforms."""
    own = [f"{path}.parametrizations.{leaf}.".removeprefix(".")
           for path, _, leaf in (name.rpartition(".") for name, _, _ in quantized_parameters(model))]  # fmt: skip
    own += [f"{name}." for name, _, _ in rotations(model)]
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(tuple(own))}


def place(model: Any, name: str, tensor: Tensor) -> object:
    """The same for tied tensors."""
    if tensor.device.type == "meta":
        return id(model.get_parameter_or_buffer(name))
    return tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape), tensor.dtype


@dataclass(frozen=True)
class Group:
    """Parameters that the same tensors of the files make, those tensors, and the converter that does.

    Attributes:
        first: the parameter under which `found` has them.
    """

    first: str
    targets: tuple[str, ...]
    sources: tuple[tuple[str, str | None], ...]
    found: Arrivals

    @property
    def pattern(self) -> str | None:
        return self.sources[0][1]
