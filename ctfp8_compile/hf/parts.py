"""What one of several ranks has of each parameter: known when transformers has applied its plan, used while files are read.

transformers reads of each tensor of a file what its plan cuts of the parameter. That is right where a row of the tensor is a
row of the parameter. Of parameters whose tensors are turned, or dequantized, before they fit, each rank reads all, from the
mapped file, and keeps its part.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate, distribute_tensor

from ..checkpoint.layout import Layout
from ..checkpoint.shard import Cuts, Shard, local_shape, shard, take
from .parallel import cuts_of


class Parts:
    """Of one model on several ranks. Filled in between transformers' plan and its loader: that is when it asks for the names.

    Attributes:
        whole: parameters of whose tensors this rank reads all.
        cuts: of these, the whole shape and how it is cut.
        shards: of FP8 parameters that are cut, what this rank has of their rows.

    Args:
        layouts: of FP8 parameters.
    """

    def __init__(self, model: Any, layouts: Mapping[str, Layout], whole: Iterable[str]):
        self.whole = frozenset(whole)
        self.cuts: dict[str, tuple[tuple[int, ...], Cuts]] = {}
        self.shards: dict[str, Shard] = {}
        self._layouts, self._begun = layouts, False
        self._hook = model.register_state_dict_pre_hook(self._begin)

    def end(self) -> None:
        self._hook.remove()

    def of(self, name: str, value: Tensor) -> Tensor:
        """This rank's part of a parameter's value."""
        return take(value, self.cuts[name][1]) if name in self.cuts else value

    def _begin(self, model: Any, prefix: str, keep_vars: bool) -> None:
        """Raises what `shard` does."""
        if self._begun or not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
            return
        self._begun = True
        for name in {*self._layouts, *self.whole}:
            path, _, leaf = name.rpartition(".")
            owner, layout = model.get_submodule(path), self._layouts.get(name)
            parameter = owner._parameters[leaf]
            if layout is not None and layout.transposed:
                parameter = _transposed(parameter)
            if cuts := cuts_of(parameter) if isinstance(parameter, DTensor) else ():
                if layout is not None:
                    self.shards[name] = shard(layout, cuts)
                if name in self.whole:
                    self.cuts[name] = (tuple(parameter.shape), cuts)
                    # a plain tensor: the loader reads whole ones for it
                    parameter = torch.empty(local_shape(parameter.shape, cuts), dtype=parameter.dtype, device="meta")
            owner._parameters[leaf] = nn.Parameter(parameter, requires_grad=False)


def _transposed(parameter: Tensor) -> Tensor:
    """A parameter, which holds nothing yet, as it is stored where the model declares inputs × outputs."""
    dims = [*range(parameter.ndim - 2), parameter.ndim - 1, parameter.ndim - 2]
    whole = torch.empty([parameter.shape[d] for d in dims], dtype=parameter.dtype, device="meta")
    if not isinstance(parameter, DTensor):
        return whole
    placements = [
        placement if isinstance(placement, Replicate) else _along(placement, dims[placement.dim])  # type: ignore[attr-defined]
        for placement in parameter.placements
    ]
    return distribute_tensor(whole, parameter.device_mesh, placements, src_data_rank=None)


def _along(placement: Any, dim: int) -> Placement:
    groups = getattr(placement, "split_factor", None)
    made: Placement = type(placement)(dim) if groups is None else type(placement)(dim, split_factor=groups)
    return made
