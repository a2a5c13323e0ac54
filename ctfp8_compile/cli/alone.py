"""A command line in which an option may stand alone: `ctfp8 explain CKPT --passes` means all, `--passes match,rewrite` these."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from typer.core import TyperCommand

#: Names with commas, and settings in braces: nothing that a checkpoint is called by, unless a folder has the name.
_LINE = re.compile(r"[a-z][\w-]*(\{[^{}]*\})?(,[a-z][\w-]*(\{[^{}]*\})?)*")


class PassesAlone(TyperCommand):
    """A command whose `--passes` may stand alone, which typer knows of no option with a value."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, list(_written_out(args)))


def _written_out(args: list[str]) -> Iterator[str]:
    for arg, following in zip(args, [*args[1:], "--"], strict=False):
        yield arg
        if arg == "--passes" and (not _LINE.fullmatch(following) or Path(following).is_dir()):
            yield ""
