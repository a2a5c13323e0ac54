"""Peak anonymous memory of loading a ~1 GB FP8 MoE and running one forward pass, against transformers' own path.

    python benchmarks/memory_load.py [--gigabytes 1.0] [--format fp8]

Writes a random Qwen3-MoE checkpoint (one Linear per expert, as llm-compressor and DeepSeek do) to a temporary folder,
then loads it in one fresh process per way and samples `RssAnon` every 2 ms. Anonymous memory is what counts: mapped file
pages can be dropped by the kernel at any time. The baseline after imports is subtracted.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from checkpoints import FORMATS, write_moe
from fresh import Peak, measured
from rich.console import Console
from rich.table import Table

WAYS = ("ctfp8 eager", "ctfp8 compiled", "transformers")


def measure(way: str, folder: str) -> None:
    """Runs in a fresh process: prints the peaks of loading and of load + forward above the import baseline, in bytes."""
    from transformers import AutoModelForCausalLM

    import ctfp8_compile as ctfp8

    if way == "ctfp8 compiled":  # the compiler's own memory belongs to the baseline: compile something first
        torch.compile(torch.nn.Linear(8, 8), backend="inductor")(torch.randn(2, 8))
    memory = Peak()
    model = (AutoModelForCausalLM if way == "transformers" else ctfp8).from_pretrained(folder)
    loaded = memory.most - memory.base
    forward = torch.compile(model.forward, backend="ctfp8") if way == "ctfp8 compiled" else model
    with torch.no_grad():
        forward(torch.arange(64)[None], use_cache=False)
    print(json.dumps({"load": loaded, "peak": memory.stop()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--format", choices=FORMATS, default="FP8_DYNAMIC")
    parser.add_argument("--measure", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(*args.measure)
        return
    console = Console()
    table = Table(title="peak anonymous memory / file size")
    for column in ("way", "load", "load + forward (64 tokens)"):
        table.add_column(column)
    with tempfile.TemporaryDirectory() as folder:
        with console.status("writing the checkpoint …"):
            size = write_moe(Path(folder), args.gigabytes, format=args.format)
        for way in WAYS:
            with console.status(f"{way} …"):
                result = measured(__file__, way, folder)
            table.add_row(way, f"{result['load'] / size:.2f}×", f"{result['peak'] / size:.2f}×")
    console.print(f"{args.format} file: {size / 1e9:.2f} GB")
    console.print(table)


if __name__ == "__main__":
    main()
