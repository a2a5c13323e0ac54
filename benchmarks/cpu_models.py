"""Prefill, decode and peak anonymous memory of whole models on this CPU: ctfp8 against bfloat16, eager and Inductor.

    python benchmarks/cpu_models.py [--models llama moe] [--rounds 2]

Writes a random 1.1B Llama and a ~1 GB Qwen3-MoE FP8_DYNAMIC checkpoint to a temporary folder. Every way runs in a fresh
process, all ways once per round; times are the best round's medians, memory is the worst round's peak of `RssAnon` over
load, compile and generation, above the baseline after imports. Prompt of 256 tokens, then 32 tokens one at a time, batch 1,
static cache of 320. The bfloat16 model is the same checkpoint, dequantized.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from checkpoints import write_llama, write_moe
from fresh import Peak, measured
from rich.console import Console
from rich.table import Table

WAYS = ("ctfp8", "bf16 eager", "bf16 Inductor")
CHECKPOINTS = {
    "llama": lambda f: write_llama(f, 22),
    "moe": lambda f: write_moe(f, 1.0),
}
PROMPT, TOKENS, CACHE = 256, 32, 320


def steps(model: Any, forward: Any) -> tuple[float, list[float]]:
    """One generation: seconds of the prefill, and of each decode step."""
    import ctfp8_compile as ctfp8
    from ctfp8_compile.hf.compat import cache_argument

    cache = {cache_argument(model): ctfp8.static_cache(model, max_length=CACHE)}
    ids, position, times = torch.arange(PROMPT)[None], torch.arange(PROMPT)[None], []
    for step in range(TOKENS + 1):
        begin = time.perf_counter()
        logits = forward(ids, **cache, position_ids=position, logits_to_keep=1).logits
        ids = logits[:, -1:].argmax(-1)
        times.append(time.perf_counter() - begin)
        position = torch.tensor([[PROMPT + step]])
    return times[0], times[1:]


@torch.no_grad()
def measure(way: str, folder: str) -> None:
    """Runs in a fresh process: prints seconds and bytes."""
    import transformers.models.llama.modeling_llama
    import transformers.models.qwen3_moe.modeling_qwen3_moe  # noqa: F401 - imports belong to the baseline

    import ctfp8_compile as ctfp8

    if way != "bf16 eager":  # so does the compiler
        torch.compile(torch.nn.Linear(8, 8))(torch.randn(2, 8))
    memory = Peak()
    model = ctfp8.from_pretrained(folder, dequantize=way != "ctfp8")
    backend = {"ctfp8": "ctfp8", "bf16 Inductor": "inductor"}.get(way)
    forward = model if backend is None else torch.compile(model.forward, backend=backend, fullgraph=True, dynamic=False)
    steps(model, forward)
    runs = [steps(model, forward) for _ in range(3)]
    prefill = statistics.median(first for first, _ in runs)
    decode = statistics.median(step for _, rest in runs for step in rest)
    print(json.dumps({"prefill": prefill, "decode": decode, "memory": memory.stop()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(CHECKPOINTS), default=list(CHECKPOINTS))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--measure", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(*args.measure)
        return
    console = Console()
    table = Table(title=f"{torch.get_num_threads()} threads; × is bf16 eager / this way")
    for column in ("model", "way", "prefill 256", "decode a token", "peak memory / file"):
        table.add_column(column)
    for name in args.models:
        with tempfile.TemporaryDirectory() as folder:
            with console.status(f"{name}: writing the checkpoint …"):
                CHECKPOINTS[name](Path(folder))
            size = (Path(folder) / "model.safetensors").stat().st_size
            results: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
            for turn in range(args.rounds):
                for way in WAYS:
                    with console.status(f"{name}: {way}, round {turn + 1} of {args.rounds} …"):
                        results[way].append(measured(__file__, way, folder))
        best = {
            way: {key: (max if key == "memory" else min)(run[key] for run in runs) for key in runs[0]}
            for way, runs in results.items()
        }
        stock = best["bf16 eager"]
        for way, r in best.items():
            cells = [f"{r[key] * 1e3:.1f} ms ({stock[key] / r[key]:.2f}×)" for key in ("prefill", "decode")]
            table.add_row(f"{name}, {size / 1e9:.2f} GB", way, *cells, f"{r['memory'] / size:.2f}×")
    console.print(table)


if __name__ == "__main__":
    main()
