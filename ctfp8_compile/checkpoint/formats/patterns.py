"""How writers name the modules that a config leaves out, as the regular expressions that compressed-tensors takes."""

from __future__ import annotations

import fnmatch
import re


def prefix(name: str) -> str:
    """As transformers reads a module to leave alone: from the start to a dot, or the end of a name; dots are wildcards. What is
    no expression, and has a star, is a pattern as shells have them."""
    try:
        re.compile(name)
    except re.error:
        if "*" in name:
            return wildcard(name)
    return rf"re:(?:{name})(?:(?<=\.)|(?=\.|$))|.*{re.escape(name)}$"


def wildcard(name: str) -> str:
    """As ModelOpt reads one: `*` stands for anything, and what lies inside a module named is excluded with it."""
    return f"re:{fnmatch.translate(name)}|{fnmatch.translate(name + '.*')}"


def glob(name: str) -> str:
    """As Quark reads one: `*` stands for anything, and the whole name has to match."""
    return f"re:{fnmatch.translate(name)}"


def found(expression: str) -> str:
    """As AutoRound and GPTQModel read one: the expression may stand anywhere in a name."""
    return f"re:.*(?:{expression})"


def inside(block: str) -> str:
    """Every module of a block, such as `model.layers`."""
    return rf"re:{re.escape(block)}\."
