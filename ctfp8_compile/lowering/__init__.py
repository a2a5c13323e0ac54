"""What each target can run. Adding a target is one file here and one line in `kernels_of`."""

from __future__ import annotations

from ..target import Target
from . import cpu, cuda, xpu
from .kernel import KINDS, YES, Kernel, Operands, Problem, Verdict, choose, no

__all__ = [
    "KINDS",
    "YES",
    "Kernel",
    "Operands",
    "Problem",
    "Verdict",
    "choose",
    "fingerprint",
    "kernels_of",
    "no",
]


def kernels_of(target: Target) -> tuple[Kernel, ...]:
    """The kernels of a target, best first; the gate of each decides per problem."""
    tables: dict[str, tuple[Kernel, ...]] = {"cpu": cpu.KERNELS, "cuda": cuda.KERNELS, "xpu": xpu.KERNELS}
    kernels = tables[target.device]
    if target.kernels == "auto":
        return kernels
    return tuple(kernel for kernel in kernels if kernel.library == target.kernels)


def fingerprint(target: Target) -> str:
    """Identifies everything outside our sources that decides what code a graph gets: kernels that load, their ISA."""
    return ",".join(kernel.fingerprint() for kernel in kernels_of(target))
