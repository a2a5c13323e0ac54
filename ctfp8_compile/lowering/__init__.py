"""What each target can run. Adding a target is one file here and one line in `kernels_of`."""

from __future__ import annotations

import torch

from ..target import Target
from . import cpu, cuda, embedding, xpu
from .kernel import KINDS, YES, Kernel, Operands, Problem, Verdict, choose, no

__all__ = [
    "KINDS",
    "YES",
    "Kernel",
    "Operands",
    "Problem",
    "Verdict",
    "attention_gate",
    "choose",
    "fingerprint",
    "has_streaming_gemv",
    "kernels_of",
    "no",
]


def kernels_of(target: Target) -> tuple[Kernel, ...]:
    """The kernels of a target, best first; each one's eligibility check decides per problem."""
    tables: dict[str, tuple[Kernel, ...]] = {"cpu": cpu.KERNELS, "cuda": cuda.KERNELS, "xpu": xpu.KERNELS}
    kernels = tables[target.device]
    if target.kernels != "auto":
        kernels = tuple(kernel for kernel in kernels if kernel.library == target.kernels)
    return (*kernels, embedding.KERNEL)  # of no library: it is ATen everywhere


def attention_gate(target: Target, dtype: torch.dtype) -> Verdict:
    """Whether the target has a kernel for attention to a cache that reads what is filled, decoding it if it is FP8."""
    if target.device == "cpu":
        return cpu.attention(dtype)
    return no(f"there is no kernel for attention to an FP8 cache on {target}: it is dequantized in the graph")


def has_streaming_gemv(target: Target, dtype: torch.dtype) -> bool:
    """Whether the target reads an unquantized weight faster than torch for a few rows of activations."""
    return target.device == "cpu" and cpu.has_streaming_gemv(dtype)


def fingerprint(target: Target) -> str:
    """Identifies everything outside our sources that decides what code a graph gets: kernels that load, their ISA."""
    return ",".join(kernel.fingerprint() for kernel in kernels_of(target))
