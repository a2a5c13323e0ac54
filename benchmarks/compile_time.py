"""How long a model waits for its compiler, by its number of layers: ctfp8, kept or not, with and without regions, and bfloat16.

    python benchmarks/compile_time.py [--layers 12 24 48] [--ways …] [--json compile_time.json]

Writes random Llama FP8_DYNAMIC checkpoints with TinyLlama's shapes (1.1B has 22 layers) to a temporary folder. Every way runs in
fresh processes, cold with empty folders for Inductor's caches and for kept graphs, warm with what the first left there: seconds,
and CPU seconds of all its processes, of a prompt of 16 tokens and one token after it with a static cache, imports and loading
done; then a decode step of the warm process, the median of 32. A third process, warm, too, is measured from its start, imports
and loading included; of these, only a kept graph and an artifact, which `ctfp8 export --cache` writes, need not import Inductor.
× is of the first way. MB: what "ctfp8, kept" keeps, in `CTFP8_CACHE_DIR`; the other ways keep nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from checkpoints import write_llama
from fresh import measured
from rich.console import Console
from rich.table import Table

WAYS = ("bf16 Inductor", "bf16 Inductor, dynamic", "ctfp8", "ctfp8, regions", "ctfp8, kept", "artifact")
HEATS = ("cold", "warm", "start")
PROMPT, TOKENS, ROOM = 16, 32, 64


@torch.no_grad()
def measure(way: str, folder: str, heat: str) -> None:
    """Runs in a fresh process: prints seconds."""
    step = stepping(way, folder, heat)
    whole = heat == "start"
    begin, used = (float(os.environ["BEGIN"]), 0.0) if whole else (time.time(), cpu_seconds())
    step(PROMPT, 0)
    step(1, PROMPT)
    first = {"seconds": time.time() - begin, "cpu": cpu_seconds() - used}
    decode = statistics.median(step(1, PROMPT + 1 + i) for i in range(TOKENS))
    print(json.dumps({**first, "decode": decode, "load": os.getloadavg()[0]}))


def stepping(way: str, folder: str, heat: str) -> Callable[[int, int], float]:
    """What runs so many tokens from a position on, and returns the seconds it took."""
    import ctfp8_compile as ctfp8

    if way == "artifact":
        artifact = ctfp8.load(f"{folder}/artifact.pt2")
        return timed(lambda positions: artifact(positions + 1, positions[0, 0])[0, -1])
    from ctfp8_compile.hf.compat import cache_argument
    from ctfp8_compile.ops import cpu

    cpu.load()
    model = ctfp8.from_pretrained(folder, dequantize="bf16" in way)
    if heat != "start":
        torch.compile(torch.nn.Linear(8, 8))(torch.randn(2, 8))  # imports the compiler
    cache = {cache_argument(model): ctfp8.static_cache(model, max_length=ROOM)}
    if "bf16" in way:  # by default, torch makes a graph for these sizes alone, and another for others later
        model.forward = torch.compile(model.forward, dynamic=True if "dynamic" in way else None)
    else:
        ctfp8.compile(model, options={"ctfp8.regions": way != "ctfp8"})
    return timed(
        lambda positions: model(positions + 1, position_ids=positions, logits_to_keep=1, **cache).logits[0, -1]
    )


def timed(logits: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[int, int], float]:
    def step(tokens: int, position: int) -> float:
        begin = time.perf_counter()
        int(logits(torch.arange(position, position + tokens)[None]).argmax())
        return time.perf_counter() - begin

    return step


def export(folder: str) -> None:
    command = [sys.executable, "-m", "ctfp8_compile", "export", folder, f"{folder}/artifact.pt2", "--cache", str(ROOM)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def cpu_seconds() -> float:
    """Of this process and of those it waited for, such as g++."""
    return sum(os.times()[:4])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", type=int, default=[12, 24, 48])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--json", type=Path, help="also write each process's numbers there")
    parser.add_argument("--measure", nargs=3, metavar=("WAY", "FOLDER", "HEAT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(*args.measure)
        return
    table = Table(title=f"prompt and first token, {torch.get_num_threads()} threads; seconds, and CPU seconds")
    for column in ("layers", "way", "cold", "CPU", "warm", "CPU", "from its start", "CPU", "MB", "decode ms a step"):
        table.add_column(column)
    results: dict[str, Any] = {}
    for layers in args.layers:
        with tempfile.TemporaryDirectory() as place:
            write_llama(Path(place), layers)
            if "artifact" in args.ways:
                export(place)
            for way in args.ways:
                runs = results[f"{layers} {way}"] = {
                    heat: run(way, place, heat, layers) for heat in HEATS if warms(way, heat)
                }
                stock = results[f"{layers} {args.ways[0]}"]
                cells = [
                    f"{runs[heat][key]:.1f} ({runs[heat][key] / stock[heat][key]:.2f}×)" if heat in runs else ""
                    for heat in HEATS
                    for key in ("seconds", "cpu")
                ]
                runs["start"]["bytes"] = size = sum(f.stat().st_size for f in Path(place, "kept").rglob("*.kept"))
                kept = f"{size / 1e6:.2f}" if way == "ctfp8, kept" else ""
                table.add_row(str(layers), way, *cells, kept, f"{runs['start']['decode'] * 1e3:.1f}")
                if args.json is not None:
                    args.json.write_text(json.dumps(results, indent=1))
    Console(width=150).print(table)
    loads = [run["load"] for runs in results.values() for run in runs.values()]
    print(f"Load of the machine while it ran: {min(loads):.1f} to {max(loads):.1f}.")


def warms(way: str, heat: str) -> bool:
    """Whether there is anything to measure: an artifact has no compiler that might be cold."""
    return way != "artifact" or heat == "start"


def run(way: str, place: str, heat: str, layers: int) -> Any:
    print(f"{layers} layers, {way}, {heat} …", file=sys.stderr, flush=True)
    keeps = {"CTFP8_CACHE_DIR": f"{place}/kept" if way == "ctfp8, kept" else "", "XDG_CONFIG_HOME": f"{place}/config"}
    inductor = f"{place}/caches-{WAYS.index(way)}"
    return measured(__file__, way, place, heat, TORCHINDUCTOR_CACHE_DIR=inductor, BEGIN=str(time.time()), **keeps)


if __name__ == "__main__":
    main()
