"""The name `backend="ctfp8"`, known to torch before several threads ask for it at once.

torch finds it by our entry point without any import of ours, but two threads that ask first at the same time then both register
it, and one of them is told "duplicate name". Whoever has a model with FP8 weights has come by here before.
"""

from __future__ import annotations

import importlib
import threading
from typing import Any

from .compat import compiler_functions, register_backend

_registering = threading.Lock()


def register() -> None:
    """Registers the backend under its name, unless that was done."""
    with _registering:
        if "ctfp8" not in compiler_functions:
            register_backend(compiler_fn=backend, name="ctfp8")


def backend(*args: Any, **kwargs: Any) -> Any:
    """Compiles with `ctfp8_compile.backend`, which is imported when it is first used: it takes Inductor along."""
    return importlib.import_module(".inductor.backend", __package__).backend(*args, **kwargs)
