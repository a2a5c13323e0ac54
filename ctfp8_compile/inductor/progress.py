"""What is being compiled and for how long, on the terminal while it lasts; to the log everywhere."""

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
    """Shows `what … 0:00:12` on stderr, if that is a terminal (of several processes, the first one's), until `stop`."""

    def __init__(self, what: str):
        self.what, self.begin = what, time.monotonic()
        self._live: Live | None = None
        log.info("%s …", what)
        if sys.stderr.isatty() and os.environ.get("RANK", "0") == "0":
            columns = SpinnerColumn(), TextColumn("{task.description} …"), TimeElapsedColumn()
            self._live = Live(*columns, console=Console(stderr=True), transient=True)
            self._live.add_task(what)
            self._live.start()

    def stop(self) -> None:
        if self._live is not None:
            self._live.stop()
        log.info("%s took %.0f s", self.what, time.monotonic() - self.begin)
