"""The fenced blocks of the documents, and a folder in which a reader would paste them.

A block is `python`, `sh` or `text`. One that cannot run everywhere begins with a comment that says what it needs:

    # needs a GPU
"""

from __future__ import annotations

import os
import re
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
_FENCE = re.compile(r"^( *)```(.*)\n((?:.*\n)*?)\1```$", re.MULTILINE)
_NEEDS = re.compile(r"# needs (.+)")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        where: page and line, for messages.
        needs: what a machine must have to run it; empty if any can.
        follows: nothing stands between it and the block before it.
    """

    where: str
    language: str
    text: str
    needs: str
    follows: bool


def blocks(page: Path) -> list[Block]:
    """All blocks of a page, in order."""
    text, found, end = page.read_text(), [], 0
    for match in _FENCE.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        inner = textwrap.dedent(match[3])
        needs = _NEEDS.match(inner)
        follows = end > 0 and not text[end : match.start()].strip()
        found.append(Block(f"{page.relative_to(ROOT)}:{line}", match[2], inner, needs[1] if needs else "", follows))
        end = match.end()
    return found


def workplace(folder: Path) -> dict[str, str]:
    """Makes a folder look like a clone with an activated environment; returns the environment variables.

    `examples` and `benchmarks` are there, `python` and `ctfp8` are this checkout's. `make` only says what it would do, as it would
    install an environment of its own.
    """
    for name in ("examples", "benchmarks"):
        (folder / name).symlink_to(ROOT / name)
    commands = folder / "bin"
    commands.mkdir()
    for name, does in {
        "python": f'exec "{sys.executable}" "$@"',
        "ctfp8": f'exec "{sys.executable}" -m ctfp8_compile "$@"',
        "make": f'PATH="{os.environ["PATH"]}" exec make --dry-run -C "{ROOT}" "$@"',
    }.items():
        (commands / name).write_text(f"#!/bin/sh\n{does}\n")
        (commands / name).chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
