"""Seconds to load a ~1 GB FP8 checkpoint and to answer a first prompt, against stock transformers on the same file.

    python benchmarks/load_time.py [--repeats 3]

Each load is a fresh process; the ways alternate, and the file is in the page cache. Both put off a part of the work until
the model runs (transformers dequantizes the weights, ctfp8 copies them out of the mapped file), so the first forward of 16
tokens, eager, is timed too. Medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from checkpoints import write_llama, write_moe
from fresh import measured
from rich.console import Console
from rich.progress import track
from rich.table import Table

MODELS = {"dense": lambda folder: write_llama(folder, 22), "MoE": lambda folder: write_moe(folder, 1.0)}
WAYS = ("ctfp8", "transformers")


def measure(way: str, folder: str) -> None:
    """Runs in a fresh process: prints the seconds of loading and of the first forward."""
    from transformers import AutoModelForCausalLM

    import ctfp8_compile as ctfp8

    load = (AutoModelForCausalLM if way == "transformers" else ctfp8).from_pretrained
    begin = time.perf_counter()
    model = load(folder)
    loaded = time.perf_counter()
    with torch.no_grad():
        model(torch.arange(16)[None], use_cache=False)
    print(json.dumps([loaded - begin, time.perf_counter() - loaded]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--measure", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(*args.measure)
        return
    table = Table(title=f"seconds, medians of {args.repeats}")
    for column in ("model", "way", "load", "first forward", "together"):
        table.add_column(column)
    for model, write in MODELS.items():
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder))
            times: dict[str, list[list[float]]] = {way: [] for way in WAYS}
            for _ in track(range(args.repeats), f"loading the {model} checkpoint …"):
                for way in WAYS:
                    times[way].append(measured(__file__, way, folder))
        for way in WAYS:
            load, forward = (statistics.median(t) for t in zip(*times[way], strict=True))
            both = statistics.median(map(sum, times[way]))
            table.add_row(model, way, f"{load:.2f}", f"{forward:.2f}", f"{both:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
