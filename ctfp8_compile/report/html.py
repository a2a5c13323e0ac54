"""The picture of a rewrite: one self-contained HTML page, a bar a layer, coloured by kernel; a layer opens to its weights.

Layers that hold the same weights and attention, with the same outcome, are drawn once, wherever they are. `read` is what one
decoded token reads of weights: all bytes of a dense one, and of stacked experts those of the experts it is routed to.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from ..counted import agreeing

if TYPE_CHECKING:
    from .report import Entry, Report

_LAYER = re.compile(r"(.*?)\.(\d+)\.(.*)")
#: By order of first use, legible in light and dark; what stayed dequantized has a colour of its own.
_COLOURS = ("#2f7ed8", "#1f9d6b", "#8f5bd1", "#c2467f", "#1796a6", "#6b7a2a")
_KEPT = "#d98a1f"


class _Row(NamedTuple):
    """One layer, or `alike` of them, by what `name` says; and the entries of one."""

    name: str
    alike: int
    entries: tuple[tuple[str, Entry], ...]


def page(report: Report) -> str:
    """The whole document."""
    entries = [*report.rewritten, *report.kept]
    every = [*entries, *report.attention]
    kernels = dict.fromkeys(e.kernel for e in every if e.kernel)
    colours = {kernel: _COLOURS[i % len(_COLOURS)] for i, kernel in enumerate(kernels)}
    colours[""] = _KEPT
    rows = list(_rows(every))
    widest = max((sum(e.nbytes for _, e in row.entries) for row in rows), default=1)
    stored, plain = sum(e.nbytes for e in entries), sum(2 * math.prod(e.shape) for e in entries)
    read = sum(_read(report, e) for e in entries)
    facts = [
        (str(len(entries)), agreeing(len(entries), "FP8 weight", "FP8 weights")),
        (str(len(report.rewritten)), "rewritten"),
        (str(len(report.kept)), "dequantized in the graph"),
        (_size(stored), f"stored ({stored / plain:.2f}× of bf16)" if plain else "stored"),
        (_size(read), "read a token"),
    ]
    if report.attention:
        full = sum(e.cache_bytes for e in report.attention)
        facts.append((str(len(report.attention)), f"attentions to a cache{f' of {_size(full)}' * bool(full)}"))
    used = dict.fromkeys(e.kernel for e in every)
    return _PAGE.format(
        title=html.escape(f"{report.model} on {report.target}" if report.model else report.target),
        facts="".join(f"<div><b>{html.escape(n)}</b>{html.escape(what)}</div>" for n, what in facts),
        legend="".join(
            f'<span><i style="background:{colours[k]}"></i>{html.escape(k or "the plain operation, on what is dequantized")}</span>'
            for k in used
        ),
        rows="".join(_layer(report, row, colours, widest, stored) for row in rows),
    )


def _rows(entries: Sequence[Entry]) -> Iterable[_Row]:
    """Layers in their numeric order, alike ones at the place of the first; what is outside any layer comes last."""
    layers: dict[tuple[str, int], list[tuple[str, Entry]]] = {}
    outside: list[_Row] = []
    for entry in entries:
        match = _LAYER.fullmatch(entry.name)
        if match:
            layers.setdefault((match[1], int(match[2])), []).append((match[3], entry))
        else:
            outside.append(_Row(entry.name, 1, ((entry.name, entry),)))
    alike: dict[object, tuple[list[int], tuple[tuple[str, Entry], ...]]] = {}
    for prefix, number in sorted(layers):
        parts = tuple(sorted(layers[prefix, number], key=lambda part: part[0]))
        look = prefix, tuple((n, e.shape, e.block, e.activation, e.kernel, e.reason, e.after) for n, e in parts)
        alike.setdefault(look, ([], parts))[0].append(number)
    for (prefix, _), (numbers, parts) in alike.items():  # type: ignore[misc]
        yield _Row(f"{prefix}.{_ranges(numbers)}", len(numbers), parts)
    yield from outside


def _ranges(numbers: Sequence[int]) -> str:
    """`0 … 6, 8, 10 … 79`; beyond a few of them only the first and the last."""
    ends: list[list[int]] = []
    for number in numbers:
        if ends and ends[-1][1] == number - 1:
            ends[-1][1] = number
        else:
            ends.append([number, number])
    texts = [str(a) if a == b else f"{a} … {b}" for a, b in ends]
    return ", ".join(texts if len(texts) <= 4 else [*texts[:2], "…", texts[-1]])


def _read(report: Report, entry: Entry) -> int:
    share = 1.0
    if len(entry.shape) == 3 and report.experts_per_token:
        share = min(1.0, report.experts_per_token / entry.shape[0])
    return round(entry.nbytes * share)


def _layer(report: Report, row: _Row, colours: dict[str, str], widest: int, stored: int) -> str:
    total = sum(e.nbytes for _, e in row.entries)
    bar = "".join(
        f'<i style="width:{100 * e.nbytes / widest:.3f}%;background:{colours[e.kernel]}"'
        f' title="{html.escape(n, True)}: {_size(e.nbytes)}"></i>'
        for n, e in sorted(row.entries, key=lambda part: (part[1].kernel, part[0]))
        if e.nbytes
    )
    kept = sum(not e.kernel and bool(e.block) for _, e in row.entries)
    note = f"<em>{kept} dequantized</em>" if kept else ""
    times = f"<small>{row.alike} alike</small>" if row.alike > 1 else ""
    weights = "".join(_weight(report, n, e, colours, row.alike, stored) for n, e in row.entries)
    return (
        f'<details class="layer"><summary><span class="name">{html.escape(row.name)} {times}</span>'
        f'<span class="bar">{bar}</span><span class="size">{_size(total)}</span>'
        f'<span class="size">{_size(sum(_read(report, e) for _, e in row.entries))}</span>'
        f'<span class="note">{note}</span></summary><div class="weights">{weights}</div></details>\n'
    )


def _weight(report: Report, name: str, e: Entry, colours: dict[str, str], alike: int, stored: int) -> str:
    shape = "×".join(str(size or "any") for size in e.shape)
    if e.block:
        block = " × ".join(str(b) if b else "all" for b in e.block)
        facts, what = f"{shape}, scales per {block}, activations {e.activation}", "weight (float8)"
        cost = _cost(e.nbytes, alike, stored)
        if _read(report, e) != e.nbytes:
            cost += f", {_size(_read(report, e))} a token"
    else:
        facts, what = f"{e.rule}: keys {shape}", "keys, values"
        cost = _cost(e.cache_bytes, alike, 0) + " of cache" if e.cache_bytes else ""
    if e.kernel:
        after = _steps(("input", *(e.after or (e.kernel,))), colours[e.kernel], what)
        outcome = f'<span class="kernel" style="color:{colours[e.kernel]}">{html.escape(e.kernel)}</span>'
    else:
        after = _steps((what, "× scale", *e.before[1:]), _KEPT)
        outcome = f'<span class="why">{html.escape(e.reason)}</span>'
    return (
        f'<div class="weight"><div><b>{html.escape(name)}</b> <span class="cost">{html.escape(cost)}</span>{outcome}'
        f"<small>{html.escape(facts)}</small></div>"
        f'<div class="steps"><label>before</label>{_steps((what, *e.before), "")}<label>after</label>{after}</div></div>'
    )


def _cost(nbytes: int, alike: int, stored: int) -> str:
    """`4.19 MB (0.31 %), 335 MB (25 %) in 80 layers`: shares are of what is stored of FP8 weights."""
    one, every = (_size(n) + (f" ({100 * n / stored:.2g} %)" if stored else "") for n in (nbytes, nbytes * alike))
    return one if alike == 1 else f"{one}, {every} in {alike} layers"


def _steps(names: Sequence[str], colour: str, second: str = "") -> str:
    """A chain of operations, and the other operand of the last one."""
    style = f' style="border-color:{colour}"' if colour else ""
    boxes = [f"<code{style}>{html.escape(n)}</code>" for n in (*names, second) if n]
    return (
        f"<div>{'<u>→</u>'.join(boxes[: len(names)])}{''.join(f'<u>←</u>{box}' for box in boxes[len(names) :])}</div>"
    )


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB" if count < 999.5 else f"{count:.0f} GB"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>ctfp8: {title}</title><style>
:root {{ color-scheme: light dark; --ink: #1b1f24; --soft: #57606a; --line: #d8dee4; --paper: #fff; --box: #f4f6f8; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e6e9ec; --soft: #9aa5b1; --line: #363c44; --paper: #16191d; --box: #20252b; }}
}}
* {{ box-sizing: border-box; }}
body {{ font: 14px/1.45 system-ui, sans-serif; margin: 0 auto; padding: 1.2rem; max-width: 1200px; color: var(--ink);
       background: var(--paper); }}
h1 {{ font-size: 1.25rem; margin: 0 0 .8rem; }}
.facts {{ display: flex; flex-wrap: wrap; gap: .6rem; margin-bottom: 1rem; }}
.facts div {{ background: var(--box); border-radius: 8px; padding: .5rem .9rem; color: var(--soft); font-size: .85rem; }}
.facts b {{ display: block; font-size: 1.25rem; color: var(--ink); }}
header {{ position: sticky; top: 0; background: var(--paper); padding: .4rem 0; border-bottom: 1px solid var(--line); z-index: 1; }}
.legend {{ display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; color: var(--soft); margin-bottom: .4rem; }}
.legend i {{ display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .4em; }}
input {{ font: inherit; width: 100%; max-width: 24rem; padding: .3rem .6rem; border: 1px solid var(--line); border-radius: 6px;
        background: var(--paper); color: var(--ink); }}
summary, .heads {{ display: grid; grid-template-columns: minmax(0, 15rem) minmax(0, 1fr) 5.5rem 5.5rem 7.5rem; gap: .8rem;
                   align-items: center; padding: .22rem 0; }}
summary {{ cursor: pointer; border-bottom: 1px solid var(--line); list-style: none; }}
summary::-webkit-details-marker {{ display: none; }}
summary:hover {{ background: var(--box); }}
.heads {{ color: var(--soft); font-size: .85rem; }}
.name {{ overflow-wrap: anywhere; }}
.name::before {{ content: "▸ "; color: var(--soft); }}
details[open] > summary .name::before {{ content: "▾ "; }}
small {{ color: var(--soft); }}
.bar {{ display: flex; height: 1rem; background: var(--box); border-radius: 3px; overflow: hidden; }}
.bar i {{ display: block; border-right: 1px solid var(--paper); }}
.size {{ text-align: right; font-variant-numeric: tabular-nums; }}
.note em {{ color: {kept}; font-style: normal; }}
.weights {{ padding: .3rem 0 .8rem 1rem; }}
.weight {{ display: grid; grid-template-columns: minmax(0, 22rem) minmax(0, 1fr); gap: .4rem 1.2rem; padding: .5rem 0;
           border-bottom: 1px dotted var(--line); }}
.cost {{ font-variant-numeric: tabular-nums; }}
.kernel, .why {{ display: block; font-size: .85rem; }}
.why {{ color: {kept}; }}
.steps {{ display: grid; grid-template-columns: 3.2rem minmax(0, 1fr); gap: .25rem; align-items: baseline; }}
.steps label {{ color: var(--soft); font-size: .8rem; }}
.steps div {{ line-height: 1.9; }}
code {{ display: inline-block; line-height: 1.4; font: 12px ui-monospace, monospace; background: var(--box); border: 1px solid var(--line); border-radius: 4px;
        padding: .1rem .4rem; overflow-wrap: anywhere; }}
u {{ text-decoration: none; color: var(--soft); margin: 0 .25rem; }}
@media (max-width: 700px) {{
  summary, .heads {{ grid-template-columns: minmax(0, 1fr) 4.6rem 4.6rem; }}
  .bar {{ grid-column: 1 / -1; grid-row: 2; }} .note, .heads .wide {{ display: none; }}
  .weight {{ grid-template-columns: minmax(0, 1fr); }} .weights {{ padding-left: 0; }}
}}
</style></head><body>
<h1>What ctfp8 does for {title}</h1>
<div class="facts">{facts}</div>
<header><div class="legend">{legend}</div>
<input id="filter" type="search" placeholder="filter: a name, a kernel, a reason" aria-label="filter"></header>
<div class="heads"><span>layer</span><span class="wide">FP8 bytes by kernel</span><span class="size">stored</span>
<span class="size">read a token</span><span class="wide"></span></div>
{rows}
<script>
const box = document.getElementById("filter");
box.addEventListener("input", () => {{
  const wanted = box.value.toLowerCase();
  for (const layer of document.querySelectorAll(".layer")) {{
    let any = layer.querySelector(".name").textContent.toLowerCase().includes(wanted);
    for (const weight of layer.querySelectorAll(".weight")) {{
      const shown = any || weight.textContent.toLowerCase().includes(wanted);
      weight.hidden = !shown;
      weight.style.display = shown ? "" : "none";
    }}
    const shown = any || [...layer.querySelectorAll(".weight")].some(weight => !weight.hidden);
    layer.style.display = shown ? "" : "none";
    layer.open = wanted !== "" && shown && !any;
  }}
}});
</script>
</body></html>
""".replace("{kept}", _KEPT)
