"""A command that torchrun starts several times: results, progress and an error are printed once."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta

import torch.distributed as dist


@contextlib.contextmanager
def quiet_but_first() -> Iterator[None]:
    """Results and progress are those of rank 0; what others print inside goes nowhere."""
    with contextlib.ExitStack() as printing:
        if os.environ.get("RANK", "0") != "0":
            nowhere = printing.enter_context(open(os.devnull, "w"))
            printing.enter_context(contextlib.redirect_stdout(nowhere))
            printing.enter_context(contextlib.redirect_stderr(nowhere))
        yield


def fails_first() -> bool:
    """Whether no other rank failed before this one.

    It tells what failed, whichever it is: the failure may be its own (memory, a file of its machine), and torchrun ends
    the others as soon as one is gone, before they have told anything. Asked of the store that torchrun's agent keeps;
    where there is none, or it is gone, each rank tells.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    try:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=5))
        return store.add(f"ctfp8/failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT')}", 1) == 1
    except (dist.DistError, RuntimeError):
        return True


def leave() -> None:
    """Closes the group of processes, if there is one: torch warns where it is left open."""
    if dist.is_initialized():
        dist.destroy_process_group()
