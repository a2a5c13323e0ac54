"""Peak anonymous memory of loading a ~1 GB FP8 MoE and running one forward pass, against transformers' own path.

    python benchmarks/memory_load.py [--gigabytes 1.0] [--format fp8 | --format all]

Writes a random Qwen3-MoE checkpoint (one Linear per expert, as llm-compressor and DeepSeek do) to a temporary folder,
then loads it in one fresh process per way and samples `RssAnon` every 2 ms. Anonymous memory is what counts: mapped file
pages can be dropped by the kernel at any time. The baseline after imports is subtracted. `--format all` tries our eager way
with a file of each format of docs/formats.md; ComfyUI's is one of 4096×4096 linears, loaded by `load_state_dict`.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from checkpoints import write_module, write_moe
from file_formats import FORMATS
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
    if not (Path(folder) / "config.json").exists():
        measure_module(Path(folder) / "model.safetensors")
        return
    memory = Peak()
    model = (AutoModelForCausalLM if way == "transformers" else ctfp8).from_pretrained(folder)
    loaded = memory.most - memory.base
    forward = torch.compile(model.forward, backend="ctfp8") if way == "ctfp8 compiled" else model
    with torch.no_grad():
        forward(torch.arange(64)[None], use_cache=False)
    print(json.dumps({"load": loaded, "peak": memory.stop()}))


def measure_module(file: Path) -> None:
    """The same for a file that no model of transformers belongs to."""
    from safetensors import safe_open

    import ctfp8_compile as ctfp8

    with safe_open(file, "pt") as opened:
        count = sum(name.endswith(".weight") for name in opened.keys())  # noqa: SIM118 - no mapping
        size = opened.get_slice("model.diffusion_model.0.weight").get_shape()[0]
    with torch.device("meta"):
        module = torch.nn.Sequential(*(torch.nn.Linear(size, size, False, dtype=torch.bfloat16) for _ in range(count)))
    memory = Peak()
    ctfp8.load_state_dict(module, file)
    loaded = memory.most - memory.base
    with torch.no_grad():
        module(torch.randn(64, size, dtype=torch.bfloat16))
    print(json.dumps({"load": loaded, "peak": memory.stop()}))


def rows(format: str, gigabytes: float, ways: Sequence[str], console: Console) -> Iterator[tuple[str, str, str, str]]:
    """Of one file, for each way: format and bytes, way, the two peaks."""
    with tempfile.TemporaryDirectory() as folder:
        with console.status(f"writing {format} …"):
            write = write_module if format == "comfyui" else functools.partial(write_moe, format=format)
            size = write(Path(folder), gigabytes)
        for way in ways:
            name = f"{format}, {size / 1e9:.2f} GB"
            try:
                with console.status(f"{format}: {way} …"):
                    found = measured(__file__, way, folder)
            except subprocess.CalledProcessError:
                if way != "transformers":
                    raise
                yield name, way, "does not load", ""  # its writer's package is not installed, or it has no reader
                continue
            yield name, way, f"{found['load'] / size:.2f}×", f"{found['peak'] / size:.2f}×"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--format", "--dialect", choices=("all", *FORMATS), default="FP8_DYNAMIC")
    parser.add_argument("--measure", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(*args.measure)
        return
    console = Console(width=100)
    table = Table(title="peak anonymous memory / file size")
    for column in ("file", "way", "load", "load + forward (64 tokens)"):
        table.add_column(column)
    formats = FORMATS if args.format == "all" else (args.format,)
    for format in formats:
        for row in rows(
            format, args.gigabytes, WAYS[:1] if args.format == "all" or format == "comfyui" else WAYS, console
        ):
            table.add_row(*row)
            if args.format == "all":
                print(*row, flush=True)
    console.print(table)


if __name__ == "__main__":
    main()
