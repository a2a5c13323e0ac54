"""An embedding whose table is FP8, in eager mode: its rows are gathered, then dequantized. A tracer sees the marker.

While the module's forward runs, its `weight` is a stand-in that holds no numbers. It knows its dtype and shape, gives rows to
`F.embedding`, and becomes the whole value for anything else that is done with it.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from ..compat import DisableTorchFunctionSubclass

_local = threading.local()


class Rows(Tensor):
    """A table that is not dequantized until it has to be: its memory is on no device."""

    rows: Callable[[Tensor], Tensor]
    whole: Callable[[], Tensor]
    lies_on: torch.device

    @staticmethod
    def of(shape: torch.Size, dtype: torch.dtype, device: torch.device, rows: Any, whole: Any) -> Tensor:
        """A stand-in for a value on `device`; `rows(ids)` gives some rows of it, `whole()` all of it."""
        made = torch.empty(shape, dtype=dtype, device="meta").as_subclass(Rows)
        made.rows, made.whole, made.lies_on = rows, whole, device
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _OF_ITSELF:
            with DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func is Tensor.device.__get__:
            return args[0].lies_on
        if func is nn.functional.embedding and len(args) == 2 and isinstance(args[1], Rows):
            if kwargs.get("max_norm") is None:
                return args[1].rows(args[0])
        elif func is nn.functional.embedding and isinstance(args[1], Rows) and (args + (None,) * 4)[3] is None:
            return args[1].rows(args[0])
        return func(*_whole(args), **_whole(kwargs))


_OF_ITSELF = (Tensor.dtype.__get__, Tensor.shape.__get__, Tensor.size, Tensor.dim, Tensor.is_floating_point)  # type: ignore[attr-defined]


def _whole(value: Any) -> Any:
    if isinstance(value, Rows):
        return value.whole()
    if type(value) in (tuple, list):
        return type(value)(map(_whole, value))
    return {k: _whole(v) for k, v in value.items()} if type(value) is dict else value


def asks_for_rows(module: nn.Module) -> bool:
    """Whether the forward of an embedding is running, in this thread."""
    return module in getattr(_local, "running", ())


@contextlib.contextmanager
def _running(module: nn.Module) -> Iterator[None]:
    before = getattr(_local, "running", ())
    _local.running = (*before, module)
    try:
        yield
    finally:
        _local.running = before


def gathering(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a class of embeddings, for those whose table is FP8."""

    @functools.wraps(forward)
    def gather(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if is_compiling():
            return forward(self, *args, **kwargs)
        with _running(self):
            return forward(self, *args, **kwargs)

    return gather
