"""Peak anonymous memory of saving a ~0.5 GB FP8 MoE, above the model that is held, in one process and on two ranks.

    python benchmarks/memory_save.py [--gigabytes 0.5] [--format fp8] [--ranks 1 2]

Writes a random Qwen3-MoE checkpoint (one Linear per expert, which the model holds as one parameter of a layer), loads it into
memory, saves it once so that what is imported and made once is there, and samples `RssAnon` every 2 ms while it is saved again.
The model is in the baseline; mapped file pages are not counted, see `memory_load.py`. `transformers` saves the same weights
dequantized.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from checkpoints import FORMATS, write_moe
from fresh import Peak
from rich.console import Console
from rich.table import Table


def measure(way: str, folder: str, out: str) -> None:
    """Runs in each of the processes: writes the peak of saving above the held model, in bytes, and the largest parameter."""
    import ctfp8_compile as ctfp8

    ranks, rank = int(os.environ["WORLD_SIZE"]), os.environ["RANK"]
    more = {}
    if ranks > 1:
        from transformers.distributed import DistributedConfig

        more = {"distributed_config": DistributedConfig(tp_size=ranks)}
    torch.set_num_threads(1)
    model = ctfp8.from_pretrained(folder, in_memory=True, dequantize=way == "transformers", **more)
    held = list(model.parameters())
    model.save_pretrained(f"{out}/model")
    memory = Peak()
    model.save_pretrained(f"{out}/model")
    largest = max(p.numel() * p.element_size() for p in held) * ranks
    Path(out, f"{rank}.json").write_text(json.dumps({"peak": memory.stop(), "largest": largest}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=0.5)
    parser.add_argument("--format", choices=FORMATS, default="FP8_DYNAMIC")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--measure", nargs=3, metavar=("WAY", "FOLDER", "OUT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(*args.measure)
        return
    console = Console()
    table = Table(title="peak anonymous memory of saving, above the held model")
    for column in ("way", "first rank", "/ file", "other ranks", "largest parameter"):
        table.add_column(column)
    with tempfile.TemporaryDirectory() as place:
        with console.status("writing the checkpoint …"):
            Path(place, "model").mkdir()
            size = write_moe(Path(place, "model"), args.gigabytes, format=args.format)
        for ranks, way in [(n, "ctfp8") for n in args.ranks] + [(1, "transformers")]:
            with console.status(f"{way}, {ranks} …"), tempfile.TemporaryDirectory() as out:
                run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
                subprocess.run([*run, __file__, "--measure", way, f"{place}/model", out], check=True)
                found = [json.loads(Path(out, f"{rank}.json").read_text()) for rank in range(ranks)]
            first, *others = (one["peak"] for one in found)
            table.add_row(
                f"{way}, {ranks} process{'es' * (ranks > 1)}", f"{first / 1e6:.1f} MB", f"{first / size:.3f}×",
                f"{max(others) / 1e6:.1f} MB" if others else "", f"{found[0]['largest'] / 1e6:.1f} MB",
            )  # fmt: skip
    console.print(f"{args.format} file: {size / 1e9:.2f} GB")
    console.print(table)


if __name__ == "__main__":
    main()
