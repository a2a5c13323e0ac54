"""What Inductor says where a machine lacks a C++ compiler or Python's headers, as one sentence with the package to install."""

from __future__ import annotations

from collections.abc import Iterator

from ..compat import CppCompileError, InvalidCxxCompiler
from ..ops.cpu.build import INSTALL

_EAGER = "Without one the model runs uncompiled: leave ctfp8.compile out."


def missing(error: BaseException) -> str | None:
    """What the machine lacks, if that is why a compilation failed; else None."""
    for cause in causes(error):
        if isinstance(cause, InvalidCxxCompiler):
            return f"torch.compile needs a C++ compiler on CPUs, and there is none. {INSTALL} {_EAGER}"
        if isinstance(cause, CppCompileError) and "Python.h" in str(cause):
            return (
                "torch.compile needs Python's headers on CPUs, and Python.h is not there. Install them (apt install python3-dev, "
                "dnf install python3-devel), or take a Python that has them, such as conda's or uv's."
            )
    return None


def compiler_says(word: str, error: BaseException) -> bool:
    """Whether the C++ compiler failed, and names `word`."""
    return any(isinstance(cause, CppCompileError) and word in str(cause) for cause in causes(error))


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what led to it, Inductor's `inner_exception` included."""
    while error is not None:
        yield error
        error = getattr(error, "inner_exception", None) or error.__cause__ or error.__context__
