"""One of a thing is one thing: what messages and tables count."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import ctfp8_compile as ctfp8
from ctfp8_compile.counted import agreeing, counted, such_as

PACKAGE = Path(ctfp8.__file__).parent


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "0 FP8 weights are, 0 FP8 weights, such as a,"),
        (1, "1 FP8 weight is, FP8 weight a"),
        (2, "2 FP8 weights are, 2 FP8 weights, such as a,"),
    ],
)
def test_words(number: int, words: str) -> None:
    assert (
        f"{counted(number, 'FP8 weight')} {agreeing(number, 'is', 'are')}, {such_as(number, 'FP8 weight', 'a')}"
        == words
    )


#: Said only of several, or of all there are.
SEVERAL = (
    "hf/quantizer.py",
    "hf/saving.py",
    "layers of the cache of",
    "len(layers) layers",
    "len(layers) repeated layers",
)


def uncounted() -> list[str]:
    """f-strings in which a number of things is followed by a plural: `f"{len(weights)} weights"`."""
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.JoinedStr):
                continue
            for value, after in zip(node.values, node.values[1:], strict=False):
                counts = isinstance(value, ast.FormattedValue) and re.fullmatch(
                    r"(len|sum)\(.*\)|count|total|number|n", ast.unparse(value.value)
                )
                text = after.value if isinstance(after, ast.Constant) else ""
                if counts and re.match(r" (\w+ )?\w+s\b", str(text)):
                    found.append(f"{file.relative_to(PACKAGE)}:{node.lineno}: {ast.unparse(value.value)}{text}")
    return [line for line in found if not any(several in line for several in SEVERAL)]


def test_every_number_of_things_is_counted() -> None:
    assert not uncounted()
