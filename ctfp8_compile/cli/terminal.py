"""What is printed where: results to stdout, progress and errors to stderr; off a terminal no line is wrapped, no bar drawn."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console

#: Wider than any line: rich breaks lines at its console's width, and what reads a pipe wants them whole.
_WIDE = 100_000


def out() -> Console:
    """The console of results."""
    return _console(sys.stdout, stderr=False)


def err() -> Console:
    """The console of progress and errors."""
    return _console(sys.stderr, stderr=True)


def _console(file: Any, stderr: bool) -> Console:
    return Console(stderr=stderr, highlight=False, width=None if file.isatty() else _WIDE)


def escape(text: object) -> str:
    """The text, in which brackets are not rich's markup, and nothing that files hold is a command to the terminal."""
    shown = "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in str(text))
    return shown.replace("[", "\\[")


def size(count: float) -> str:
    """`3.38 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5 or unit == "GB":
            break
        count /= 1000
    return f"{count:.3g} {unit}" if count < 999.5 else f"{count:.0f} {unit}"
