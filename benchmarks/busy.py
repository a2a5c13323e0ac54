"""How much slower a decode step becomes when other programs keep the cores busy: ctfp8 against bfloat16, eager and Inductor.

    python benchmarks/busy.py [--layers 8] [--busy 2] [--seconds 4] [--rounds 3]

Writes a random Llama FP8_DYNAMIC checkpoint to a temporary folder. Every way runs in a fresh process: decode steps of one
sequence without, then with that many processes that do nothing but count, in turns. A time is all seconds of such turns over
all their steps: a step that waits for others is not averaged away.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from checkpoints import write_llama
from fresh import measured
from rich.console import Console
from rich.table import Table

WAYS = ("ctfp8", "bf16 eager", "bf16 Inductor")
CACHE = 256


@torch.no_grad()
def measure(way: str, folder: str, busy: int, seconds: float, rounds: int) -> None:
    """Runs in a fresh process: prints seconds a step on the machine as it is, and on the busy one."""
    import ctfp8_compile as ctfp8
    from ctfp8_compile.hf.compat import cache_argument

    model = ctfp8.from_pretrained(folder, dequantize=way != "ctfp8")
    backend = {"ctfp8": "ctfp8", "bf16 Inductor": "inductor"}.get(way)
    forward = model if backend is None else torch.compile(model.forward, backend=backend, fullgraph=True, dynamic=False)

    def decode(seconds: float) -> tuple[int, float]:
        """Generates for that long: how many tokens, in how many seconds."""
        begin = time.perf_counter()
        tokens = 0
        while time.perf_counter() - begin < seconds:
            cache = {cache_argument(model): ctfp8.static_cache(model, max_length=CACHE)}
            ids = torch.tensor([[1]])
            for position in range(CACHE):
                ids = forward(ids, **cache, position_ids=torch.tensor([[position]])).logits[:, -1:].argmax(-1)
                tokens += 1
                if time.perf_counter() - begin >= seconds:
                    break
        return tokens, time.perf_counter() - begin

    decode(0), decode(1)
    quiet, crowded = [0.0, 0.0], [0.0, 0.0]
    for _ in range(rounds):
        for counts in (quiet, crowded):
            others = [
                subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy * (counts is crowded))
            ]
            try:
                for place, count in enumerate(decode(seconds)):
                    counts[place] += count
            finally:
                for other in others:
                    other.kill()
                    other.wait()
    print(json.dumps({"quiet": quiet[1] / quiet[0], "busy": crowded[1] / crowded[0]}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--busy", type=int, default=2, help="other processes")
    parser.add_argument("--seconds", type=float, default=4, help="of a turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        way, folder, busy, seconds, rounds = args.measure
        measure(way, folder, int(busy), float(seconds), int(rounds))
        return
    console = Console()
    table = Table(title=f"{torch.get_num_threads()} threads, {args.busy} busy processes: milliseconds a decode step")
    for column in ("way", "quiet", "busy", "busy / quiet"):
        table.add_column(column)
    with tempfile.TemporaryDirectory() as folder:
        with console.status("writing the checkpoint …"):
            write_llama(Path(folder), args.layers)
        for way in args.ways:
            with console.status(f"{way} …"):
                took = measured(__file__, way, folder, args.busy, args.seconds, args.rounds)
            table.add_row(
                way, f"{took['quiet'] * 1e3:.1f}", f"{took['busy'] * 1e3:.1f}", f"{took['busy'] / took['quiet']:.2f}"
            )
    console.print(table)


if __name__ == "__main__":
    main()
