"""Runs the two shipped FP8 checkpoints through torch.compile(backend="ctfp8") and shows what that gives.

    python examples/quickstart.py            # `make demo`

For each model: loads it (weights stay FP8), explains the rewrite, compiles, generates some text, and prints a table:
graphs, weights in FP8, memory against bf16, perplexity of bf16 / dequantized / ctfp8, and tokens per second against bf16.
"""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

import ctfp8_compile as ctfp8
from ctfp8_compile.hf.compat import cache_argument

MODELS = Path(__file__).parent / "models"
PROMPT = "Return a list of "
WINDOW, WINDOWS = 256, 24  # held-out text: bytes per window, number of windows
NEW_TOKENS, ROUNDS = 96, 5
console = Console(width=110)


def memory(model: torch.nn.Module) -> int:
    """Bytes of all parameters and buffers, each tensor once."""
    tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


@torch.no_grad()
def perplexity(forward: Callable[..., Any], windows: torch.Tensor, what: str) -> float:
    """exp of the mean cross entropy per byte, float32 over the model's own logits."""
    losses = []
    for row in track(windows, f"perplexity, {what}", console=console, transient=True):
        logits = forward(row[None], use_cache=False).logits[0, :-1].float()
        losses.append(torch.nn.functional.cross_entropy(logits, row[1:]).item())
    return math.exp(statistics.mean(losses))


@torch.no_grad()
def decode(model: Any, forward: Callable[..., Any], prompt: torch.Tensor, tokens: int) -> tuple[torch.Tensor, float]:
    """Samples with a static cache, one token a step: `(ids, seconds per token after the prompt)`."""
    length = prompt.shape[1]
    cache = {cache_argument(model): ctfp8.static_cache(model, max_length=512)}
    generator = torch.Generator().manual_seed(0)
    ids, position = prompt, torch.arange(length)[None]
    out = [prompt]
    start = time.perf_counter()
    for step in range(tokens):
        logits = forward(ids, position_ids=position, **cache).logits[0, -1].float()
        ids = torch.multinomial((logits / 0.5).softmax(-1), 1, generator=generator)[None]
        position = torch.tensor([[length + step]])
        out.append(ids)
        if step == 0:
            start = time.perf_counter()
    return torch.cat(out, 1), (time.perf_counter() - start) / max(1, tokens - 1)


def compiled(model: Any, windows: torch.Tensor, prompt: torch.Tensor) -> tuple[Callable[..., Any], int, float]:
    """The compiled forward after warming up all shapes the demo uses: `(forward, graphs of one call, seconds)`."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    start = time.perf_counter()
    with console.status("compiling (Inductor, once per shape) …"):
        forward = torch.compile(model.forward, backend="ctfp8", fullgraph=True)
        with torch.no_grad():
            forward(windows[:1], use_cache=False)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        decode(model, forward, prompt, 4)
    return forward, graphs, time.perf_counter() - start


def run(name: str, table: Table) -> None:
    folder = MODELS / name
    console.rule(f"[bold]{name}")
    model = ctfp8.from_pretrained(folder)
    plain = ctfp8.from_pretrained(folder, dequantize=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer(PROMPT, return_tensors="pt").input_ids
    text = (MODELS / "heldout.txt").read_bytes()
    windows = torch.tensor(list(text[: WINDOW * WINDOWS])).view(WINDOWS, WINDOW)

    report = ctfp8.explain(model, (windows[:1],), {"use_cache": False})
    console.print(report.summary())
    forward, graphs, seconds = compiled(model, windows, prompt)
    console.print(f"compiled for prefill and decode in {seconds:.0f} s")

    ids, _ = decode(model, forward, prompt, 240)
    console.print(tokenizer.decode(ids[0]), style="italic green", markup=False, highlight=False)

    ppl_plain = perplexity(plain.forward, windows, "bf16")
    ppl_eager = perplexity(model.forward, windows, "FP8, dequantized, eager")
    ppl_ours = perplexity(forward, windows, "FP8, compiled")

    times: dict[str, list[float]] = {"bf16": [], "ctfp8": []}
    for _ in track(range(ROUNDS), "timing decode, bf16 and ctfp8 in turn", console=console, transient=True):
        times["bf16"].append(decode(plain, plain.forward, prompt, NEW_TOKENS)[1])
        times["ctfp8"].append(decode(model, forward, prompt, NEW_TOKENS)[1])
    per_second = {k: 1 / statistics.median(v) for k, v in times.items()}

    fp8 = len(report.rewritten) + len(report.kept)
    table.add_row(
        name,
        str(graphs),
        f"{fp8} ({len(report.rewritten)} rewritten)",
        f"{memory(model) / 2**20:.2f} / {memory(plain) / 2**20:.2f} MiB = {memory(model) / memory(plain):.2f}",
        f"{ppl_plain:.3f} / {ppl_eager:.3f} / {ppl_ours:.3f}",
        f"{per_second['ctfp8']:.0f} / {per_second['bf16']:.0f} = {per_second['ctfp8'] / per_second['bf16']:.2f}×",
    )


def main() -> None:
    warnings.filterwarnings("ignore", message=".*lru_cache.*")
    transformers_logging.disable_progress_bar()  # two loads of 4 MB need none
    table = Table(title="decode one token at a time on this CPU, batch 1", title_justify="left")
    for column in ("model", "graphs", "weights in FP8", "memory, FP8 / bf16", "perplexity per byte\nbf16 / FP8 eager / ctfp8",
                   "tokens per second\nctfp8 / bf16 eager"):  # fmt: skip
        table.add_column(column, overflow="fold")
    for name in ("llama", "moe"):
        run(name, table)
    console.print(table)


if __name__ == "__main__":
    main()
