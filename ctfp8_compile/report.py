"""What became of each FP8 weight of a graph: which rule rewrote it to which kernel, or why it stayed dequantized."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Entry:
    """One FP8 parameter.

    Attributes:
        name: the model's name of the parameter.
        rule: the rule that matched its use; empty if none did.
        kernel: what runs it now; empty if it stayed dequantized.
        reason: why it stayed dequantized; empty if it was rewritten.
        shape: stored shape, `[N, K]` or `[E, N, K]`.
        block: rows and columns that share a scale.
        activation: the checkpoint's activation scheme.
        uses: how often the graph uses it.
    """

    name: str
    rule: str
    kernel: str
    reason: str
    shape: tuple[int, ...]
    block: tuple[int, ...]
    activation: str
    uses: int = 1


@dataclass(frozen=True)
class Report:
    """The result of rewriting one or several graphs for a target."""

    target: str
    rewritten: tuple[Entry, ...]
    kept: tuple[Entry, ...]

    def summary(self) -> str:
        """One line: how many weights run on which kernel, how many stayed dequantized, and why."""
        total = len(self.rewritten) + len(self.kept)
        parts = [f"{total} FP8 weights for {self.target}"]
        for (rule, kernel), n in Counter((e.rule, e.kernel) for e in self.rewritten).most_common():
            parts.append(f"{n} {rule} → {kernel}")
        for reason, n in Counter(e.reason for e in self.kept).most_common():
            parts.append(f"{n} dequantized in the graph ({reason})")
        return "; ".join(parts)

    def __str__(self) -> str:
        lines = [self.summary(), ""]
        width = max((len(e.name) for e in (*self.rewritten, *self.kept)), default=0)
        for e in self.rewritten:
            lines.append(f"  {e.name:<{width}}  {_shape(e)}  {e.rule} → {e.kernel}")
        for e in self.kept:
            lines.append(f"  {e.name:<{width}}  {_shape(e)}  dequantized: {e.reason}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, as `json.dumps` takes them."""
        return {
            "target": self.target,
            "rewritten": [asdict(e) for e in self.rewritten],
            "kept": [asdict(e) for e in self.kept],
        }

    def to_html(self, path: str | Path) -> Path:
        """Writes one self-contained page with a row a weight, and returns its path."""
        rows = "".join(_row(e) for e in (*self.rewritten, *self.kept))
        Path(path).write_text(_PAGE.format(summary=html.escape(self.summary()), rows=rows), encoding="utf-8")
        return Path(path)

    @staticmethod
    def merge(reports: Iterable[Report]) -> Report:
        """One report over several graphs; a weight that stayed dequantized in any of them counts as kept."""
        reports = list(reports)
        kept = {e.name: e for r in reports for e in r.kept}
        rewritten = {e.name: e for r in reports for e in r.rewritten if e.name not in kept}
        return Report(reports[0].target if reports else "", tuple(rewritten.values()), tuple(kept.values()))


def _shape(entry: Entry) -> str:
    return "×".join(str(s) for s in entry.shape)


def _row(e: Entry) -> str:
    cells = (
        e.name,
        _shape(e),
        "×".join(str(b) for b in e.block),
        e.activation,
        e.rule,
        e.kernel or "dequantized",
        e.reason,
    )
    kind = "kept" if e.reason else "done"
    return f'<tr class="{kind}">' + "".join(f"<td>{html.escape(c)}</td>" for c in cells) + "</tr>\n"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>ctfp8 report</title><style>
body {{ font: 14px/1.5 system-ui, sans-serif; margin: 2rem; color: #1b1f24; background: #fff; }}
table {{ border-collapse: collapse; }}
th, td {{ text-align: left; padding: .25rem .75rem; border-bottom: 1px solid #d8dee4; }}
th {{ position: sticky; top: 0; background: #fff; }}
.done td:nth-child(6) {{ color: #0a6b2b; }}
.kept td {{ background: #fff6e0; }}
</style></head><body>
<h1>What ctfp8 did</h1><p>{summary}</p>
<table><thead><tr><th>weight</th><th>shape</th><th>scale block</th><th>activations</th><th>rule</th><th>kernel</th>
<th>why not</th></tr></thead><tbody>
{rows}</tbody></table></body></html>
"""
