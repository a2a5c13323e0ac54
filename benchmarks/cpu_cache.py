"""What a key-value cache costs on this CPU: attention alone, and decode steps of a whole model, by allocated and filled tokens.

    python benchmarks/cpu_cache.py [--filled 256 2048 8192] [--layers 22] [--seconds 4]

Attention: ours on a bf16 and on an FP8 cache against torch's `scaled_dot_product_attention` on bf16 with `enable_gqa` (it repeats
no heads), in the shapes of TinyLlama 1.1B and Llama 3 8B. Decode: a random 1.1B Llama FP8_DYNAMIC checkpoint, static caches; the
same weights dequantized, eager and by Inductor. All calls of a row alternate; × is the first column over it.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from checkpoints import write_llama
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
    codes = [tuple(quantize_cached_steps(apply, t, None) for t in pair) for pair in plain]
    query = torch.randn(1, heads * group, 1, width).to(BF16)
    mask = torch.zeros(1, 1, 1, length, dtype=BF16)
    mask[..., filled:] = -math.inf

    def theirs(turn: int) -> object:
        return torch.nn.functional.scaled_dot_product_attention(query, *plain[turn % COPIES], mask, enable_gqa=True)

    def ours(caches: list[tuple[torch.Tensor, ...]]) -> Callable[[int], object]:
        return lambda turn: torch.ops.ctfp8.attention(query, *caches[turn % COPIES], None, None, mask, width**-0.5)

    return [theirs, ours(plain), ours(codes)]


@torch.no_grad()
def decode_call(model: Any, forward: Any, length: int, filled: int, dtype: Any) -> Callable[[int], object]:
    """One step with `filled` tokens in a cache for `length`; each call is the step after the same text."""
    cache = ctfp8.static_cache(model, 1, length, dtype=dtype)

    @torch.no_grad()
    def step(turn: int) -> object:
        for layer in cache.layers:
            layer.cumulative_length.fill_(filled - 1)
        cache.filled = filled - 1
        position = torch.tensor([[filled - 1]])
        arguments = {cache_argument(model): cache}
        return forward(
            torch.tensor([[turn % 100]]), position_ids=position, logits_to_keep=1, use_cache=True, **arguments
        ).logits

    return step


def row(table: Table, name: str, times: list[float]) -> None:
    table.add_row(name, *(f"{t * 1e3:.2f} ms ({times[0] / t:.2f}×)" for t in times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--filled", nargs="+", type=int, default=[256, 2048, 8192])
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--seconds", type=float, default=4, help="of each comparison")
    parser.add_argument("--only", choices=("attention", "allocated", "decode"))
    parser.add_argument(
        "--cpu-time", action="store_true", help="one thread, and its own time: on a machine busy with others"
    )
    args = parser.parse_args()
    clock = time.thread_time if args.cpu_time else time.perf_counter
    if args.cpu_time:
        torch.set_num_threads(1)
    console = Console()
    cpu_kernels.load()
    if args.only in (None, "attention"):
        table = Table(
            "shape", "torch, bf16", "ours, bf16", "ours, FP8", title=f"attention, {torch.get_num_threads()} threads"
        )
        for name, shape in SHAPES.items():
            for length, filled in [(max(args.filled), min(args.filled)), *((n, n) for n in args.filled)]:
                row(
                    table,
                    f"{name}, {filled} of {length}",
                    interleave(attention_calls(*shape, length, filled), args.seconds, clock),
                )
        console.print(table)
    if args.only == "attention":
        return
    with tempfile.TemporaryDirectory() as folder:
        write_llama(Path(folder), args.layers)
        model = ctfp8.from_pretrained(folder)
        fp8 = torch.compile(model.forward, backend="ctfp8", fullgraph=True, dynamic=False)
        if args.only in (None, "allocated"):
            table = Table("decode of ours, 256 tokens", "in a cache of 512", "in a cache of 8192")
            for dtype in ("bf16", "fp8"):
                row(
                    table,
                    dtype,
                    interleave([decode_call(model, fp8, n, 256, dtype) for n in (512, 8192)], args.seconds, clock),
                )
            console.print(table)
        if args.only in (None, "decode"):
            plain = ctfp8.from_pretrained(folder, dequantize=True)
            inductor = torch.compile(plain.forward, backend="inductor", fullgraph=True, dynamic=False)
            ways = ((plain, plain, "bf16"), (plain, inductor, "bf16"), (model, fp8, "bf16"), (model, fp8, "fp8"))
            table = Table("decode", "bf16 eager", "bf16 Inductor", "ctfp8, bf16 cache", "ctfp8, FP8 cache")
            for filled in args.filled:
                calls = [decode_call(m, f, filled, filled, dtype) for m, f, dtype in ways]
                row(table, f"{filled} of {filled}", interleave(calls, args.seconds, clock))
            console.print(table)


if __name__ == "__main__":
    main()
