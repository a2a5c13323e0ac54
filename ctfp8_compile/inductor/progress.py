"""What is being compiled, which stage it is in and for how long, on the terminal while it lasts; to the log everywhere."""

from __future__ import annotations

import logging
import os
import sys
import time

from rich.console import Console
from rich.progress import Progress as Live
from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

log = logging.getLogger("ctfp8_compile")


class Progress:
    """Shows `what: stage … 0:00:12` on stderr, if that is a terminal (of several processes, the first one's), until `stop`."""

    def __init__(self, what: str):
        self.what, self.begin = what, time.monotonic()
        self._live: Live | None = None
        log.info("%s …", what)
        if sys.stderr.isatty() and os.environ.get("RANK", "0") == "0":
            columns = SpinnerColumn(), TextColumn("{task.description} …"), TimeElapsedColumn()
            self._live = Live(*columns, console=Console(stderr=True), transient=True)
            self._task = self._live.add_task(what)
            self._live.start()
        _shown.append(self)

    def show(self, stage: str) -> None:
        if self._live is not None:
            self._live.update(self._task, description=f"{self.what}: {stage}")

    def stop(self) -> None:
        if self._live is not None:
            self._live.stop()
        if self in _shown:
            _shown.remove(self)
        log.info("%s took %.0f s", self.what, time.monotonic() - self.begin)


#: Those that run, the newest last.
_shown: list[Progress] = []


def stage(what: str) -> None:
    """The compilation that runs, if one does, is at this stage from here on."""
    if _shown:
        log.info("%s: %s", _shown[-1].what, what)
        _shown[-1].show(what)


def show(what: str) -> None:
    """The same on the terminal alone: it changes many times a second."""
    if _shown:
        _shown[-1].show(what)
