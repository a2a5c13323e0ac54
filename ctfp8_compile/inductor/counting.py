"""How many files of C++ Inductor compiles, counted for the progress bar."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..compat import AsyncCompile, LambdaFuture
from .progress import show, stage


@contextmanager
def counting_cpp() -> Iterator[None]:
    """While Inductor compiles: its C++ is a stage, which shows how many files there are and how many of them are done."""
    counts = {"asked": 0, "done": 0}
    ask = AsyncCompile.cpp_pybinding

    def counted_ask(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not counts["asked"]:
            stage("C++")
        counts["asked"] += 1
        found = ask(self, *args, **kwargs)
        return LambdaFuture(lambda: counted(found)) if isinstance(found, LambdaFuture) else found

    def counted(found: Any) -> Any:
        kernel = found.result()
        counts["done"] += 1
        show(f"C++, {counts['done']} of {counts['asked']} files")
        return kernel

    AsyncCompile.cpp_pybinding = counted_ask
    try:
        yield
    finally:
        AsyncCompile.cpp_pybinding = ask
