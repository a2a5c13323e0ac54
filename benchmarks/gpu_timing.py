"""What the GPU benchmarks share: the device, timings by CUDA graphs with a cold cache, and the table."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch

#: Written before every timed call: more than the second-level cache of any GPU.
FLUSH_BYTES = 256 << 20
REPEATS = 10


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


def seconds(call: Callable[[], object], device: str) -> float:
    """The time of a call with cold caches, without launch overhead where the device has CUDA graphs."""
    with torch.no_grad():
        for _ in range(3):
            call()
        if device != "cuda":
            return statistics.median(_wall(call, device) for _ in range(REPEATS))
        flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
        both, alone = _graph(lambda: (flush.zero_(), call())), _graph(flush.zero_)
        return max(statistics.median(_replay(both) - _replay(alone) for _ in range(7)), 1e-9)


def _wall(call: Callable[[], object], device: str) -> float:
    begin = time.perf_counter()
    call()
    if device != "cpu":
        getattr(torch, device).synchronize()
    return time.perf_counter() - begin


def _graph(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(REPEATS):
            call()
    graph.replay()
    return graph


def _replay(graph: torch.cuda.CUDAGraph) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / REPEATS


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
