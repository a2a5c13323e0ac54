"""What benchmarks share that measure each way in a process of its own: the process, and its memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any


def measured(script: str, *arguments: object, **environment: str) -> Any:
    """Runs `script --measure arguments…` in a fresh process, and reads what it prints last, as JSON."""
    command = [sys.executable, script, "--measure", *map(str, arguments)]
    done = subprocess.run(command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def anonymous() -> int:
    """`RssAnon` of this process in bytes. Mapped file pages are not in it: the kernel can drop them at any time."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this kernel does not report RssAnon")


class Peak:
    """The largest anonymous memory of this process from here on, looked at every 2 ms.

    Attributes:
        base: bytes at the beginning.
        most: the largest so far; final after `stop`.
    """

    def __init__(self) -> None:
        self.base = self.most = anonymous()
        self._end = threading.Event()
        self._watching = threading.Thread(target=self._watch, daemon=True)
        self._watching.start()

    def _watch(self) -> None:
        while not self._end.wait(0.002):
            self.most = max(self.most, anonymous())

    def stop(self) -> int:
        """Bytes of the peak above the beginning."""
        self._end.set()
        self._watching.join()
        return self.most - self.base
