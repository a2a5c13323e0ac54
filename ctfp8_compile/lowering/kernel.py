"""What a target offers: kernels, each with one eligibility check that answers yes or a sentence.

A `Problem` is all that such a check may look at. The sentence it answers with reaches the user's report unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import torch
from torch import fx

from ..target import Target

#: A linear; experts whose rows are sorted by expert; experts of which each row has one of its own; rows of a table by their ids.
Kind = Literal["linear", "grouped_mm", "gathered_mm", "embedding"]
#: Scales of weight and activation: one each; per output feature and token (or for several); 128x128 blocks and groups of 128;
#: any other groups; bytes that are powers of two, for groups of 32 (MXFP8); activations that are not quantized.
Scaling = Literal["tensorwise", "rowwise", "blockwise", "groupwise", "mx", "weight-only"]
#: How a kernel reads weight scales: as they are loaded; one per row; transposed; in the order of Blackwell's tensor cores.
ScaleLayout = Literal["", "by row", "transposed", "swizzled"]
KINDS: tuple[Kind, ...] = get_args(Kind)
MATMULS: tuple[Kind, ...] = KINDS[:3]
SCALINGS: tuple[Scaling, ...] = get_args(Scaling)


@dataclass(frozen=True)
class Verdict:
    """The answer of an eligibility check: yes, or the sentence why not. True if it is yes, so that checks combine with `and`."""

    why_not: str = ""

    def __bool__(self) -> bool:
        return not self.why_not


YES = Verdict()


def no(why_not: str) -> Verdict:
    """The verdict of a kernel that declines, with its reason."""
    return Verdict(why_not)


@dataclass(frozen=True)
class Problem:
    """One matmul with an FP8 weight.

    Attributes:
        kind: `linear` (`x @ weight.T + bias`), `grouped_mm` (rows sorted by expert, `offs` their cumulative offsets) or
            `gathered_mm` (`expert_ids` the expert of each row); or `embedding` (rows of the weight, `x` their ids).
        x_shape: `[..., K]`; entries may be symbolic.
        weight_shape: `[N, K]` or `[E, N, K]`.
        block: rows and columns that share a weight scale.
        activation: the checkpoint's activation scheme, as `checkpoint.scheme` spells it.
        exponents: weight scales are bytes that are powers of two; activations may be quantized all the same, or not.
    """

    kind: Kind
    x_dtype: torch.dtype
    x_shape: tuple[Any, ...]
    weight_shape: tuple[int, ...]
    block: tuple[int, int]
    activation: str
    bias: bool
    exponents: bool = False

    @property
    def rows(self) -> int | None:
        """Of `x`, all together; None where their number is not known before the graph runs."""
        sizes = self.x_shape[:-1]
        return math.prod(sizes) if all(isinstance(size, int) for size in sizes) else None

    @property
    def scaling(self) -> Scaling:
        """How a matmul of FP8 with FP8 would be scaled; one of `SCALINGS`."""
        if self.exponents:
            return "mx"
        if self.activation == "none":
            return "weight-only"
        if self.activation == "group":
            return "blockwise" if self.block == (128, 128) else "groupwise"
        rows, cols = self.weight_shape[-2:]
        if self.block[1] < cols:
            return "groupwise"
        return "tensorwise" if self.block[0] >= rows and self.activation.startswith("tensor") else "rowwise"


@dataclass(frozen=True)
class Operands:
    """The nodes a kernel is built from.

    Attributes:
        x: `[..., K]`, of a linear; `[M, K]` of experts; the ids of an embedding.
        weight, weight_scale: `[N, K]` or `[E, N, K]` float8_e4m3fn, and its float32 scales.
        input_scale: static activation scales, `[S]` or `[E, S]` float32; None where activations are not static.
        bias: `[N]`, of a linear; or None.
        offs: cumulative offsets of the experts' rows, `[E]` int32, of a `grouped_mm`.
        expert_ids: the expert of each row, `[M]`, of a `gathered_mm`.
    """

    x: fx.Node
    weight: fx.Node
    weight_scale: fx.Node
    input_scale: fx.Node | None = None
    bias: fx.Node | None = None
    offs: fx.Node | None = None
    expert_ids: fx.Node | None = None


class Kernel(Protocol):
    """One way to run a problem on a target."""

    @property
    def name(self) -> str:
        """What the report calls it."""

    @property
    def library(self) -> str:
        """One of `target.LIBRARIES`, by which users may limit the choice."""

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The `KINDS` of problem it is for."""

    @property
    def scalings(self) -> tuple[Scaling, ...]:
        """The `SCALINGS` it is for."""

    @property
    def scale_layout(self) -> ScaleLayout:
        """How it reads weight scales; it takes them as they are loaded all the same, and brings them into it at each call."""

    @property
    def note(self) -> str:
        """What who gets it should know, such as a choice that may be faster; empty for most."""

    def supports(self, problem: Problem, target: Target) -> Verdict:
        """Whether this kernel takes a problem it is for on the target."""

    def preferred(self, problem: Problem, target: Target) -> bool:
        """Whether it comes before all others of the target for such a problem; where that was measured."""

    def emit(self, graph: fx.Graph, problem: Problem, operands: Operands, like: fx.Node) -> fx.Node:
        """Builds the nodes at the graph's insertion point and returns the one that replaces the matmul."""

    @property
    def lowers(self) -> tuple[Any, ...]:
        """Operators among those it emits that are target-independent, and that `lower` turns into its own."""

    def lower(self, graph: fx.Graph, node: fx.Node) -> fx.Node:
        """Builds its own operators in front of such a node and returns their result."""

    def fingerprint(self) -> str:
        """What the machine adds to the decision (a library's version, an ISA); enters Inductor's cache key."""


def choose(kernels: Sequence[Kernel], problem: Problem, target: Target) -> tuple[Kernel | None, str]:
    """The first kernel for this problem that is eligible, or None; and why each before it declined."""
    reasons: list[str] = []
    for kernel in sorted(kernels, key=lambda kernel: not kernel.preferred(problem, target)):
        if problem.kind not in kernel.kinds or problem.scaling not in kernel.scalings:
            continue
        verdict = kernel.supports(problem, target)
        if verdict:
            return kernel, "; ".join(reasons)
        if verdict.why_not not in reasons:
            reasons.append(verdict.why_not)
    if not reasons and problem.scaling == "weight-only":
        return None, "the checkpoint does not quantize activations (W8A16)"
    what = {"linear": "a linear", "embedding": "an embedding"}.get(problem.kind, "experts")
    return None, "; ".join(reasons) or f"there is no kernel for {what} with {problem.scaling} scales on {target}"
