"""`ctfp8 bench`: models and backends against each other in turn, as a table or a plot."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track

from ..errors import UsageError
from .decoder import Decoder

PLOTS = (".png", ".svg", ".pdf")


class Speed(NamedTuple):
    """Medians over rounds; `weight_bytes` counts each parameter and buffer once."""

    prefill_seconds: float
    tokens_per_second: float
    weight_bytes: int


def compare(
    ways: Mapping[str, tuple[Any, str | None]], prompt_tokens: int, new_tokens: int, rounds: int, console: Console
) -> dict[str, Speed]:
    """Prefill and decode of several `(model, backend)`, in turn in each round, batch 1, a fixed length of the prompt."""
    decoders = {}
    for way, (model, backend) in ways.items():
        decoders[way] = Decoder(model, prompt_tokens + new_tokens, backend, dynamic=False)
    ids = torch.arange(prompt_tokens)[None] % min(model.config.get_text_config().vocab_size, 256)
    for way, decoder in decoders.items():
        with console.status(f"{way}: first run, which compiles what is to be compiled …"):
            decoder.warm_up(ids)
    runs: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for _ in track(range(rounds), "measuring, in turn", console=console, transient=True):
        for way, decoder in decoders.items():
            list(decoder.tokens(ids, new_tokens))
            runs[way].append((decoder.prefill_seconds, decoder.tokens_per_second))
    results = {}
    for way, (model, _) in ways.items():
        prefill, per_second = (statistics.median(column) for column in zip(*runs[way], strict=True))
        results[way] = Speed(prefill, per_second, _nbytes(model))
    return results


def _nbytes(model: torch.nn.Module) -> int:
    tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    return sum(tensors.values())


def check_plot(path: Path) -> None:
    """Raises before long work if `draw` could not write this file.

    Raises:
        UsageError: another kind of file than a picture, or matplotlib is not installed.
    """
    if path.suffix not in PLOTS:
        raise UsageError(f"{path}: a plot is one of {', '.join(PLOTS)}; give the path such a suffix.")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UsageError("plots need matplotlib. Run: pip install 'ctfp8-compile[bench]'") from None


def draw(results: Mapping[str, Speed], prompt_tokens: int, path: Path, title: str) -> None:
    """A bar a way, for prefill, decode and weights; the ratio to the last bar's way is written beside each."""
    from matplotlib.figure import Figure

    panels = {
        "prefill, tokens/s": [prompt_tokens / speed.prefill_seconds for speed in results.values()],
        "decode, tokens/s": [speed.tokens_per_second for speed in results.values()],
        "weights, MB": [speed.weight_bytes / 1e6 for speed in results.values()],
    }
    figure = Figure(figsize=(10, 1.3 + 0.45 * len(results)), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    colours = ["#2f6fb0" if way == "ctfp8" else "#b9bec6" for way in results]
    columns = figure.subplots(1, len(panels), sharey=True)
    columns[0].invert_yaxis()
    for axes, (name, values) in zip(columns, panels.items(), strict=True):
        base = values[list(results).index("bf16 eager")]
        bars = axes.barh(list(results), values, color=colours)
        axes.bar_label(bars, [f"{_round(value)}  ({value / base:.2f}×)" for value in values], padding=4, fontsize=9)
        axes.set_title(name, loc="left", fontsize=9, color="#555")
        axes.set_xlim(0, max(values) * 1.55)
        axes.xaxis.set_visible(False)
        axes.tick_params(left=False)
        for side in axes.spines.values():
            side.set_visible(False)
    figure.savefig(path, dpi=160)


def _round(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"
