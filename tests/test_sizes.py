"""Sizes that a reader takes in: no file over 400 lines, no function over 60, in the package and the benchmarks."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(
    file
    for folder in ("ctfp8_compile", "benchmarks", "examples")
    for file in (ROOT / folder).rglob("*")
    if file.suffix in (".py", ".cpp", ".h")
)


def functions(source: str) -> Iterator[tuple[str, int]]:
    """Names of functions and methods, those within others too, and their lines from `def` on."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            yield node.name, node.end_lineno - node.lineno + 1


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_file_and_its_functions_are_short(file: Path) -> None:
    source = file.read_text()
    long = {""} if len(source.splitlines()) > 400 else set()  # look for the second idea in it
    if file.suffix == ".py":
        long |= {name for name, lines in functions(source) if lines > 60}
    assert not long


def test_a_long_function_is_seen() -> None:
    assert len(FILES) > 150
    body = "    x = 1\n" * 60
    found = dict(functions(f"class C:\n    def f(self):\n        async def g():\n            pass\n\ndef h():\n{body}"))
    assert found == {"f": 3, "g": 2, "h": 61}
