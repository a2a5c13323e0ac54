"""Matmuls of an FP8 activation with an FP8 weight, in two levels.

1. `emit` rewrites a matmul to target-independent nodes that run anywhere (`ctfp8::quantize_…`, then `ctfp8::scaled_…`):

    %q, %a = ctfp8.quantize_per_token(%x)                                f8e4m3[M, K], f32[M, 1]
    %y = ctfp8.scaled_mm(%q, %w, %a, %scale, %bias, block, bfloat16)

2. `lower` turns such a node into the operators of the kernel that was chosen for it, and `lower_quantize` the quantization
   into plain ATen, which Inductor fuses into the norm or activation function before it. Nothing of `ctfp8::` is left.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from .. import ops
from ..graph import arguments, before, call, sizes, value
from ..target import Target
from .kernel import YES, Kind, Operands, Problem, ScaleLayout, Scaling, Verdict, no

aten = torch.ops.aten
_ctfp8 = torch.ops.ctfp8
_convert = torch.ops.prims.convert_element_type.default

QUANTIZE = (
    _ctfp8.quantize_per_token.default,
    _ctfp8.quantize_per_group.default,
    _ctfp8.quantize_per_tensor.default,
    _ctfp8.quantize_mx.default,
)

#: Matmuls that wait for their kernel.
SCALED = (_ctfp8.scaled_mm.default, _ctfp8.scaled_grouped_mm.default)


@dataclass(frozen=True)
class Scaled:
    """The arguments of a `ctfp8::scaled_…` node.

    Attributes:
        x, scale_a: FP8 activations `[M, K]`, and their scales `[M, G]` or `[1, 1]` float32.
        weight, weight_scale: `[N, K]` or `[E, N, K]` FP8 values and their float32 scales.
        bias: of a linear, or None.
        offs: cumulative offsets of the experts' rows, of a grouped matmul.
    """

    x: fx.Node
    weight: fx.Node
    scale_a: fx.Node
    weight_scale: fx.Node
    bias: fx.Node | None
    offs: fx.Node | None
    block: tuple[int, int]
    out_dtype: torch.dtype


@dataclass(frozen=True)
class ScaledKernel:
    """One scaled matmul of a library.

    Attributes:
        name: what the report calls it.
        library: one of `target.LIBRARIES`.
        kinds, scalings: which problems it is for (`kernel.KINDS`, `kernel.SCALINGS`).
        eligible: whether it takes such a problem on a target.
        build: `(do, Scaled) -> node`: its operators, where `do(op, *args)` adds a node.
        version: identifies the library on this machine, for Inductor's cache key.
        scale_layout: how it reads weight scales (`kernel.ScaleLayout`).
        preferred: which problems it is for before all others.
        note: what a report says of it.
    """

    name: str
    library: str
    kinds: tuple[Kind, ...]
    scalings: tuple[Scaling, ...]
    eligible: Callable[[Problem, Target], Verdict]
    build: Callable[[ops.Do, Scaled], fx.Node]
    version: Callable[[], str] = lambda: torch.__version__
    scale_layout: ScaleLayout = ""
    preferred: Callable[[Problem, Target], bool] = lambda problem, target: False
    note: str = ""
    lowers: ClassVar[tuple[Any, ...]] = SCALED

    def supports(self, problem: Problem, target: Target) -> Verdict:
        if target.capability is not None and target.capability < (8, 9):
            return no(f"{target} has no FP8 tensor cores (sm89 and later have)")
        if problem.x_dtype not in (torch.bfloat16, torch.float16, torch.float32):
            return no(f"activations are {problem.x_dtype}, not bfloat16, float16 or float32")
        return self.eligible(problem, target)

    def emit(self, graph: fx.Graph, problem: Problem, operands: Operands, like: fx.Node) -> fx.Node:
        return _emit(graph, problem, operands, like)

    def lower(self, graph: fx.Graph, node: fx.Node) -> fx.Node:
        """Builds the kernel's operators in front of a `ctfp8::scaled_…` node and returns their result."""
        x, weight, scale_a, weight_scale, rest, block, out_dtype = arguments(node)
        bias, offs = (rest, None) if node.target is _ctfp8.scaled_mm.default else (None, rest)
        scaled = Scaled(x, weight, scale_a, weight_scale, bias, offs, (block[0], block[1]), out_dtype)
        with before(graph, node):
            return self.build(lambda op, *args, **kwargs: call(graph, op, *args, like=node, **kwargs), scaled)

    def fingerprint(self) -> str:
        return self.version()


