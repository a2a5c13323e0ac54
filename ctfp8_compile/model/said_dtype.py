"""The `dtype` of a model whose first weight is FP8: that of its numbers.

transformers' models say that they are of their first parameter's dtype. Where that is an FP8 table of embeddings, what goes by
it would make caches, masks and images of float8_e4m3fn.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from ..ops import FP8
from .parametrization import quantized_parameters


class _SaysDtype:
    """Mixed into the class of such a model, or part of one; `said_dtype` is set on it."""

    said_dtype: torch.dtype

    @property
    def dtype(self) -> torch.dtype:
        return self.said_dtype


def say_dtypes(model: nn.Module) -> None:
    """Makes each part of a model that has a `dtype`, and would say float8_e4m3fn, say what its weights dequantize to."""
    for module in model.modules():
        if isinstance(getattr(type(module), "dtype", None), property) and module.dtype == FP8:
            _, _, first = next(quantized_parameters(module))
            _say(module, first.info.dtype)


def say_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Makes every part of a model that has a `dtype` say this one."""
    for module in model.modules():
        if isinstance(getattr(type(module), "dtype", None), property):
            _say(module, dtype)


def _say(module: nn.Module, dtype: torch.dtype) -> None:
    module.said_dtype = dtype  # type: ignore[assignment]
    if not isinstance(module, _SaysDtype):
        module.__class__ = _saying(type(module))  # type: ignore[arg-type]  # a module's class hashes like any


def unsay_dtypes(model: nn.Module) -> None:
    """Undoes it, for a model whose weights are dequantized."""
    for module in model.modules():
        if isinstance(module, _SaysDtype):
            del module.said_dtype
            module.__class__ = type(module).__mro__[2]


@functools.cache
def _saying(cls: Any) -> Any:
    """One class for all modules of a class: `torch.compile` guards it."""
    namespace = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls)(cls.__name__, (_SaysDtype, cls), namespace)
