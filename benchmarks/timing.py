"""What the CPU benchmarks share: alternating timings of calls that each read cold weights."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

#: Copies of a weight together exceed this, a few times the third-level cache.
COLD_BYTES = 256 << 20


def read_rate(repeats: int = 5) -> float:
    """Bytes a second of a plain pass over memory."""
    data = torch.ones(COLD_BYTES // 8, dtype=torch.int64)
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        data.sum()
        times.append(time.perf_counter() - begin)
    return COLD_BYTES / min(times)


def interleave(
    calls: list[Callable[[int], object]], seconds: float, clock: Callable[[], float] = time.perf_counter
) -> list[float]:
    """The median time of each call, given the number of the round, by a clock; rounds alternate between the calls."""
    for call in calls:
        call(0), call(1)
    times: list[list[float]] = [[] for _ in calls]
    end, turn = time.perf_counter() + seconds, 0
    while time.perf_counter() < end or turn < 7:
        for call, took in zip(calls, times, strict=True):
            begin = clock()
            call(turn)
            took.append(clock() - begin)
        turn += 1
    return [statistics.median(took) for took in times]
