"""`ctfp8 cache list` and `ctfp8 cache clear`: what was compiled and is kept for the next process."""

from __future__ import annotations

import json
import time
from typing import Any

from rich.table import Table

from ..counted import counted
from ..errors import UsageError
from ..kept import folder
from .terminal import escape, out


def show(as_json: bool) -> None:
    """Prints a line for each kept graph, those used last first."""
    place, found = _place(), folder.entries()
    if as_json:
        about = [{**entry.facts, "bytes": entry.size, "used": entry.used} for entry in found]
        print(json.dumps({"folder": str(place), "limit": folder.limit(), "graphs": about}))
        return
    if found:
        table = Table("model", "of", "torch", "kept", "used last", "MB")
        for entry in found:
            facts = {"model": "?", "of": "", "torch": "?", "made": entry.used, **entry.facts}
            cells = (facts["model"], facts["of"], facts["torch"], _when(facts["made"]), _when(entry.used))
            table.add_row(*map(escape, cells), f"{entry.size / 1e6:.2f}")
        out().print(table)
    size = sum(entry.size for entry in found)
    print(f"{counted(len(found), 'graph')}, {size / 1e6:.1f} of {folder.limit() / 1e6:.0f} MB, in {place}")


def clear(as_json: bool) -> None:
    """Drops all kept graphs of this user."""
    place = _place()
    count, size = folder.clear()
    if as_json:
        print(json.dumps({"folder": str(place), "cleared": count, "bytes": size}))
    else:
        print(f"cleared {counted(count, 'graph')}, {size / 1e6:.1f} MB, in {place}")


def _place() -> Any:
    place = folder.place()
    if place is None:
        raise UsageError("CTFP8_CACHE_DIR is empty, so no compiled graphs are kept. Unset it, or name a folder.")
    return place


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
