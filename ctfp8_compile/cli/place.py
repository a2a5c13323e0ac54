"""Where a command is to write a file."""

from __future__ import annotations

from pathlib import Path

from ..errors import UsageError


def check_place(file: Path) -> None:
    """Returns if the folder of a file to be written exists.

    Raises:
        UsageError: it does not.
    """
    if not file.absolute().parent.is_dir():
        raise UsageError(f"{file}: the folder {file.absolute().parent} does not exist. Make it first.")
