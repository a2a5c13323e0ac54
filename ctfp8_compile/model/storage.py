"""CPU weights leave the checkpoint's mapped files when a model first runs, not when it is loaded.

Loaded tensors are views of the mapped file: systems drop such pages at will and read them again, which some do at every
step of a decode. A copy in the process's memory ends that. A model that is only exported, explained or saved runs without.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def leave_files(tensors: Iterable[Any]) -> None:
    """Gives every CPU tensor among them whose memory is not its own, such as a view of a mapped file, a copy of it."""
    for tensor in tensors:
        if isinstance(tensor, Tensor) and tensor.device.type == "cpu" and not tensor.untyped_storage().resizable():
            tensor.data = tensor.data.clone()


class LeaveFiles:
    """Forward pre-hook that does so once. While a tracer runs the model it waits; compiled graphs see to it themselves."""

    def __init__(self, model: nn.Module):
        self.waiting = list(model.parameters())

    def __call__(self, module: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling() and self.waiting:
            leave_files(self.waiting)
            self.waiting = []
