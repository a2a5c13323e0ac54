"""Several processes that do one thing together: what one of them raises, all raise, and none waits for one that is gone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from ..errors import RankError


def is_first() -> bool:
    """Whether this is the process that writes files and prints: rank 0, or the only one."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def is_of_ranks(error: Exception) -> bool:
    """Whether it is torch.distributed that failed: another process ended, or did not answer in time."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def ended(error: Exception) -> RankError:
    """What to raise for such an error."""
    reason = str(error).strip().splitlines()[0].partition(". ")[0]
    return RankError(f"another rank ended while this one waited for it ({reason}). See what it printed.")


@contextlib.contextmanager
def together(several: bool = True) -> Iterator[None]:
    """What one rank raises inside, all raise at the end, or at their next `agree`.

    Args:
        several: whether there are other ranks; else nothing is done.
    """
    if not several:
        yield
        return
    try:
        yield
    except RankError:
        raise  # all know
    except Exception as error:
        agree(error)
        raise
    agree()


def agree(error: Exception | None = None, say: str = "") -> list[str]:
    """Waits until all ranks got here, or failed. Inside `together` it comes before any other collective.

    Args:
        error: what this rank is about to raise.
        say: what the others are told.

    Returns:
        What each rank says.

    Raises:
        RankError: another one failed, and this one did not; or it ended.
    """
    said: list[Any] = [None] * dist.get_world_size()
    try:
        dist.all_gather_object(said, (say, None if error is None else str(error) or type(error).__name__))
    except RuntimeError as gone:
        if error is None:
            raise ended(gone) from gone
        return []
    for rank, (_, failure) in enumerate(said):
        if failure is not None and error is None:
            raise RankError(f"another rank failed, and so does this one; rank {rank} says: {failure}")
    return [text for text, _ in said]
