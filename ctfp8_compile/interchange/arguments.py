"""A call as its caller wrote it, of any module: the tensors among its arguments become inputs, the rest is fixed."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..model.call import Call, Called


def call_of(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], dynamic_shapes: Any, dtype: torch.dtype
) -> Call:
    """The call `model(*args, **kwargs)`.

    Args:
        dtype: what the model computes in; inputs of bfloat16, float16 and float32 become it.
        dynamic_shapes: as for `torch.export.export`, by name or by position: a dict from dimensions to `Dim`s for each tensor.

    Raises:
        UsageError: an argument holds tensors within something else, or shapes are given in another form.
    """
    given = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    loose = [p.name for p in inspect.signature(model.forward).parameters.values() if p.kind is p.VAR_KEYWORD]
    for name in loose:
        given |= given.pop(name, {})
    inputs = {
        name: value.to(dtype) if value.dtype in _NUMBERS else value
        for name, value in given.items()
        if isinstance(value, Tensor)
    }
    fixed = {name: value for name, value in given.items() if name not in inputs}
    for name, value in fixed.items():
        if not isinstance(value, (bool, int, float, str, type(None), torch.dtype)):
            raise UsageError(
                f"{name}: a {type(value).__name__}, and these files take tensors alone. Wrap the model in a module whose forward "
                "takes each tensor by itself."
            )
    if not inputs:
        raise UsageError("no argument is a tensor; pass the tensors of one call as args or kwargs.")
    called = Called(model, tuple(inputs), fixed)
    return Call(called, inputs, _dims(dynamic_shapes, [*given], inputs), called.outputs)


_NUMBERS = (torch.bfloat16, torch.float16, torch.float32)


def _dims(shapes: Any, names: list[str], inputs: Mapping[str, Tensor]) -> dict[str, dict[int, str]]:
    by_name = dict(zip(names, shapes, strict=False)) if isinstance(shapes, (tuple, list)) else dict(shapes or {})
    found: dict[str, dict[int, str]] = {}
    for name, dims in by_name.items():
        if name not in inputs or not dims:
            continue
        if isinstance(dims, (tuple, list)):
            dims = dict(enumerate(dims))
        if not isinstance(dims, Mapping) or not all(isinstance(dim, int) for dim in dims):
            raise UsageError(f"dynamic_shapes of {name}: give a dict from dimensions to names, {{0: Dim('batch')}}.")
        found[name] = {
            dim: getattr(size, "__name__", f"{name}_{dim}")
            for dim, size in dims.items()
            if size is not None and not isinstance(size, int) and size != torch.export.Dim.STATIC
        }
    return found
