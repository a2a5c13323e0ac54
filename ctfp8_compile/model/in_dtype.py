"""A model that computes in another dtype: a copy of its modules, which share its tensors; none is converted or copied.

FP8 weights dequantize to that dtype; other weights get a parametrization that casts them, so that a traced graph holds the
checkpoint's own tensors, and a cast behind each.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..errors import UsageError
from .parametrization import own_class, quantized_parameters
from .said_dtype import say_dtype

Model = TypeVar("Model", bound=nn.Module)


class Cast(nn.Module):
    """Parametrization of a weight that is stored in another dtype than the model computes in."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, stored: Tensor) -> Tensor:
        return stored.to(self.dtype)

    def right_inverse(self, stored: Tensor) -> Tensor:
        return stored  # as it is registered


def in_dtype(model: Model, dtype: torch.dtype) -> Model:
    """A copy of a model that computes in `dtype`; `model` stays as it is, compiled or not.

    Args:
        model: with or without FP8 weights.
        dtype: float32 or float16.

    Raises:
        UsageError: the model has adapters on top of FP8 weights.
    """
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    made = copy.deepcopy(model, shared)
    for module in made.modules():
        if hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable"):
            del module.forward  # compiled in place; it would run the model itself
    cast = {torch.bfloat16, torch.float16} - {dtype}
    for path, module, dequantize in quantized_parameters(made):
        if len(module.parametrizations[path.rpartition(".")[2]]) > 1:  # type: ignore[index]
            raise UsageError(f"{path}: has an adapter on top. Merge it, or take it off: model.unload().")
        cast |= {dequantize.info.dtype} - {dtype}
        dequantize.info = replace(dequantize.info, dtype=dtype)
        block, activation, _, transposed = dequantize.constants
        dequantize.constants = (block, activation, dtype, transposed)
    for module in [m for m in made.modules() if not isinstance(m, parametrize.ParametrizationList)]:
        _cast_own(module, cast, dtype)
    say_dtype(made, dtype)
    return made


def _cast_own(module: nn.Module, cast: set[torch.dtype], dtype: torch.dtype) -> None:
    """Of one module, and of none within it. Buffers of float32 stay: tables of frequencies are to be exact."""
    stored = [name for name, p in module._parameters.items() if p is not None and p.dtype in cast]
    stored += [name for name, b in module._buffers.items() if b is not None and b.dtype in cast - {torch.float32}]
    for name in stored:
        own_class(module)
        parametrize.register_parametrization(module, name, Cast(dtype), unsafe=True)
