"""A model on 1, 2 and 4 processes: file pages read, peak anonymous memory and time of loading, prefill and decode, a rank.

    python benchmarks/distributed.py [--gigabytes 0.5] [--ranks 1 2 4]      measured here, on gloo
    python benchmarks/distributed.py --paper deepseek_v3 --ranks 8 16       from a config: memory of a rank, traffic of a token

Measured against stock transformers' bf16 tensor parallel of the same model with dequantized weights, in turn in the same run. The
checkpoint is a random Qwen3-MoE of one Linear per expert. Loading ends when the weights are in memory, checked.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from checkpoints import write_moe
from fresh import Peak
from rich.console import Console
from rich.table import Table

WAYS = ("ctfp8 eager", "ctfp8 compiled", "transformers bf16")
#: By style of a transformers plan, the dimension of a weight that it cuts.
CUT = {
    "colwise": -2, "colwise_gather_output": -2, "packed_colwise": -2, "rowwise": -1, "packed_rowwise": -1,
    "embedding_rowwise": -2, "embedding_colwise": -1, "grouped_gemm": 0,
}  # fmt: skip
#: Styles after which the ranks sum their outputs.
SUMMED = ("rowwise", "embedding_rowwise", "moe_tp_experts", "ep_dispatch_experts", "all_reduce")


@dataclass(frozen=True)
class Paper:
    """What one rank holds and sends, by arithmetic; bytes.

    Attributes:
        fp8: FP8 values of FP8 weights, largest rank.
        scales: of them.
        other: everything else, in bf16.
        sent: by one rank for one token: a ring sends 2 (N - 1) / N of a sum, (N - 1) / N of a gather.
    """

    fp8: int
    scales: int
    other: int
    sent: int

    @property
    def weights(self) -> int:
        return self.fp8 + self.scales + self.other


def on_paper(config: Any, ranks: int, experts: bool = False, block: tuple[int, int] | None = (128, 128)) -> Paper:
    """From a model's config and transformers' plan for it; nothing is loaded.

    Args:
        experts: whole experts to each rank (`ep_size`).
        block: rows and columns that share a scale; None: a scale a row.
    """
    from torch import nn
    from transformers import AutoModelForCausalLM
    from transformers.distributed.parallel_utils import replace_layer_number_by_wildcard

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    plan = dict(model.tp_plan)
    if experts:
        owned = {name.rpartition(".experts")[0] + ".experts" for name in model.ep_plan}
        plan = {
            name: style for name, style in plan.items() if not any(name.startswith(own) for own in owned)
        } | model.ep_plan
    fp8 = scales = other = sent = 0
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        wild = replace_layer_number_by_wildcard(name)
        style = plan.get(wild) or plan.get(wild.rpartition(".")[0], "")
        shape = list(parameter.shape)
        if (dim := CUT.get(style)) is not None and (len(shape) > 1 or dim == -2):
            at = dim if len(shape) > 1 else 0
            shape[at] = -(-shape[at] // ranks)
        quantized = (owner in linears and leaf == "weight" and not owner.endswith("lm_head")) or len(shape) == 3
        count = torch.Size(shape).numel()
        if not quantized:
            other += 2 * count
            continue
        fp8 += count
        *of, rows, columns = shape
        high, wide = block or (1, columns)
        scales += 4 * torch.Size(of).numel() * -(-rows // high) * -(-columns // wide)
    hidden = config.get_text_config().hidden_size
    for name, module in model.named_modules():
        style = plan.get(replace_layer_number_by_wildcard(name), "")
        if style in SUMMED:
            sent += 2 * 2 * hidden * (ranks - 1) // ranks
        elif style == "colwise_gather_output":
            sent += 2 * module.out_features * (ranks - 1) // ranks
    return Paper(fp8, scales, other, sent)


def paper(name: str, counts: list[int]) -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model(name)
    print("| processes | experts | FP8 weights | scales | other (bf16) | all | sent for a token |\n|" + "---|" * 7)
    for ranks in counts:
        for experts in (False, True):
            p = on_paper(config, ranks, experts)
            gb = [f"{n / 1e9:.{digits}f} GB" for n, digits in ((p.fp8, 1), (p.scales, 2), (p.other, 1), (p.weights, 1))]
            how = "whole ones (EP)" if experts else "a part of each (TP)"
            print(f"| {ranks} | {how} | {' | '.join(gb)} | {p.sent / 1e6:.2f} MB |")


def pages_of(kind: str) -> int:
    """Bytes of mapped files of this kind that are in memory for this process."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.partition(" ")[0]:
            inside = line.endswith(kind)
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def measure(way: str, folder: str, out: str) -> None:
    """One rank, in a fresh process."""
    import torch.distributed as dist
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    import ctfp8_compile as ctfp8

    torch.set_num_threads(1)
    ranks, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    spread: dict[str, Any] = {"distributed_config": DistributedConfig(tp_size=ranks)} if ranks > 1 else {}
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    memory, mapped = Peak(), pages_of(".safetensors")
    start = time.perf_counter()
    if way == "transformers bf16":
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **spread).eval()
    else:
        model = ctfp8.from_pretrained(folder, **spread)
    seconds = time.perf_counter() - start
    found = {"load s": seconds, "anonymous": memory.stop(), "file": pages_of(".safetensors") - mapped}
    weights = (p.to_local() if hasattr(p, "to_local") else p for p in model.parameters())
    found["weights"] = sum(p.nbytes for p in weights)
    forward = torch.compile(model, backend="ctfp8", dynamic=False) if way == "ctfp8 compiled" else model
    with torch.no_grad():
        for name, tokens in (("prefill s", 64), ("decode s", 1)):
            ids, times = torch.arange(tokens)[None] + 3, []
            for _ in range(6):
                start = time.perf_counter()
                forward(ids, use_cache=False)
                times.append(time.perf_counter() - start)
            found[name] = statistics.median(times[1:])
    Path(f"{out}-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=0.5)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--paper", metavar="MODEL_TYPE")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(*args.measure)
        return
    if args.paper:
        paper(args.paper, args.ranks)
        return
    import ctfp8_compile as ctfp8

    table = Table(title="a rank (the largest of all), torch.set_num_threads(1)", box=None)
    for column in (
        "ranks",
        "way",
        "weights MB",
        "file pages MB",
        "peak anonymous MB",
        "load s",
        "prefill 64 s",
        "decode s",
    ):
        table.add_column(column)
    with tempfile.TemporaryDirectory() as place:
        fp8, dense = Path(place, "fp8"), Path(place, "dense")
        fp8.mkdir()
        write_moe(fp8, args.gigabytes)
        ctfp8.from_pretrained(fp8, dequantize=True).save_pretrained(dense)
        for ranks in args.ranks:
            for way in args.ways:
                folder = dense if way == "transformers bf16" else fp8
                run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
                subprocess.run([*run, __file__, "--measure", way, str(folder), f"{place}/out"], check=True)
                rows = [json.loads(Path(f"{place}/out-{rank}.json").read_text()) for rank in range(ranks)]
                most = {key: max(row[key] for row in rows) for key in rows[0]}
                mb = [f"{most[key] / 1e6:.0f}" for key in ("weights", "file", "anonymous")]
                seconds = [f"{most[key]:.3f}" for key in ("load s", "prefill s", "decode s")]
                table.add_row(str(ranks), way, *mb, *seconds)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
