"""What a key-value cache costs on this CPU: attention alone, and decode steps of a whole model, by allocated and filled tokens.

    python benchmarks/cpu_cache.py [--filled 256 2048 8192 32768] [--layers 22] [--seconds 4] [--only PART] [--cpu-time]

Attention: ours on a bf16 and on an FP8 cache against torch's `scaled_dot_product_attention` on bf16 with `enable_gqa` (it repeats
no heads), in the shapes of TinyLlama 1.1B and Llama 3 8B. Decode: a random 1.1B Llama FP8_DYNAMIC checkpoint, static caches; the
same weights dequantized, eager and by Inductor (not with `--ours`). Prefill of 512 tokens into both kinds of cache. All calls of
a row alternate; × is the first column over it. `--only llama.cpp`, where its Python package is installed: the same model as Q8_0,
a decode step with a float16 and with a Q8_0 cache, in processes of their own.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llamacpp
import torch
from checkpoints import write_llama
from fresh import measured
from rich.console import Console
from rich.table import Table
from timing import interleave

import ctfp8_compile as ctfp8
from ctfp8_compile.hf.compat import cache_argument
from ctfp8_compile.ops import apply
from ctfp8_compile.ops import cpu as cpu_kernels
from ctfp8_compile.ops.fp8 import quantize_cached_steps

SHAPES = {"4 × 8 heads of 64": (4, 8, 64), "8 × 4 heads of 128": (8, 4, 128)}
BF16 = torch.bfloat16
#: Caches that calls go through in turn, so that each is read from memory.
COPIES = 8


def attention_calls(heads: int, group: int, width: int, length: int, filled: int) -> list[Callable[[int], object]]:
    plain = [tuple(torch.randn(1, heads, length, width).to(BF16) for _ in "kv") for _ in range(COPIES)]
    fp8 = [tuple(quantize_cached_steps(apply, t, None) for t in pair) for pair in plain]
    query = torch.randn(1, heads * group, 1, width).to(BF16)
    mask = torch.zeros(1, 1, 1, length, dtype=BF16)
    mask[..., filled:] = -math.inf

    def theirs(turn: int) -> object:
        return torch.nn.functional.scaled_dot_product_attention(query, *plain[turn % COPIES], mask, enable_gqa=True)

    def ours(caches: list[tuple[torch.Tensor, ...]]) -> Callable[[int], object]:
        return lambda turn: torch.ops.ctfp8.attention(query, *caches[turn % COPIES], None, None, mask, width**-0.5)

    return [theirs, ours(plain), ours(fp8)]


@torch.no_grad()
def decode_call(
    model: Any, forward: Any, length: int, filled: int, dtype: Any, new: int = 1
) -> Callable[[int], object]:
    """`new` tokens, the last of `filled` in a cache for `length`; each call comes after the same text."""
    cache = ctfp8.static_cache(model, 1, length, dtype=dtype)
    position = torch.arange(filled - new, filled)[None]

    @torch.no_grad()
    def step(turn: int) -> object:
        for layer in cache.layers:
            layer.cumulative_length.fill_(filled - new)
        arguments = {cache_argument(model): cache}
        ids = (position + turn) % 100
        return forward(ids, position_ids=position, logits_to_keep=1, use_cache=True, **arguments).logits

    return step


def cache_bytes(model: Any, length: int, dtype: Any) -> int:
    return sum(
        t.nbytes for layer in ctfp8.static_cache(model, 1, length, dtype).layers for t in (layer.keys, layer.values)
    )


def row(table: Table, name: str, times: list[float], *more: str) -> None:
    table.add_row(name, *(f"{t * 1e3:.2f} ms ({times[0] / t:.2f}×)" for t in times), *more)


def of_llamacpp(path: Path, filled: int, q8_cache: bool) -> float:
    """Runs in a fresh process: seconds of a step, the last of `filled` tokens, the median of 16."""
    chunk = 256
    call = llamacpp.load(path, len(os.sched_getaffinity(0)), q8_cache)(1, filled, chunk)
    for begin in range(0, filled - 1, chunk):
        call(min(chunk, filled - 1 - begin), begin)
    times = []
    for _ in range(17):
        begin = time.perf_counter()
        call(1, filled - 1)
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


def main() -> None:
    args = options().parse_args()
    if args.measure:
        gguf, filled, q8 = args.measure
        print(json.dumps(of_llamacpp(Path(gguf), int(filled), q8 == "1")))
        return
    clock = time.thread_time if args.cpu_time else time.perf_counter
    if args.cpu_time:
        torch.set_num_threads(1)
    cpu_kernels.load()
    torch._dynamo.config.recompile_limit = 64  # a graph for each size of a cache
    compare = functools.partial(interleave, seconds=args.seconds, clock=clock)
    console = Console()
    if args.only in (None, "attention"):
        console.print(attention_alone(args.filled, compare))
    if args.only == "attention":
        return
    with tempfile.TemporaryDirectory() as folder:
        write_llama(Path(folder), args.layers)
        if args.only == "llama.cpp":
            console.print(decode_by_llamacpp(Path(folder), args.filled))
            return
        model = ctfp8.from_pretrained(folder)
        fp8 = torch.compile(model.forward, backend="ctfp8", fullgraph=True, dynamic=False)
        if args.only in (None, "allocated"):
            table = Table("decode of ours, 256 tokens", "in a cache of 512", "in a cache of 8192")
            for dtype in ("bf16", "fp8"):
                row(table, dtype, compare([decode_call(model, fp8, n, 256, dtype) for n in (512, 8192)]))
            console.print(table)
        if args.only in (None, "prefill"):
            table = Table("512 tokens into a cache of 1024", "bf16", "FP8")
            calls = [decode_call(model, fp8, 1024, 512, dtype, new=512) for dtype in ("bf16", "fp8")]
            row(table, "ctfp8", compare(calls))
            console.print(table)
        if args.only in (None, "decode"):
            ways = {} if args.ours else ways_of_bf16(folder)
            ways |= {"ctfp8, bf16 cache": (model, fp8, "bf16"), "ctfp8, FP8 cache": (model, fp8, "fp8")}
            console.print(decode(ways, args.filled, compare))


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--filled", nargs="+", type=int, default=[256, 2048, 8192, 32768])
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--seconds", type=float, default=4, help="of each comparison")
    parser.add_argument("--only", choices=("attention", "allocated", "prefill", "decode", "llama.cpp"))
    parser.add_argument("--ours", action="store_true", help="without the bf16 models")
    parser.add_argument(
        "--cpu-time", action="store_true", help="one thread, and its own time: on a machine busy with others"
    )
    parser.add_argument("--measure", nargs=3, metavar=("GGUF", "FILLED", "Q8"), help=argparse.SUPPRESS)
    return parser


def attention_alone(sizes: list[int], compare: Callable[..., list[float]]) -> Table:
    """The operator, with caches of a size that are full, and a large one that holds little."""
    threads = torch.get_num_threads()
    table = Table("shape", "torch, bf16", "ours, bf16", "ours, FP8", title=f"attention, {threads} threads")
    for name, shape in SHAPES.items():
        for length, filled in [(max(sizes), min(sizes)), *((n, n) for n in sizes)]:
            row(table, f"{name}, {filled} of {length}", compare(attention_calls(*shape, length, filled)))
    return table


def decode_by_llamacpp(folder: Path, sizes: list[int]) -> Table:
    llamacpp.write_gguf(folder, folder / "q8_0.gguf")
    table = Table("decode by llama.cpp", "float16 cache", "Q8_0 cache")
    for filled in sizes:
        times = [measured(__file__, folder / "q8_0.gguf", filled, q8) for q8 in (0, 1)]
        row(table, f"{filled} of {filled}", times)
    return table


Ways = dict[str, tuple[Any, Any, str]]
"""By name, a model, what runs a step of it, and the dtype of its cache."""


def ways_of_bf16(folder: str) -> Ways:
    plain = ctfp8.from_pretrained(folder, dequantize=True)
    inductor = torch.compile(plain.forward, backend="inductor", fullgraph=True, dynamic=False)
    return {"bf16 eager": (plain, plain, "bf16"), "bf16 Inductor": (plain, inductor, "bf16")}


def decode(ways: Ways, sizes: list[int], compare: Callable[..., list[float]]) -> Table:
    """A step of each way with caches that are full; the last way's is ours in FP8."""
    table = Table("decode", *ways, "bytes of the FP8 cache")
    model = ways["ctfp8, FP8 cache"][0]
    for filled in sizes:
        times = compare([decode_call(m, f, filled, filled, dtype) for m, f, dtype in ways.values()])
        kept = [cache_bytes(model, filled, dtype) for dtype in ("bf16", "fp8")]
        row(table, f"{filled} of {filled}", times, f"{kept[1] / kept[0]:.3f}× of bf16")
    return table


if __name__ == "__main__":
    main()
