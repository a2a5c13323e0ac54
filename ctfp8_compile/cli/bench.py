"""`ctfp8 bench`: models and backends against each other in turn, as a table or a plot."""

from __future__ import annotations

import collections
import itertools
import statistics
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ..errors import UsageError
from ..hf.fp8_cache import CacheDtype
from .decoder import Decoder
from .drafted import NO_DRAFTS, Drafted, Drafts
from .terminal import size

PLOTS = (".png", ".svg", ".pdf")


class Way(NamedTuple):
    """A model, what compiles it (None: nothing), how its key-value cache is kept, and what drafts for it."""

    model: Any
    backend: str | None
    cache: CacheDtype = "auto"
    drafts: Drafts = NO_DRAFTS


class Speed(NamedTuple):
    """Medians over rounds; `weight_bytes` counts each parameter and buffer once, without those of what drafts.

    Attributes:
        acceptance: of drafted tokens, how many were right; None without drafts.
    """

    prefill_seconds: float
    tokens_per_second: float
    weight_bytes: int
    cache_bytes: int
    acceptance: float | None = None
    tokens_per_step: float = 1.0


def compare(
    ways: Mapping[str, Way],
    prompt_tokens: int,
    new_tokens: int,
    rounds: int,
    console: Console,
    refill: bool = True,
    ids: torch.Tensor | None = None,
) -> dict[str, Speed]:
    """Prefill and decode in several ways, in turn in each round, batch 1, a fixed length of the prompt.

    Args:
        ids: the prompt, `[1, prompt_tokens]`; default: tokens in the order of their numbers.
        refill: whether each round begins with the prompt; else it is read once, and each round goes on where the last
            one ended.
    """
    room = prompt_tokens + new_tokens * (1 if refill else rounds) + 1
    decoders = {name: _decoder(way, room) for name, way in ways.items()}
    if ids is None:
        vocabulary = min(way.model.config.get_text_config().vocab_size for way in ways.values())
        ids = torch.arange(prompt_tokens)[None] % min(vocabulary, 256)
    for decoder in decoders.values():  # compiles what is to be compiled, and says so
        decoder.warm_up(ids)
    texts: dict[str, Iterator[int]] = {}
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for turn in track(range(rounds), "measuring, in turn", console=console, transient=True):
        for name, decoder in decoders.items():
            if isinstance(decoder, Drafted):
                decoder.each(ids, new_tokens, 0.0, lambda token: True)
                runs[name].append((decoder.prefill_seconds, decoder.tokens_per_second))
                continue
            if refill or not turn:
                texts[name] = decoder.tokens(ids, room)
                next(texts[name])
            decoder.step_seconds.clear()
            collections.deque(itertools.islice(texts[name], new_tokens - refill), maxlen=0)
            runs[name].append((decoder.prefill_seconds, decoder.tokens_per_second))
    results = {}
    for name, (model, *_) in ways.items():
        prefill, per_second = (statistics.median(column) for column in zip(*runs[name], strict=True))
        layers = decoders[name].cache.layers
        kept = [t for layer in layers for t in vars(layer).values() if isinstance(t, torch.Tensor)]
        weights = [*model.parameters(), *model.buffers()]
        found = getattr(decoders[name], "tally", None)
        drafted = () if found is None else (found.acceptance, found.tokens_per_step)
        results[name] = Speed(prefill, per_second, _nbytes(weights), _nbytes(kept), *drafted)
    return results


def ways_of(plain: Any, model: Any, long: bool, drafts: Drafts, inductor: bool) -> dict[str, Any]:
    """What is compared: by its name in the table."""
    ways = {"ctfp8": Way(model, "ctfp8")}
    if long:
        ways = {"ctfp8, FP8 cache": Way(model, "ctfp8", "fp8"), "ctfp8, bf16 cache": Way(model, "ctfp8", "bf16")}
    if drafts:
        ways[f"ctfp8, {drafts}"] = Way(model, "ctfp8", drafts=drafts)
    ways["bf16 eager"] = Way(plain, None, "bf16")
    if inductor:
        ways["bf16 Inductor"] = Way(plain, "inductor", "bf16")
    return ways


def _decoder(way: Way, room: int) -> Decoder | Drafted:
    if way.drafts:
        return Drafted(way.model, way.drafts, room + way.drafts.most(way.model), way.backend, way.cache)
    return Decoder(way.model, room, way.backend, dynamic=False, dtype=way.cache)


def _nbytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())


def speeds(results: dict[str, Any], prompt_tokens: int, drafted: bool) -> Table:
    """The table that is shown: each way's speed and bytes, and what they are of those of bf16 eager."""
    base = results["bf16 eager"]
    more = ("tokens a step", "accepted") if drafted else ()
    table = Table("", "prefill", "decode", "weights", "cache", *more, box=None, header_style="dim")
    for way, speed in results.items():
        accepted = "" if speed.acceptance is None else f"{speed.acceptance:.0%}"
        table.add_row(
            way,
            f"{prompt_tokens / speed.prefill_seconds:.0f} tokens/s ({base.prefill_seconds / speed.prefill_seconds:.2f}×)",
            f"{speed.tokens_per_second:.1f} tokens/s ({speed.tokens_per_second / base.tokens_per_second:.2f}×)",
            f"{size(speed.weight_bytes)} ({speed.weight_bytes / base.weight_bytes:.2f}×)",
            f"{size(speed.cache_bytes)} ({speed.cache_bytes / max(base.cache_bytes, 1):.2f}×)",
            *((f"{speed.tokens_per_step:.2f}", accepted) if drafted else ()),
        )
    return table


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
    if len({speed.cache_bytes for speed in results.values()}) > 1:
        panels["cache, MB"] = [speed.cache_bytes / 1e6 for speed in results.values()]
    figure = Figure(figsize=(10 / 3 * len(panels), 1.3 + 0.45 * len(results)), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    colours = ["#2f6fb0" if way.startswith("ctfp8") else "#b9bec6" for way in results]
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
