"""How long a model waits for its compiler, by its number of layers: ctfp8, with and without regions, and bfloat16 by Inductor.

    python benchmarks/compile_time.py [--layers 12 24 48] [--ways …] [--json compile_time.json]

Writes random Llama FP8_DYNAMIC checkpoints with TinyLlama's shapes (1.1B has 22 layers) to a temporary folder. Every way runs in
two fresh processes, cold with an empty folder for Inductor's caches, warm with what the first left there: seconds, and CPU
seconds of all its processes, of a prompt of 16 tokens and one token after it with a static cache, imports and loading done;
then a decode step of the warm process, the median of 32. × is of the first way.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from checkpoints import write_llama
from fresh import measured
from rich.console import Console
from rich.table import Table

WAYS = ("bf16 Inductor", "bf16 Inductor, dynamic", "ctfp8", "ctfp8, regions")
PROMPT, TOKENS, ROOM = 16, 32, 64


@torch.no_grad()
def measure(way: str, folder: str) -> None:
    """Runs in a fresh process: prints seconds."""
    import ctfp8_compile as ctfp8
    from ctfp8_compile.hf.compat import cache_argument
    from ctfp8_compile.ops import cpu

    cpu.load()
    model = ctfp8.from_pretrained(folder, dequantize="bf16" in way)
    torch.compile(torch.nn.Linear(8, 8))(torch.randn(2, 8))  # imports the compiler
    cache = {cache_argument(model): ctfp8.static_cache(model, max_length=ROOM)}

    def step(tokens: int, position: int) -> float:
        begin = time.perf_counter()
        positions = torch.arange(position, position + tokens)[None]
        int(model(positions + 1, position_ids=positions, logits_to_keep=1, **cache).logits[0, -1].argmax())
        return time.perf_counter() - begin

    begin, used = time.perf_counter(), cpu_seconds()
    if "bf16" in way:  # by default, torch makes a graph for these sizes alone, and another for others later
        model.forward = torch.compile(model.forward, dynamic=True if "dynamic" in way else None)
    else:
        ctfp8.compile(model, options={"ctfp8.regions": way == "ctfp8, regions"})
    step(PROMPT, 0)
    step(1, PROMPT)
    first = {"seconds": time.perf_counter() - begin, "cpu": cpu_seconds() - used}
    decode = statistics.median(step(1, PROMPT + 1 + i) for i in range(TOKENS))
    print(json.dumps({**first, "decode": decode, "load": os.getloadavg()[0]}))


def cpu_seconds() -> float:
    """Of this process and of those it waited for, such as g++."""
    return sum(os.times()[:4])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", type=int, default=[12, 24, 48])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--json", type=Path, help="also write each process's numbers there")
    parser.add_argument("--measure", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(*args.measure)
        return
    table = Table(title=f"prompt and first token, {torch.get_num_threads()} threads")
    for column in ("layers", "way", "cold s", "of CPU", "warm s", "of CPU", "decode ms a step"):
        table.add_column(column)
    results: dict[str, Any] = {}
    for layers in args.layers:
        with tempfile.TemporaryDirectory() as place:
            write_llama(Path(place), layers)
            for i, way in enumerate(args.ways):
                runs = []
                for heat in ("cold", "warm"):
                    print(f"{layers} layers, {way}, {heat} …", file=sys.stderr, flush=True)
                    runs.append(measured(__file__, way, place, TORCHINDUCTOR_CACHE_DIR=f"{place}/caches-{i}"))
                results[f"{layers} {way}"] = runs
                base = results[f"{layers} {args.ways[0]}"]
                cells = [
                    f"{run[key]:.1f} ({run[key] / stock[key]:.2f}×)"
                    for run, stock in zip(runs, base, strict=True)
                    for key in ("seconds", "cpu")
                ]
                table.add_row(str(layers), way, *cells, f"{runs[1]['decode'] * 1e3:.1f}")
                if args.json is not None:
                    args.json.write_text(json.dumps(results, indent=1))
    Console(width=120).print(table)
    loads = [run["load"] for runs in results.values() for run in runs]
    print(f"Load of the machine while it ran: {min(loads):.1f} to {max(loads):.1f}.")


if __name__ == "__main__":
    main()
