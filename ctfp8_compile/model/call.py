"""How a model is called when it leaves for another runtime: tensors in, tensors out, each with a name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..errors import UsageError


@dataclass(frozen=True)
class Call:
    """A module, and example inputs for its forward, which takes them by position.

    Attributes:
        module: returns a tuple of tensors.
        inputs: by name, in order.
        dims: by name of an input or an output, its dimensions that vary: `{0: "batch", 1: "sequence"}`.
        outputs: names of what it returns; known once it has run, or was traced.
        states: by name of an input, the output that is that input at the next call.
    """

    module: nn.Module
    inputs: Mapping[str, Tensor]
    dims: Mapping[str, Mapping[int, str]]
    outputs: Callable[[], tuple[str, ...]]
    states: Mapping[str, str] = field(default_factory=dict)


def name_of(model: nn.Module) -> str:
    """What its class is called, by who wrote it."""
    return type(model).__name__.removeprefix("Parametrized")


class Returned:
    """What a module returned last, by name. A tracer puts a module's own attributes back."""

    names: tuple[str, ...] = ()


class Called(nn.Module):
    """A module called with tensors by position, its other arguments fixed; returns a tuple of tensors."""

    def __init__(self, model: nn.Module, names: tuple[str, ...], fixed: Mapping[str, Any]):
        super().__init__()
        self.model, self.names, self.fixed = model, names, dict(fixed)
        self.returned = Returned()

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        out = self.model(**dict(zip(self.names, inputs, strict=True)), **self.fixed)
        found = _named(out)
        if odd := [name for name, value in found.items() if not isinstance(value, Tensor)]:
            raise UsageError(
                f"{name_of(self.model)} returns {odd[0]}, a {type(found[odd[0]]).__name__}, and these files return "
                "tensors alone. Pass kwargs={'use_cache': False}; of a language model leave args out, and its cache goes in "
                "and out."
            )
        self.returned.names = tuple(found)
        return tuple(found.values())

    def outputs(self) -> tuple[str, ...]:
        """Names of what it returned last."""
        return self.returned.names


def _named(out: Any) -> dict[str, Any]:
    if isinstance(out, Mapping):  # transformers' ModelOutput, which may hold others
        return _flat({str(name): value for name, value in out.items()})
    if isinstance(out, (tuple, list)):
        return _flat({f"output_{i}": value for i, value in enumerate(out)})
    return {"output": out}


def _flat(found: dict[str, Any]) -> dict[str, Any]:
    """What is within others by `outer.inner`, without what is not there."""
    flat: dict[str, Any] = {}
    for name, value in found.items():
        if isinstance(value, (Mapping, tuple, list)):
            inner = value.items() if isinstance(value, Mapping) else enumerate(value)
            flat |= _flat({f"{name}.{key}": one for key, one in inner})
        elif value is not None:
            flat[name] = value
    return flat
