"""What a target offers: kernels, each with one gate that answers yes or a sentence.

A `Problem` is all a gate may look at. The sentence it answers with reaches the user's report unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import fx

from ..target import Target

KINDS = ("linear", "grouped_mm", "gathered_mm")
#: Scales of weight and activation: per output feature (a scale per tensor was spread over them at load) and token;
#: 128x128 blocks and groups of 128; any other groups; activations that are not quantized.
SCALINGS = ("rowwise", "blockwise", "groupwise", "weight-only")


@dataclass(frozen=True)
class Problem:
    """One matmul with an FP8 weight.

    Attributes:
        kind: `linear` (`x @ weight.T + bias`), `grouped_mm` (rows sorted by expert, `offs` their ends) or
            `gathered_mm` (`ids` the expert of each row).
        x_shape: `[..., K]`; entries may be symbolic.
        weight_shape: `[N, K]` or `[E, N, K]`.
        block: rows and columns that share a weight scale.
        activation: activation scheme of the checkpoint, one of `scheme.ACTIVATIONS`.
    """

    kind: str
    x_dtype: torch.dtype
    x_shape: tuple[Any, ...]
    weight_shape: tuple[int, ...]
    block: tuple[int, int]
    activation: str
    bias: bool

    @property
    def scaling(self) -> str:
        """How a matmul of FP8 with FP8 would be scaled; one of `SCALINGS`."""
        if self.activation == "none":
            return "weight-only"
        if self.activation == "group":
            return "blockwise" if self.block == (128, 128) else "groupwise"
        return "groupwise" if self.block[1] < self.weight_shape[-1] else "rowwise"


@dataclass(frozen=True)
class Operands:
    """The nodes a kernel is built from; `extra` is the bias (or None), `offs` or `ids`, by the problem's kind."""

    x: fx.Node
    weight: fx.Node
    weight_scale: fx.Node
    input_scale: fx.Node | None
    extra: fx.Node | None


class Kernel(Protocol):
    """One way to run a problem on a target."""

    @property
    def name(self) -> str:
        """What the report calls it."""

    @property
    def library(self) -> str:
        """One of `target.LIBRARIES`, by which users may limit the choice."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """The `KINDS` of problem it is for."""

    @property
    def scalings(self) -> tuple[str, ...]:
        """The `SCALINGS` it is for."""

    def supports(self, problem: Problem, target: Target) -> str | None:
        """None if this kernel takes a problem it is for on the target, else the sentence why not."""

    def emit(self, graph: fx.Graph, problem: Problem, operands: Operands, like: fx.Node) -> fx.Node:
        """Builds the nodes at the graph's insertion point and returns the one that replaces the matmul."""

    def fingerprint(self) -> str:
        """What the machine adds to the decision (a library's version, an ISA); enters Inductor's cache key."""


def choose(kernels: Sequence[Kernel], problem: Problem, target: Target) -> tuple[Kernel | None, str]:
    """The first kernel for this problem whose gate says yes, with an empty reason; or None with why each declined."""
    reasons: list[str] = []
    for kernel in kernels:
        if problem.kind not in kernel.kinds or problem.scaling not in kernel.scalings:
            continue
        why = kernel.supports(problem, target)
        if why is None:
            return kernel, ""
        if why not in reasons:
            reasons.append(why)
    if not reasons and problem.scaling == "weight-only":
        return None, "the checkpoint does not quantize activations (W8A16)"
    what = "a linear" if problem.kind == "linear" else "experts"
    return None, "; ".join(reasons) or f"there is no kernel for {what} with {problem.scaling} scales on {target}"
