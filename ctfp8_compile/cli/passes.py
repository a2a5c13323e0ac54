"""`ctfp8 explain --passes`: the pipeline as one line, what each pass did, and the graph after each."""

from __future__ import annotations

from rich.table import Table

from ..passes import parse
from ..report import Ran
from .terminal import escape, out


def print_line(line: str) -> None:
    """The pipeline, as `--passes` reads it."""
    print(parse(line))


def print_passes(ran: tuple[Ran, ...]) -> None:
    """A row for each pass; the graph behind those that ran, where a report has it."""
    table = Table("pass", "stage", "matches", box=None, header_style="dim", pad_edge=False)
    for one in ran:
        matches = f"[dim]skipped: {escape(one.skipped)}[/]" if one.skipped else str(one.matches)
        table.add_row(one.name, one.stage.replace("_", "-"), matches)
    out().print(table)
    for one in ran:
        if one.graph:
            print(f"\n# after {one.name}\n{one.graph}")
