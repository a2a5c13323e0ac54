"""What each target can run. Adding a target is one file here and one line in `kernels_of`."""

from __future__ import annotations

from ..target import Target
from . import cpu
from .kernel import KINDS, Kernel, Operands, Problem, choose

__all__ = ["KINDS", "Kernel", "Operands", "Problem", "choose", "fingerprint", "kernels_of"]


def kernels_of(target: Target) -> tuple[Kernel, ...]:
    """The kernels of a target, best first; the gate of each decides per problem."""
    return {"cpu": cpu.KERNELS}.get(target.device, ())


def fingerprint(target: Target) -> str:
    """Identifies everything outside our sources that decides what code a graph gets: kernels that load, their ISA."""
    return ",".join(f"{kernel.name}:{kernel.fingerprint()}" for kernel in kernels_of(target))
