"""What the GPU benchmarks share: the command line, a clock with cold caches, kernels by name, and the table."""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch

#: Calls in turn read as many bytes as this, each other ones: more than the second-level cache of any GPU.
ROTATE_BYTES = 160 << 20
CALLS = 16  # at least, in one timing


def parser(description: str | None) -> argparse.ArgumentParser:
    """Of a benchmark's command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--device", default="cuda", choices=["cuda", "xpu", "cpu"], help="cpu: a dry run on small shapes"
    )
    return parser


def ready(device: str) -> str:
    """What the numbers were taken on; ends the program where there is no such device."""
    if device == "cpu":
        return f"DRY RUN on a CPU, small shapes; torch {torch.__version__}"
    if not getattr(torch, device).is_available():
        sys.exit(
            f"there is no {device} device here; --device cpu runs the script on small shapes, to see that it works"
        )
    return f"{getattr(torch, device).get_device_name()}; torch {torch.__version__}"


def copies(nbytes: int, device: str) -> int:
    """How many of something that a call reads are needed for each call to find none of it in a cache."""
    return 2 if device == "cpu" else min(64, -(-ROTATE_BYTES // nbytes) + 1)


def seconds(calls: Sequence[Callable[[], object]], device: str) -> float:
    """The time of one of several calls alike, each on other memory, in turn; without launch overhead where the device has
    CUDA graphs."""
    turn = list(itertools.islice(itertools.cycle(calls), max(CALLS, len(calls)) if device != "cpu" else len(calls)))
    with torch.no_grad():
        for call in turn[:3]:
            call()
        if device == "cuda":
            graph = _graph(turn)
            return statistics.median(_replay(graph) for _ in range(7)) / len(turn)
        return statistics.median(_wall(turn, device) for _ in range(3 if device == "cpu" else 7)) / len(turn)


def _wall(turn: Sequence[Callable[[], object]], device: str) -> float:
    begin = time.perf_counter()
    for call in turn:
        call()
    if device != "cpu":
        getattr(torch, device).synchronize()
    return time.perf_counter() - begin


def _graph(turn: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in turn:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in turn:
            call()
    graph.replay()
    return graph


def _replay(graph: torch.cuda.CUDAGraph) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def launched(call: Callable[[], object], device: str) -> list[str]:
    """The kernels of a call, by the profiler's names, with microseconds; on a CPU, in a dry run, its operators."""
    kinds = torch.profiler.ProfilerActivity
    activity = {"cuda": kinds.CUDA, "xpu": kinds.XPU, "cpu": kinds.CPU}[device]
    with torch.no_grad(), torch.profiler.profile(activities=[activity]) as profile:
        call()
        if device != "cpu":
            getattr(torch, device).synchronize()
    events = [e for e in profile.events() if device == "cpu" or str(e.device_type).endswith(device.upper())]
    return [f"{e.name[:60]} {(e.device_time if device != 'cpu' else e.cpu_time):.1f}" for e in events][:12]


def kernels(module: torch.nn.Module, *args: object, device: str, **kwargs: object) -> str:
    """What runs the FP8 weights of a module on a device, or why it is not FP8."""
    import ctfp8_compile as ctfp8

    report = ctfp8.explain(module, args, kwargs, target=str(ctfp8.Target.detect(device)))
    names = {entry.kernel or entry.reason for entry in (*report.rewritten, *report.kept)}
    return f"ctfp8: {', '.join(sorted(names))}"


def row(cells: Sequence[object]) -> str:
    """One line of a Markdown table."""
    return "| " + " | ".join(map(str, cells)) + " |"


def header(cells: Sequence[str]) -> str:
    """The first two lines of a Markdown table."""
    return row(cells) + "\n" + "|---" * len(cells) + "|"
