"""`pytest --record-tested`: a whole suite that passed is recorded in the package, and in the README's table of versions."""

from __future__ import annotations

import datetime
import json
import platform
from pathlib import Path
from typing import Any

import pytest

from ctfp8_compile import compat

README = Path(__file__).parent.parent.parent / "README.md"
BEGIN, END = "<!-- tested: written by pytest --record-tested -->", "<!-- /tested -->"
MARKS = "not real and not long and not writers"  #: what pyproject.toml gives every run
COLUMNS = ("torch", "transformers", "compressed-tensors", "Python", "tests passed", "on")


def refuse_a_part(config: pytest.Config) -> None:
    """Raises unless pytest was asked for the whole suite."""
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    if not whole or config.option.keyword or config.option.markexpr != MARKS:
        raise pytest.UsageError("--record-tested records whole suites only: leave out paths, -k and -m.")


def record(passed: int) -> None:
    """Adds this environment to the record, in place of its last one, and writes the README's table anew."""
    versions = {name: compat.version(name) for name in COLUMNS[:3]}
    row = {**versions, "Python": platform.python_version(), "tests passed": passed, "on": str(datetime.date.today())}
    rows = json.loads(compat.TESTED.read_text())
    rows = [r for r in rows if any(r[name] != versions[name] for name in ("torch", "transformers"))] + [row]
    rows.sort(key=lambda r: (compat.release(r["torch"]), compat.release(r["transformers"])))
    compat.TESTED.write_text("[\n" + ",\n".join(json.dumps(r) for r in rows) + "\n]\n")
    text = README.read_text()
    before, _, rest = text.partition(BEGIN)
    README.write_text(before + rendered(rows) + rest.partition(END)[2])


def rendered(rows: list[dict[str, Any]]) -> str:
    """The table as it stands in the README, with its marks."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *([str(row[column]) for column in COLUMNS] for row in rows)]
    return "\n".join([BEGIN, *("| " + " | ".join(line) + " |" for line in lines), END])
