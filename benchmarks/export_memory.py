"""Seconds, peak anonymous memory and file size of exporting a 1.1B-parameter FP8 Llama.

    python benchmarks/export_memory.py [--target cpu] [--layers 22]

Writes a random Llama FP8_DYNAMIC checkpoint (TinyLlama's shapes) to a temporary folder, then loads and exports it in a
fresh process, with batch and sequence dynamic, and samples `RssAnon` every 2 ms. The baseline after imports is subtracted;
mapped file pages do not count, because the kernel can drop them at any time.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from checkpoints import write_llama
from fresh import Peak, measured
from rich.console import Console
from rich.table import Table


def measure(folder: str, target: str) -> None:
    """Runs in a fresh process: prints seconds and bytes."""
    import transformers.models.llama.modeling_llama
    from torch.export import Dim

    import ctfp8_compile as ctfp8
    import ctfp8_compile.aot.export  # its imports belong to the baseline

    memory = Peak()
    model = ctfp8.from_pretrained(folder)
    loaded = memory.most - memory.base
    path = Path(folder) / "model.pt2"
    start = time.perf_counter()
    report = ctfp8.export(
        model, (torch.arange(32).reshape(2, 16),), {"use_cache": False}, path=path, target=target,
        dynamic_shapes={"input_ids": {0: Dim("batch"), 1: Dim("sequence")}, "use_cache": None},
    )  # fmt: skip
    seconds = time.perf_counter() - start
    result = {"seconds": seconds, "loaded": loaded, "peak": memory.stop(), "file": path.stat().st_size}
    print(json.dumps(result | {"report": report.summary(), "transformers": transformers.__version__}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--measure", nargs=2, metavar=("FOLDER", "TARGET"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(*args.measure)
        return
    console = Console()
    table = Table(title=f"exporting a Llama of {args.layers} layers for {args.target}")
    for column in ("export", "peak / FP8 bytes", "of which loading", "file / checkpoint"):
        table.add_column(column)
    with tempfile.TemporaryDirectory() as folder:
        with console.status("writing the checkpoint …"):
            fp8 = write_llama(Path(folder), args.layers)
        checkpoint = (Path(folder) / "model.safetensors").stat().st_size
        with console.status("loading and exporting …"):
            result = measured(__file__, folder, args.target)
    table.add_row(
        f"{result['seconds']:.0f} s",
        f"{result['peak'] / fp8:.2f}×",
        f"{result['loaded'] / fp8:.2f}×",
        f"{result['file'] / checkpoint:.4f}×",
    )
    console.print(f"FP8 weights {fp8 / 1e9:.2f} GB, checkpoint {checkpoint / 1e9:.2f} GB; {result['report']}")
    console.print(table)


if __name__ == "__main__":
    main()
