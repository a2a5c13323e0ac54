"""SpinQuant's R3: queries and keys are rotated after RoPE, as compressed-tensors hooks them.

Keys are rotated before a cache stores them: a pre-hook of the attention module hands its forward a cache whose `update` does so.
Queries are rotated where attention begins: the model's attention implementation becomes one of ours, which then calls the
model's own. q R (k R)ᵀ = q kᵀ, so that scores stay; what an FP8 cache rounds is rotated.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.transforms import ATTENTION
from ..errors import UsageError
from ..model.rotation import Placed, Rotation, rotations
from .compat import ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS, cache_argument

_PREFIX = "ctfp8_rotated_"


@dataclass(frozen=True)
class _Attention:
    """Forward pre-hook of an attention module: its cache rotates keys, and its queries are sure to be rotated."""

    placed: tuple[Placed, ...]
    argument: str

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if not module.config._attn_implementation.startswith(_PREFIX):
            raise UsageError(
                f"attn_implementation was set to {module.config._attn_implementation!r} after loading, which would leave out "
                f"transform {self.placed[0].transform}. Pass attn_implementation to ctfp8.from_pretrained instead."
            )
        return args, {**kwargs, self.argument: _RotatingCache(kwargs.get(self.argument), module, self.placed)}


class _RotatingCache:
    """A key-value cache, or none, that stores and gives back rotated keys."""

    def __init__(self, cache: Any, module: nn.Module, placed: Sequence[Placed]):
        self._cache, self._module, self._placed = cache, module, placed

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys = _rotate(self._module, self._placed, "k_cache", key_states)
        return (keys, value_states) if self._cache is None else self._cache.update(keys, value_states, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def _rotate(module: nn.Module, placed: Sequence[Placed], location: str, states: Tensor) -> Tensor:
    for one in placed:
        if one.transform.location == location:
            states = module._modules[one.transform.name](states, one.transform)  # type: ignore[misc]
    return states


def _attend(implementation: str, module: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The attention implementation of a rotated model."""
    query = _rotate(module, getattr(module, "ctfp8_rotated", ()), "q_attn", query)
    return _original(implementation, module)(module, query, *args, **kwargs)


def _original(implementation: str, module: nn.Module) -> Callable[..., Any]:
    if implementation in ALL_ATTENTION_FUNCTIONS:
        return ALL_ATTENTION_FUNCTIONS[implementation]
    return sys.modules[type(module).__module__].eager_attention_forward


def rotate_attention(model: Any, placed: Sequence[Placed]) -> None:
    """Hooks the attention modules whose matrices `model.rotation.attach` put there.

    Raises:
        UsageError: a module's forward does not go through transformers' attention interface, or the implementation is none
            of `sdpa` and `eager`.
    """
    by_module: dict[str, list[Placed]] = {}
    for one in placed:
        if one.transform.location in ATTENTION:
            by_module.setdefault(one.module, []).append(one)
    if not by_module:
        return
    implementation = model.config._attn_implementation
    if implementation not in ("sdpa", "eager"):
        raise UsageError(
            f"attn_implementation={implementation!r}: with a checkpoint that rotates queries and keys "
            f"({placed[0].transform}) it is 'sdpa' or 'eager'."
        )
    for name, own in by_module.items():
        module = model.get_submodule(name)
        names = inspect.unwrap(type(module).forward).__code__.co_names
        if "ALL_ATTENTION_FUNCTIONS" not in names or "update" not in names:
            raise UsageError(
                f"{name}: a {type(module).__name__} has no place where transform {own[0].transform} can be applied here. Serve "
                "this checkpoint with vLLM, or quantize the model without that transform."
            )
        module.ctfp8_rotated = tuple(own)
        module.register_forward_pre_hook(_Attention(tuple(own), cache_argument(module)), with_kwargs=True)
    ALL_ATTENTION_FUNCTIONS.register(_PREFIX + implementation, functools.partial(_attend, implementation))
    ALL_MASK_ATTENTION_FUNCTIONS.register(_PREFIX + implementation, ALL_MASK_ATTENTION_FUNCTIONS[implementation])
    model.set_attn_implementation(_PREFIX + implementation)


def unrotate_attention(model: Any) -> None:
    """Takes rotations of queries and keys off a model whose cache is not quantized: they leave its scores as they are.

    Raises:
        UsageError: the rotations of an attention module do not cancel out.
    """
    found: dict[int, tuple[str, Any]] = {
        id(module): (name, module) for name, module, _ in rotations(model) if hasattr(module, "ctfp8_rotated")
    }
    for name, module in found.values():
        size = max(one.size for one in module.ctfp8_rotated)
        eye = torch.eye(size, dtype=torch.float64, device=next(module.buffers()).device)
        queries, keys = (_rotate(module, module.ctfp8_rotated, location, eye) for location in ("q_attn", "k_cache"))
        if not torch.allclose(queries @ keys.T, eye, atol=1e-6):
            raise UsageError(
                f"{name.rpartition('.')[0]}: what rotates queries does not undo what rotates keys, which a plain model cannot "
                "express. Load the checkpoint without dequantize=True."
            )
    for _, module in found.values():
        del module.ctfp8_rotated
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, _Attention):
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
        for child in [n for n, m in module._modules.items() if isinstance(m, Rotation)]:
            del module._modules[child]
    if found:
        model.set_attn_implementation(model.config._attn_implementation.removeprefix(_PREFIX))
