"""Weight-only matmuls on GPUs: activations stay as they are, FP8 weights are decoded inside a Triton kernel of ours.

For what no FP8 × FP8 kernel takes: checkpoints without quantized activations (W8A16), GPUs without FP8 tensor cores, experts and
scales that the libraries have no kernel for, odd sizes. The alternative, dequantizing in the graph, writes each weight in
the activation's dtype at every call.

    %y = ctfp8.weight_only_linear(%x, %w, %scale, %bias, block)
"""

from __future__ import annotations

import importlib.metadata

import torch
from torch import fx

from ..graph import call
from ..ops.triton import WEIGHT_ONLY, missing
from ..target import Target
from .kernel import MATMULS, SCALINGS, Operands, Problem, ScaleLayout, Verdict, no

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class WeightOnly:
    """`x @ dequantize(weight).T`, linear, grouped or gathered, in one pass over the FP8 weight."""

    name = "Triton weight-only"
    library = "triton"
    kinds = MATMULS
    scalings = tuple(scaling for scaling in SCALINGS if scaling != "mx")  # it reads float32 scales
    lowers = ()
    scale_layout: ScaleLayout = ""
    note = ""

    def supports(self, problem: Problem, target: Target) -> Verdict:
        if target.capability is not None and target.capability < (7, 5):
            return no(f"the weight-only kernel needs sm75 or later, not {target}")
        if problem.x_dtype not in _DTYPES:
            return no(f"the weight-only kernel takes bfloat16, float16 and float32 activations, not {problem.x_dtype}")
        if target.capability == (7, 5) and (why_not := _not_on_turing(problem)):
            return no(why_not)
        return Verdict(missing(target.device) or "")

    def preferred(self, problem: Problem, target: Target) -> bool:
        """For experts of a token, where quantized activations save nothing and cost kernels of their own.

        A sparse block of Qwen3-30B-A3B took 0.80 (gathered) and 0.84 (grouped) of the time on an H100 that it took with fbgemm's
        kernel for a token, 1.05 and 1.3 for four (`benchmarks/gpu_moe.py`).
        """
        few = problem.rows is not None and problem.rows <= 8
        measured = target.capability == (9, 0) and problem.scaling in ("tensorwise", "rowwise")
        return problem.kind != "linear" and few and measured

    def emit(self, graph: fx.Graph, problem: Problem, operands: Operands, like: fx.Node) -> fx.Node:
        of_kind = {"linear": operands.bias, "grouped_mm": operands.offs, "gathered_mm": operands.expert_ids}
        args = (operands.x, operands.weight, operands.weight_scale, of_kind[problem.kind], list(problem.block))
        return call(graph, WEIGHT_ONLY[problem.kind], *args, like=like)

    def lower(self, graph: fx.Graph, node: fx.Node) -> fx.Node:
        return node

    def fingerprint(self) -> str:
        try:
            return f"triton {importlib.metadata.version('triton')}"
        except importlib.metadata.PackageNotFoundError:
            return "triton"


def _not_on_turing(problem: Problem) -> str:
    """Why sm75 does not run a problem so; Triton multiplies there without matrix instructions, which few rows do not need."""
    if problem.x_dtype == torch.bfloat16:
        return "sm75 has no bfloat16: for the weight-only kernel load the model with dtype=torch.float16"
    if problem.rows is None or problem.rows > 16:
        return "on sm75 the weight-only kernel takes up to 16 rows, as Triton has no matrix instructions for that GPU"
    return ""


KERNEL = WeightOnly()
