"""What a module's code gets, in eager mode, when it asks for an FP8 weight: its value, but not a place to write to.

The value is made anew each time, so a write to it would be lost without a word: `weight.data += delta`, `nn.init.zeros_`,
the merging of a LoRA. Such a write raises. A training step (of an adapter: FP8 weights have no gradient) keeps the FP8 weight
for its backward pass, not the value, and makes the value again there.

Tracers never see this class; they see the marker.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..compat import DisableTorchFunctionSubclass, in_transform, is_functorch_wrapped_tensor
from ..errors import UsageError

WRITE = (
    "this weight is stored in FP8; what was to be written to is a copy, made for one use, so {what} would be lost. To change "
    "weights, or to merge an adapter into them, load the model with ctfp8.from_pretrained(..., dequantize=True); to work on "
    "the value, take weight.clone()."
)


class Dequantized(Tensor):
    """The value of an FP8 weight, and views of it. Whatever is computed from it is a plain tensor."""

    again: Callable[[], Tensor]  # not on the stand-ins that tracers make

    @staticmethod
    def of(value: Tensor, again: Callable[[], Tensor]) -> Tensor:
        """Marks a value. `again` makes it anew, with the same strides."""
        guarded = value.as_subclass(Dequantized)
        guarded.again = again
        return guarded

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling() or func in _OF_ITSELF:
            with DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        found: list[Dequantized] = []
        plain_args, plain_kwargs = _plain(args, found), _plain(kwargs, found)
        _refuse_writes(func, args, kwargs)
        if not found:  # such as a property of the class
            return super().__torch_function__(func, types, args, kwargs)
        # transforms of torch.func take no hooks: they save the value
        with _saved_as_fp8(found) if torch.is_grad_enabled() and not in_transform() else nullcontext():
            result = func(*plain_args, **plain_kwargs)
        return _guard(result, found)


#: Asked of the value as it lies: of a plain alias of it, the base would be the value itself, and so on for ever.
_OF_ITSELF = (Tensor._is_view, Tensor._base.__get__)  # type: ignore[union-attr]


def _plain(value: Any, found: list[Dequantized]) -> Any:
    if isinstance(value, Dequantized):
        found.append(value)
        with DisableTorchFunctionSubclass():
            return value.as_subclass(Tensor)
    if type(value) in (tuple, list):
        return type(value)(_plain(v, found) for v in value)
    return {k: _plain(v, found) for k, v in value.items()} if type(value) is dict else value


def _refuse_writes(func: Any, args: Any, kwargs: Any) -> None:
    name = getattr(func, "__name__", "")
    if name == "requires_grad_" and not (args[1] if len(args) > 1 else kwargs.get("requires_grad", True)):
        return
    in_place = name.endswith("_") and (not name.endswith("__") or (name.startswith("__i") and name not in _NOT_WRITES))
    written = next(iter((*args, *kwargs.values())), None)
    if (in_place or name in ("__set__", "__setitem__")) and isinstance(written, Dequantized):
        raise UsageError(WRITE.format(what="the write"))
    if isinstance(out := kwargs.get("out"), Dequantized) or (
        isinstance(out, (tuple, list)) and any(isinstance(o, Dequantized) for o in out)
    ):
        raise UsageError(WRITE.format(what="the result"))


#: Operators whose names begin as those of in-place ones do.
_NOT_WRITES = ("__index__", "__int__", "__invert__", "__iter__")


def _guard(result: Any, found: list[Dequantized]) -> Any:
    """A view of a value is a part of the same copy: it is no place to write to either."""
    if isinstance(result, Tensor):
        memory = _memory(result) if type(result) is Tensor else 0
        for source in found:
            if memory and memory == _memory(source):
                return Dequantized.of(result, source.again) if hasattr(source, "again") else result
    elif type(result) in (tuple, list):
        return type(result)(_guard(r, found) for r in result)
    return result


def _memory(tensor: Tensor) -> int:
    """Where a tensor lies; 0 for one that has no memory of its own to ask for, such as those that `torch.func` wraps."""
    with DisableTorchFunctionSubclass():
        if tensor.layout != torch.strided or is_functorch_wrapped_tensor(tensor):
            return 0
        return tensor.untyped_storage().data_ptr()


def _saved_as_fp8(found: list[Dequantized]) -> Any:
    """Autograd saves of a value only what makes it again."""
    by_memory = {_memory(source): source.again for source in found if hasattr(source, "again")}

    def pack(tensor: Tensor) -> Any:
        again = by_memory.get(_memory(tensor))
        return tensor if again is None else (again, tensor.size(), tensor.stride(), tensor.storage_offset())

    def unpack(saved: Any) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        again, size, stride, offset = saved
        return again().as_strided(size, stride, offset)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