def _emit(graph: fx.Graph, problem: Problem, operands: Operands, like: fx.Node) -> fx.Node:
    def do(op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return call(graph, op, *args, like=like, **kwargs)

    x, out_dtype = operands.x, problem.x_dtype
    cols, experts = problem.weight_shape[-1], problem.weight_shape[0]
    input_scale = operands.input_scale
    if input_scale is not None and value(input_scale).shape[-1] != 1:
        # Merged matrices (gate and up) keep one scale each; they share one input, quantized with the largest.
        input_scale = do(aten.amax.default, input_scale, [-1], True)
    rows = x
    if problem.kind == "linear":
        if value(x).dim() != 2:
            rows = do(aten.reshape.default, x, [-1, cols])
        if input_scale is not None:
            input_scale = do(aten.reshape.default, input_scale, [1, 1])
        q, scale_a = _quantize(do, rows, problem.activation, input_scale)
        out = do(
            _ctfp8.scaled_mm.default,
            *(q, operands.weight, scale_a, operands.weight_scale, operands.bias, list(problem.block), out_dtype),
        )
        if value(x).dim() != 2:
            out = do(aten.reshape.default, out, [*sizes(graph, x, like)[:-1], problem.weight_shape[0]])
        return out
    ids = operands.expert_ids
    if ids is not None:
        ids = _from_the_front(do, ids, experts)
    order, offs = None, operands.offs
    if ids is not None:
        # Rows are sorted before they are quantized: Inductor fuses the gather into that one kernel.
        by_expert = do(aten.sort.default, ids)
        ids, order = do(operator.getitem, by_expert, 0), do(operator.getitem, by_expert, 1)
        rows, offs = do(aten.index.Tensor, rows, [order]), _ends(do, ids, experts)
    if input_scale is not None:
        # Experts have their own scales: each row takes its expert's.
        expert = ids
        if expert is None:
            expert = expert_of_rows(do, x, operands.offs)
        input_scale = do(aten.index.Tensor, input_scale, [expert])
    q, scale_a = _quantize(do, rows, problem.activation, input_scale)
    out = do(
        _ctfp8.scaled_grouped_mm.default,
        *(q, operands.weight, scale_a, operands.weight_scale, offs, list(problem.block), out_dtype),
    )
    if order is not None:
        back = do(operator.getitem, do(aten.sort.default, order), 1)
        out = do(aten.index.Tensor, out, [back])
    return out


def _quantize(do: ops.Do, x: fx.Node, activation: str, input_scale: fx.Node | None) -> tuple[fx.Node, fx.Node]:
    kind, _, bound = activation.partition("<=")
    if kind == "token":
        both = do(QUANTIZE[0], x, *([float(bound)] if bound else []))
    elif activation == "group":
        both = do(QUANTIZE[1], x, 128)
    elif activation == "mx":
        both = do(QUANTIZE[3], x)
    else:
        both = do(QUANTIZE[2], x, input_scale)
    return do(operator.getitem, both, 0), do(operator.getitem, both, 1)


def _from_the_front(do: ops.Do, ids: fx.Node, experts: int) -> fx.Node:
    """An id may count from the end, as in an index."""
    turned = do(aten.add.Tensor, ids, experts)
    return do(aten.where.self, do(aten.lt.Scalar, ids, 0), turned, ids)


def _ends(do: ops.Do, ids: fx.Node, experts: int) -> fx.Node:
    """How many rows belong to experts up to each one: `offs` `[E]` int32 of rows sorted by expert."""
    expert = do(aten.unsqueeze.default, numbers(do, experts, value(ids).device), 1)
    at_most = do(aten.le.Tensor, do(aten.unsqueeze.default, ids, 0), expert)
    return do(_convert, do(aten.sum.dim_IntList, at_most, [1]), torch.int32)


def numbers(do: ops.Do, count: Any, device: torch.device) -> fx.Node:
    """`arange(count)`, in the form that every release of Inductor has a lowering for."""
    return do(
        torch.ops.prims.iota.default, count, start=0, step=1, dtype=torch.int64, device=device, requires_grad=False
    )


def expert_of_rows(do: ops.Do, x: fx.Node, offs: fx.Node | None) -> fx.Node:
    """The expert of each row of a grouped matmul; rows past the last group take the last expert."""
    experts = value(offs).shape[0]
    rows = numbers(do, rows_of(do, x), value(x).device)
    past = do(aten.ge.Tensor, do(aten.unsqueeze.default, rows, 1), do(aten.unsqueeze.default, offs, 0))
    return do(aten.clamp_max.default, do(aten.sum.dim_IntList, past, [1]), experts - 1)


def lower_quantize(graph: fx.Graph, node: fx.Node) -> None:
    """Replaces a `ctfp8::quantize_…` node with its arithmetic in ATen."""

    def do(op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return call(graph, op, *args, like=node, **kwargs)

    with before(graph, node):
        if node.target is QUANTIZE[0]:
            results = ops.quantize_per_token_steps(do, *arguments(node))
        elif node.target is QUANTIZE[1]:
            results = ops.quantize_per_group_steps(
                do, arguments(node)[0], value(arguments(node)[0]).shape[1], arguments(node)[1]
            )
        elif node.target is QUANTIZE[3]:
            results = ops.quantize_mx_steps(do, arguments(node)[0], value(arguments(node)[0]).shape[1])
        else:
            results = ops.quantize_per_tensor_steps(do, *arguments(node))
        fp8, scale = results
        if not value(fp8).is_contiguous():  # kernels read rows
            fp8 = do(aten.clone.default, fp8, memory_format=torch.contiguous_format)
    for user in list(node.users):
        user.replace_all_uses_with((fp8, scale)[arguments(user)[1]], propagate_meta=False)
        graph.erase_node(user)
    graph.erase_node(node)


def multiples_of(step: int, problem: Problem) -> Verdict:
    """The eligibility check of kernels that read in whole tiles."""
    n, k = problem.weight_shape[-2:]
    return no(f"N and K must be multiples of {step}, but they are {n} and {k}") if n % step or k % step else YES


def row_scales(do: ops.Do, s: Scaled, shape: list[int]) -> fx.Node:
    """The weight's scales, one per output feature, in a shape; `[…, 1, 1]` for the whole matrix is spread over rows."""
    scale, block_rows, rows = s.weight_scale, s.block[0], value(s.weight).shape[-2]
    if value(scale).shape[-2] != rows:
        experts = list(value(scale).shape[:-2])
        scale = do(aten.reshape.default, scale, [*experts, -1, 1])
        scale = do(aten.expand.default, scale, [*experts, value(scale).shape[-2], min(block_rows, rows)])
        scale = do(aten.reshape.default, do(aten.clone.default, scale), [*experts, -1])
        scale = do(aten.slice.Tensor, scale, -1, 0, rows)
    return do(aten.reshape.default, scale, shape)


def token_scales(do: ops.Do, s: Scaled, shape: list[int]) -> fx.Node:
    """`scale_a` with one entry per row of `x`, in a shape; a scale for the whole tensor is repeated."""
    scale, rows = s.scale_a, rows_of(do, s.x)
    if value(scale).shape[0] == 1 and rows != 1:
        repeated = do(aten.expand.default, scale, [rows, 1])
        scale = do(aten.clone.default, repeated, memory_format=torch.contiguous_format)
    return do(aten.reshape.default, scale, shape)


def transposed_scales(do: ops.Do, scale: fx.Node) -> fx.Node:
    """A weight's `[..., N/128, K/128]` scales as `[..., K/128, N/128]`; no copy where they were prepacked so before."""
    rank = value(scale).dim()
    transposed = do(aten.permute.default, scale, [*range(rank - 2), rank - 1, rank - 2])
    if value(transposed).is_contiguous():
        return transposed
    return do(aten.clone.default, transposed, memory_format=torch.contiguous_format)


def rows_of(do: ops.Do, x: fx.Node) -> Any:
    """The number of rows as an argument: a number, or a node where it is dynamic."""
    rows = value(x).shape[0]
    return rows if isinstance(rows, int) else do(aten.sym_size.int, x, 0)


def pad_rows(do: ops.Do, x: fx.Node, step: int) -> fx.Node:
    """Zero rows behind `x`, up to a multiple of `step`; `x` itself where it is one already."""
    rows = rows_of(do, x)
    more = -rows % step if isinstance(rows, int) else do(operator.mod, do(operator.neg, rows), step)
    return x if isinstance(more, int) and more == 0 else do(aten.constant_pad_nd.default, x, [0, 0, 0, more])
