"""How a model is called when it leaves for another runtime: tensors in, tensors out, each with a name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn


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
