"""Some experts of an FP8 parameter that holds those of a layer, as if they were all: for who handles a few at a time."""

from __future__ import annotations

import math
from dataclasses import replace

from ..checkpoint.layout import Layout
from .plan import QuantizedParameter


def runs_of_experts(info: QuantizedParameter, most: int) -> list[range]:
    """Experts, some after the other, whose tensors in the file are theirs alone; [] where that is not so.

    Args:
        info: of a whole parameter.
        most: bytes of FP8 weights at a time; an expert that is larger comes alone.
    """
    shape = info.layout.shape
    if len(shape) != 3 or not _are_apart(info):
        return []
    step = max(1, most // (shape[1] * shape[2]))
    runs = [range(first, min(first + step, shape[0])) for first in range(0, shape[0], step)]
    block = info.layout.block(info.scheme)
    alike = all(_layout(info.layout, run).block(info.scheme) == block for run in runs)
    return runs if alike else []


def of_experts(info: QuantizedParameter, experts: range) -> QuantizedParameter:
    """What is known of these experts, see `runs_of_experts`: a parameter `[len(experts), N, K]`."""
    layout = _layout(info.layout, experts)
    own = set(layout.sources)
    names, scales, inputs, shapes = (
        {source: of for source, of in each.items() if source in own}
        for each in (info.names, info.scales, info.input_scales, info.shapes)
    )
    return replace(info, layout=layout, names=names, scales=scales, input_scales=inputs, shapes=shapes)  # type: ignore[arg-type]


def _layout(layout: Layout, experts: range) -> Layout:
    height = layout.shape[-2]
    placements = tuple(
        replace(p, start=p.start - experts.start * height) for p in layout.placements if p.start // height in experts
    )
    return Layout((len(experts), *layout.shape[1:]), layout.transposed, placements)


def _are_apart(info: QuantizedParameter) -> bool:
    """Whether no tensor of the file, a scale included, is of two experts."""
    expert: dict[str, int] = {}
    height = info.layout.shape[-2]
    for p in info.layout.placements:
        first, last = p.start // height, (p.start + (p.rows - 1) * p.step) // height
        scales = [held[p.source].name for held in (info.scales, info.input_scales) if p.source in held]
        if first != last or any(expert.setdefault(n, first) != first for n in (info.names[p.source], *scales)):
            return False
    return math.prod(info.layout.shape) > 0
