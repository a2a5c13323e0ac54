"""The end of the command's process: nothing that was to happen is lost, and nothing is said that the command did not say."""

from __future__ import annotations

import subprocess
import sys

import pytest

CHILD = """
import atexit, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from ctfp8_compile.cli import process

class Garbage:
    def __del__(self):
        print("garbage")

def command(prog_name):
    cycle = Garbage()
    cycle.itself = cycle
    atexit.register(print, "exit function")
    pool = ThreadPoolExecutor(1)
    pool.submit(lambda: (time.sleep(0.2), print("worker")))
    threading.Thread(target=lambda: (time.sleep(0.4), print("thread"))).start()
    print("command", prog_name)
    sys.stderr.write("unflushed")
    {end}

import gc
gc.disable()
process.app = command
process.main()
"""
SAID = ["command ctfp8", "worker", "thread", "exit function"]


@pytest.mark.parametrize(
    ("end", "code", "fast", "stderr"),
    [
        ("sys.exit()", 0, True, "unflushed"),
        ("sys.exit(0)", 0, True, "unflushed"),
        ("sys.exit(3)", 3, True, "unflushed"),
        ("sys.exit('a sentence')", 1, False, "a sentence"),
        ("raise ValueError('a bug')", 1, False, "ValueError: a bug"),
        ("pass", 0, False, "unflushed"),
    ],
)
def test_a_process_ends_with_all_done_and_its_code(end, code, fast, stderr):
    run = subprocess.run([sys.executable, "-c", CHILD.format(end=end)], capture_output=True, text=True)
    assert run.returncode == code, run.stderr
    assert [line for line in run.stdout.splitlines() if line != "garbage"] == SAID
    assert ("garbage" not in run.stdout) == fast
    assert stderr in run.stderr


@pytest.mark.parametrize("command", [["inspect", "/no/such"], ["explain", "--passes"], ["--version"], ["--help"]])
def test_modules_bound_by_nanobind_report_no_leaks(command):
    """Triton is since 3.9: what is alive when Python ends is listed on stderr, after the command's own last word."""
    pytest.importorskip("triton")
    child = (
        "import sys, triton._C.libtriton; from ctfp8_compile.cli.process import main; "
        f"sys.argv[1:] = {command!r}; main()"
    )
    run = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True)
    assert "nanobind" not in run.stderr
    assert not run.stderr or run.stderr.startswith("error: /no/such"), run.stderr
