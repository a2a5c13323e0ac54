"""What became of each FP8 weight of a graph: which rule rewrote it to which kernel, or why it stayed dequantized."""

from __future__ import annotations

import html
import itertools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..counted import counted
from .html import page

#: A number between the dots of a name: of a layer, of an expert.
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class Entry:
    """One FP8 parameter, or one attention to a key-value cache.

    Attributes:
        name: the model's name of the parameter.
        rule: the rule that matched its use; empty if none did.
        kernel: what runs it now; empty if it stayed dequantized.
        reason: why it stayed dequantized; empty if it was rewritten.
        shape: stored shape, `[N, K]` or `[E, N, K]`.
        block: rows and columns that share a scale.
        activation: the checkpoint's activation scheme.
        uses: how often the graph uses it.
        before, after: the operations on the way from the weight to its use, as traced and as rewritten; `after` is empty
            where nothing was.
        declined: why kernels that come before this one for its target declined.
        note: what the kernel that was chosen has to say to who gets it, such as a choice that may be faster.
        part: where a model is spread over processes, which part of the weight this one has, and what a cut block costs.
        cache_bytes: of the keys and values that an attention reads of a full cache; 0 where their number is any.
    """

    name: str
    rule: str
    kernel: str
    reason: str
    shape: tuple[int, ...]
    block: tuple[int, ...]
    activation: str
    uses: int = 1
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    declined: str = ""
    note: str = ""
    part: str = ""
    cache_bytes: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the FP8 weight and its float32 scales; an attention has none."""
        if not self.block:
            return 0
        *experts, rows, cols = self.shape
        row_blocks, col_blocks = (-(-n // b) if b else 1 for n, b in zip((rows, cols), self.block, strict=True))
        return math.prod(experts) * (rows * cols + 4 * row_blocks * col_blocks)


@dataclass(frozen=True)
class Ran:
    """What one pass did to a graph.

    Attributes:
        name, stage: the pass, and which of the two graphs it changes.
        matches: how many places it changed.
        skipped: why it did not look; empty if it did.
        graph: the graph after it, where that was asked for.
    """

    name: str
    stage: str
    matches: int
    skipped: str = ""
    graph: str = ""

    @staticmethod
    def summed(parts: Iterable[Iterable[Ran]]) -> tuple[Ran, ...]:
        """One for each pass that ran over several graphs; skipped if it was in all of them."""
        found: dict[str, Ran] = {}
        for ran in itertools.chain.from_iterable(parts):
            before = found.get(ran.name, ran)
            matches = ran.matches + (before.matches if ran.name in found else 0)
            found[ran.name] = replace(before, matches=matches, skipped=ran.skipped and before.skipped)
        return tuple(found.values())


@dataclass(frozen=True)
class Report:
    """The result of rewriting one or several graphs for a target.

    Attributes:
        experts_per_token: how many experts of each layer one token reads, where the model's config says so.
        attention: each attention to a key-value cache, by its module's name; `shape` is that of its keys.
        model: what the model is called, where that is known; the picture's title.
        transforms: each transform of an activation that a rotated checkpoint asks for, by its module's name; `shape` is that of
            its matrix.
        layers: how a compiled graph's repeated layers were compiled; empty where none repeats.
        passes: what each pass did, in their order; of repeated layers, those that were compiled count.
    """

    target: str
    rewritten: tuple[Entry, ...]
    kept: tuple[Entry, ...]
    experts_per_token: int | None = None
    model: str = ""
    attention: tuple[Entry, ...] = ()
    transforms: tuple[Entry, ...] = ()
    layers: str = ""
    passes: tuple[Ran, ...] = ()

    def summary(self) -> str:
        """One line: how many weights run on which kernel, how many stayed dequantized, and why."""
        total = len(self.rewritten) + len(self.kept)
        parts = [f"{counted(total, 'FP8 weight')} for {self.target}"]
        for (rule, kernel), n in Counter((e.rule, e.kernel) for e in self.rewritten).most_common():
            parts.append(f"{n} {rule} → {kernel}")
        for reason, n in Counter(e.reason for e in self.kept).most_common():
            parts.append(f"{n} dequantized in the graph ({reason})")
        for (rule, outcome), n in Counter(
            (e.rule, e.kernel or e.reason) for e in (*self.attention, *self.transforms)
        ).most_common():
            parts.append(f"{n} {rule} → {outcome}")
        return "; ".join([*parts, self.layers] if self.layers else parts)

    def __str__(self) -> str:
        """The summary, then a line a weight and an attention; what fared alike, and differs in name by numbers only, shares one.

        Then why kernels that come before those chosen declined, and what those chosen have to say.
        """
        alike: Counter[tuple[str, str, str]] = Counter()
        for e in (*self.rewritten, *self.kept, *self.attention, *self.transforms):
            what = f"{e.rule} → {e.kernel or e.reason}" if e.kernel or not e.block else f"dequantized: {e.reason}"
            what += f" [{e.part}]" * bool(e.part)
            alike[_NUMBER.sub("*", e.name), "×".join(map(str, e.shape)), what] += 1
        widths = [max((len(line[i]) for line in alike), default=0) for i in (0, 1)]
        lines = [
            f"  {count:>3} × {name:<{widths[0]}}  {shape:<{widths[1]}}  {what}"
            for (name, shape, what), count in alike.items()
        ]
        past = Counter(e.declined for e in self.rewritten if e.declined)
        lines += [f"  {count:>3} × not taken by a kernel that comes before: {why}" for why, count in past.items()]
        notes = Counter(e.note for e in self.rewritten if e.note)
        lines += [f"  {count:>3} × note: {note}" for note, count in notes.items()]
        return "\n".join([self.summary(), *lines])

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, as `json.dumps` takes them."""
        passes = {"passes": [asdict(ran) for ran in self.passes]} if self.passes else {}
        return {
            "target": self.target,
            "rewritten": [asdict(e) for e in self.rewritten],
            "kept": [asdict(e) for e in self.kept],
            "attention": [asdict(e) for e in self.attention],
            "transforms": [asdict(e) for e in self.transforms],
            **passes,
        }

    def to_html(self, path: str | Path) -> Path:
        """Writes a picture of the rewrite as one self-contained page, and returns its path."""
        Path(path).write_text(page(self), encoding="utf-8")
        return Path(path)

    def _repr_html_(self) -> str:
        """The picture in a notebook, in a frame of its own: neither's styles reach the other."""
        return f'<iframe srcdoc="{html.escape(page(self))}" style="width: 100%; height: 36em; border: 0"></iframe>'

    @staticmethod
    def of(target: str, entries: Iterable[Entry], experts_per_token: int | None = None) -> Report:
        """One entry a parameter; where it is used several times, a use that stayed dequantized decides."""
        uses: dict[str, list[Entry]] = defaultdict(list)
        for entry in entries:
            uses[entry.name].append(entry)
        merged = [
            replace(next((e for e in same if e.reason), same[0]), uses=sum(e.uses for e in same))
            for same in uses.values()
        ]
        done, kept = (tuple(e for e in merged if bool(e.reason) is why) for why in (False, True))
        return Report(target, done, kept, experts_per_token)
