"""What a report says of a model on several processes: which part of each weight is here, and what cut blocks cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from .. import passes
from ..checkpoint.shard import Shard, cure
from ..model.parametrization import quantized_parameters
from ..report import Entry, Report
from ..target import Target


def is_spread(model: nn.Module) -> bool:
    """Whether this process has a part of the model, and others have the rest."""
    return any(isinstance(dequantize.info.layout, Shard) for _, _, dequantize in quantized_parameters(model))


def with_parts(report: Report, model: nn.Module, decisions: Sequence[passes.Decision], target: Target) -> Report:
    """A report that says which part of each weight this rank has; the same report where it has all.

    Args:
        decisions: those that the report is of.
    """
    parts: dict[str, str] = {}
    of = {d.parameter: d for d in decisions}
    for name, _, dequantize in quantized_parameters(model):
        layout, scheme = dequantize.info.layout, dequantize.info.scheme
        if not isinstance(layout, Shard):
            continue
        parts[name] = str(layout)
        if (whole := layout.cut_block(scheme)) is not None:
            smaller = "×".join(map(str, layout.block(scheme)))
            parts[name] += (
                f"; the border cuts its blocks of {whole[0]}×{whole[1]} to {smaller}, {cure([(layout, scheme)])}"
            )
            if (lost := _lost(of.get(name), layout, whole, target)) is not None:
                parts[name] += f" and gives it {lost}"
    if not parts:
        return report

    def said(entries: tuple[Entry, ...]) -> tuple[Entry, ...]:
        return tuple(replace(e, part=parts.get(e.name, "")) for e in entries)

    return replace(report, rewritten=said(report.rewritten), kept=said(report.kept))


def _lost(decision: passes.Decision | None, layout: Shard, block: tuple[int, int], target: Target) -> str | None:
    """The kernel that would take the weight if no border cut its blocks, where that is another one."""
    if decision is None or decision.match is None:
        return None
    whole = replace(decision, shape=layout.whole.shape, match=replace(decision.match, block=block))
    (again,) = passes.select([whole], target)
    now = None if decision.kernel is None else decision.kernel.name
    return None if again.kernel is None or again.kernel.name == now else again.kernel.name
