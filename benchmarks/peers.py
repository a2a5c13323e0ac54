"""From the command to the first token, prefill, decode and memory of one model, by ctfp8 and by what else runs it in Python.

    python benchmarks/peers.py [--layers 22] [--rounds 3] [--json peers.json]

Writes a random 1.1B Llama as an FP8_DYNAMIC checkpoint, as an artifact of ours (a program with a cache for one sequence), as a
bfloat16 checkpoint and, where llama.cpp's Python package is installed (`pip install llama-cpp-python gguf` builds it), as Q8_0.
Every way runs in a fresh process, all ways in turn in each round; medians over rounds are shown, of the peak the largest. First
token: wall seconds from the start of the process to the first of a prompt of 16 tokens, imports and loading included; cold with
an empty folder for Inductor's caches (kernels of ours are built before), warm with what the process before left there. The rest
is measured in the warm process: prefill of 256 tokens, a decode step with 1 sequence after those, and with 4 and 16 sequences
after 16 tokens of each, and the peak of anonymous memory of the whole process. Weights that an eager model reads in the mapped
file are not anonymous. The load of the machine is written beside each process.
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
from pathlib import Path
from typing import Any

import llamacpp
from fresh import Peak, measured

WAYS = ("ctfp8", "ctfp8, artifact", "bf16 eager", "bf16 Inductor", "llama.cpp Q8_0")
COMPILED = ("ctfp8", "bf16 Inductor")
FIRST, PROMPT, TOKENS, ROOM = 16, 256, 16, 320
ROWS = {
    "cold": "first token, empty caches, s",
    "warm": "first token, warm caches, s",
    "prefill": f"prefill of {PROMPT} tokens, ms",
    "decode 1": "decode, 1 sequence, ms a step",
    "decode 4": "4 sequences",
    "decode 16": "16 sequences",
    "memory": "peak anonymous memory, GB",
}


def write(folder: Path, layers: int) -> None:
    """All files, and the CPU kernels; in a process of its own, whose imports the others do not share."""
    import torch
    from checkpoints import write_llama

    import ctfp8_compile as ctfp8
    from ctfp8_compile.ops import cpu

    cpu.load()
    for name in ("fp8", "bf16"):
        (folder / name).mkdir()
    write_llama(folder / "fp8", layers)
    decoder = ctfp8.StaticCacheDecoder(ctfp8.from_pretrained(folder / "fp8"), 1, ROOM)
    shapes = ({1: torch.export.Dim("tokens", max=ROOM)}, None)
    ids = torch.arange(FIRST)[None]
    ctfp8.export(decoder, (ids, torch.tensor(0)), path=folder / "model.pt2", dynamic_shapes=shapes)
    ctfp8.from_pretrained(folder / "fp8", dequantize=True).save_pretrained(folder / "bf16")
    if llamacpp.is_installed():
        llamacpp.write_gguf(folder / "fp8", folder / "q8_0.gguf")


def measure(way: str, folder: Path, whole: bool, begin: float) -> None:
    """Runs in a fresh process that was started at `begin`; prints what it measured as JSON."""
    memory = Peak()
    if way == "llama.cpp Q8_0":  # its process has no torch
        of = llamacpp.load(folder / "q8_0.gguf", len(os.sched_getaffinity(0)))
        step = lambda rows: of(rows, ROOM, PROMPT if rows == 1 else FIRST)  # noqa: E731
    else:
        step = artifact(folder) if way == "ctfp8, artifact" else model(way, folder)
    found: dict[str, float] = {}
    batches = (1,) if "artifact" in way else (1, 4, 16)
    call = step(1)
    call(FIRST, 0)
    found["first"] = time.time() - begin
    for rows in batches if whole else ():
        call = step(rows)
        filled = PROMPT if rows == 1 else FIRST
        for _ in range(2):  # compiles
            call(filled, 0)
            call(1, filled)
        if rows == 1:
            found["prefill"] = statistics.median(timed(call, PROMPT, 0) for _ in range(3)) * 1e3
        found[f"decode {rows}"] = statistics.median(timed(call, 1, filled + i) for i in range(TOKENS)) * 1e3
    memory.stop()
    print(json.dumps({**found, "memory": memory.most / 1e9, "load": os.getloadavg()[0]}))


def timed(call: Any, tokens: int, position: int) -> float:
    begin = time.perf_counter()
    call(tokens, position)
    return time.perf_counter() - begin


def artifact(folder: Path) -> Any:
    import torch

    import ctfp8_compile as ctfp8

    module = ctfp8.load(folder / "model.pt2")

    @torch.no_grad()
    def call(tokens: int, position: int) -> int:
        return int(module(torch.arange(tokens)[None], torch.tensor(position))[0, -1].argmax())

    return lambda rows: call


def model(way: str, folder: Path) -> Any:
    """Given a number of sequences, what runs so many tokens of each at a position, with a cache of its own."""
    import torch
    from transformers import AutoModelForCausalLM

    import ctfp8_compile as ctfp8
    from ctfp8_compile.hf.compat import cache_argument

    if way == "ctfp8":
        loaded = ctfp8.from_pretrained(folder / "fp8", compile=True)
    else:
        loaded = AutoModelForCausalLM.from_pretrained(folder / "bf16", dtype=torch.bfloat16).eval()
        if way == "bf16 Inductor":
            loaded.forward = torch.compile(loaded.forward)

    def of(rows: int) -> Any:
        cache = {cache_argument(loaded): ctfp8.static_cache(loaded, rows, ROOM)}

        @torch.no_grad()
        def call(tokens: int, position: int) -> int:
            if position == 0:
                cache[cache_argument(loaded)].reset()
            positions = torch.arange(position, position + tokens)[None].expand(rows, -1)
            ids = torch.arange(tokens)[None].expand(rows, -1).contiguous()
            return int(loaded(ids, position_ids=positions, logits_to_keep=1, **cache).logits[0, -1].argmax())

        return call

    return of


def run(way: str, folder: Path, caches: Path, whole: bool) -> dict[str, float]:
    return measured(__file__, way, folder, int(whole), time.time(), TORCHINDUCTOR_CACHE_DIR=str(caches))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--rounds", type=int, default=3)
    here = [way for way in WAYS if "llama.cpp" not in way or llamacpp.is_installed()]
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=here)
    parser.add_argument("--json", type=Path, help="also write each process's numbers there, as they come")
    parser.add_argument("--write", nargs=2, metavar=("FOLDER", "LAYERS"), help=argparse.SUPPRESS)
    parser.add_argument("--measure", nargs=4, metavar=("WAY", "FOLDER", "WHOLE", "BEGIN"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.write:
        write(Path(args.write[0]), int(args.write[1]))
    elif args.measure:
        way, folder, whole, begin = args.measure
        measure(way, Path(folder), whole == "1", float(begin))
    else:
        print(markdown(compare(args.layers, args.rounds, args.ways, args.json)))


def compare(layers: int, rounds: int, ways: list[str], kept: Path | None) -> dict[str, list[dict[str, float]]]:
    """What each process of each way measured, with a `cold` beside it where one was run with empty caches.

    Args:
        kept: where all that was measured is written, each time there is more.
    """
    results: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        subprocess.run([sys.executable, __file__, "--write", place, str(layers)], check=True, stdout=sys.stderr)
        for turn in range(rounds):
            for way in ways:
                print(f"{way}, round {turn + 1} of {rounds}", file=sys.stderr, flush=True)
                caches = folder / f"caches-{turn}-{ways.index(way)}"  # g++ takes no spaces
                before = run(way, folder, caches, whole=False) if way in COMPILED else None
                found = run(way, folder, caches, whole=True)
                cold = {} if before is None else {"cold": before["first"]}
                results[way].append({**found, **cold, "warm": found.pop("first")})
                if kept is not None:
                    kept.write_text(json.dumps(results, indent=1))
    return results


def markdown(results: dict[str, list[dict[str, float]]]) -> str:
    """The table of docs/performance.md."""
    lines = ["| | " + " | ".join(results) + " |", "|---|" + "---|" * len(results)]
    for key, name in ROWS.items():
        cells = []
        for runs in results.values():
            values = [one[key] for one in runs if key in one]
            middle = max(values) if values and key == "memory" else statistics.median(values) if values else None
            cells.append("" if middle is None else f"{middle:.3g}" if middle < 100 else f"{middle:.0f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    loads = [one["load"] for runs in results.values() for one in runs]
    return "\n".join([*lines, "", f"Load of the machine while it ran: {min(loads):.1f} to {max(loads):.1f}."])


if __name__ == "__main__":
    main()
