"""The command as a process of its own, which ends as soon as its command has."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from typing import Any

from .app import app


def main() -> None:
    """Runs the command line and ends the process with its exit code; a traceback ends it as Python does."""
    try:
        app(prog_name="ctfp8")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            _leave(end.code or 0)
        raise


def _leave(code: int) -> None:
    """Ends the process: threads waited for, exit functions run and output flushed, but no garbage sought and no module torn down.

    Looking through all that torch and transformers made takes 0.7 s. With objects left out of that search (`gc.freeze`),
    modules bound by nanobind, such as Triton's from 3.9 on, list them on stderr as leaks.
    """
    threads: Any = threading  # `multiprocessing` ends its processes in this way, by the same two names
    threads._shutdown()
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:  # whoever read it is gone: Python says so, or not, as ever
        return
    os._exit(code)
