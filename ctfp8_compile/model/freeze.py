"""A model with FP8 weights is for inference: what would lose the weights is refused before anything is half done."""

from __future__ import annotations

import contextlib
import copy
import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..ops import FP8
from ..ops import cpu as cpu_kernels
from ..registry import register
from .adapters import match_ends_of_names
from .parametrization import CAST, detach, quantized_parameters, stored_weight
from .rotation import fold_
from .said_dtype import say_dtypes, unsay_dtypes
from .storage import DetachFromMmap


class KeepsFP8:
    """Mixed into the class of a model with FP8 weights: casts and pickles are refused before anything is half done."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        refuse_cast(self, fn)  # type: ignore[arg-type]
        return super()._apply(fn, recurse)  # type: ignore[misc]

    def _refuse_cast(self) -> Any:
        raise UsageError(CAST)

    # transformers overrides these two with a message of its own, so `_apply` alone would not be asked
    half = float = _refuse_cast

    def named_modules(self, *args: Any, **kwargs: Any) -> Any:
        match_ends_of_names()  # whoever adds adapters asks for the modules first
        return super().named_modules(*args, **kwargs)  # type: ignore[misc]

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        if requires_grad:
            raise UsageError(_TRAIN)
        return super().requires_grad_(False)  # type: ignore[misc]

    def train(self, mode: bool = True) -> Any:
        if mode and not any(p.requires_grad for p in self.parameters()):  # type: ignore[attr-defined]
            raise UsageError(_TRAIN)
        return super().train(mode)  # type: ignore[misc]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        new = self.__new__(type(self))
        memo[id(self)] = new
        new.__dict__ = copy.deepcopy(self.__dict__, memo)
        return new

    def __getstate__(self) -> Any:
        raise UsageError(
            "a model with FP8 weights cannot be pickled (torch.save(model)). Save it as a checkpoint with "
            "ctfp8.save_pretrained(model, folder), its tensors with torch.save(model.state_dict(), file), "
            "or its graph with ctfp8.export."
        )


def refuse_cast(module: nn.Module, fn: Callable[[Tensor], Tensor]) -> None:
    """Raises if what is to be applied to all tensors of a module would cast its FP8 weights."""
    device = next((q.weight_scale.device for _, _, q in quantized_parameters(module)), None)
    if device is not None and fn(torch.empty(0, dtype=FP8, device=device)).dtype != FP8:
        raise UsageError(CAST)


_TRAIN = (
    "FP8 weights are for inference; this model cannot be trained. Train an adapter on top of it (LoRA with PEFT), or load it "
    "with ctfp8.from_pretrained(..., dequantize=True) for a plain model."
)


def freeze(model: nn.Module, kind: type[KeepsFP8] = KeepsFP8) -> None:
    """Makes the root of a model refuse what would lose its FP8 weights; also sets `eval()` and no gradients.

    If the C++ CPU kernels were built before, eager code takes them from here on; compiling a model builds them. When the
    model first runs, its CPU weights leave the mapped files.

    Args:
        kind: what is mixed into the model's class.
    """
    register()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.eval()
    with contextlib.suppress(cpu_kernels.KernelBuildError):  # the compiler will say so where it matters
        cpu_kernels.load(build=False)
    if not isinstance(model, KeepsFP8):
        model.__class__ = _keeps_fp8(type(model), kind)  # type: ignore[arg-type]  # a module's class hashes like any
        say_dtypes(model)
        for module in _around_fp8(model):
            module._apply = types.MethodType(_apply_whole, module)  # type: ignore[method-assign]
        model.register_forward_pre_hook(DetachFromMmap(model))


def _around_fp8(model: nn.Module) -> list[nn.Module]:
    """The modules below the root that hold an FP8 weight, or hold a module that does."""
    paths = {path for name, _, _ in quantized_parameters(model) for path in _prefixes(name)}
    return [module for path, module in model.named_modules() if path in paths]


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")[:-1]
    return [".".join(parts[:n]) for n in range(1, len(parts) + 1)]


def _apply_whole(self: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """`_apply` of a part of a model: a cast is refused before any of its other parameters is cast."""
    refuse_cast(self, fn)
    return type(self)._apply(self, fn, recurse)


@functools.cache
def _keeps_fp8(cls: Any, kind: type[KeepsFP8]) -> Any:
    """One class for all roots of a class: `torch.compile` guards it."""
    namespace = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls)(cls.__name__, (kind, cls), namespace)


def dequantize_(model: nn.Module) -> nn.Module:
    """Replaces every FP8 parameter by its dequantized value, in place: a plain model, twice the memory.

    Transforms of a rotated checkpoint are multiplied into the weights."""
    if isinstance(model, KeepsFP8):
        for module in _around_fp8(model):
            vars(module).pop("_apply", None)
        unsay_dtypes(model)
        model.__class__ = type(model).__bases__[1]
    for path, module, dequantize in list(quantized_parameters(model)):
        name = path.rpartition(".")[2]
        detach(module, name, dequantize.value(stored_weight(module, name)).contiguous())
    fold_(model)
    return model
