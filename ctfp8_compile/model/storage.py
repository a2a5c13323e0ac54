"""CPU weights leave the checkpoint's mapped files when a model first runs, not when it is loaded.

Loaded tensors are views of the mapped file: systems drop such pages at will and read them again, which some do at every
step of a decode; and what another process writes there changes the model. A copy in the process's memory ends that. A model
that is only exported, explained or saved runs without, unless it was loaded with `in_memory=True`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

#: Parameters and buffers of the models that were loaded here. Nothing else is moved: a tensor that a user passes in may share its
#: memory with an array of theirs, and is to be read, and written, where it lies.
_ours: WeakIdKeyDictionary = WeakIdKeyDictionary()

Function = TypeVar("Function", bound=Callable[..., Any])


def outliving(function: Function) -> Function:
    """A function whose tensors outlive the call that needs them first, such as weights that move.

    Under `torch.inference_mode()` they would be inference tensors for good, which no later gradient can pass.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return call  # type: ignore[return-value]


def some_loaded() -> bool:
    """Whether this process holds a model that was loaded here."""
    return len(_ours) > 0


@outliving
def detach_from_mmap(tensors: Iterable[Any]) -> None:
    """Gives every CPU tensor of ours among them whose memory is not its own, such as a mapped file, a copy of it."""
    for tensor in tensors:
        ours = isinstance(tensor, Tensor) and tensor in _ours and tensor.device.type == "cpu"
        if ours and not tensor.untyped_storage().resizable():
            tensor.data = _copy(tensor.data)


def _copy(tensor: Tensor) -> Tensor:
    """With the strides it had, which compiled code relies on."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype).copy_(tensor)


class DetachFromMmap:
    """Forward pre-hook that does so once. While a tracer runs the model it waits; compiled graphs see to it themselves."""

    def __init__(self, model: nn.Module):
        self.waiting = [*model.parameters(), *model.buffers()]
        for tensor in self.waiting:
            _ours[tensor] = None

    def __call__(self, module: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling() and self.waiting:
            detach_from_mmap(self.waiting)
            self.waiting = []
