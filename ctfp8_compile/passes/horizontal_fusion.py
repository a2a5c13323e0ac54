"""Horizontal fusion: linears with one input (q, k, v; gate, up) become one matmul over packed weights, without a copy of them.

    before                                  declared                                        combined (combine_linears)
    linear(x, dequantize(%q, %s0, …))       %w = pack([%q, %k, %v])                 %y = scaled_mm(%x8, %w, …, %s, …)
    linear(x, dequantize(%k, %s1, …))       %s = pack([%s0, %s1, %s2])              slice(%y, 1, 0, Nq) …
    linear(x, dequantize(%v, %s2, …))       linear(x, dequantize(slice(%w, …), slice(%s, …), …)) …

`declare` does the first step, on the graph that dynamo or torch.export gives. `ctfp8::pack` is a concatenation, so
the graph is right wherever it runs. That it costs nothing is seen to at its end:

- a compiled graph takes the parameters as they are: `inductor/packed.py` moves those of a group into one allocation before the
  first call (they stay parameters of their modules, with their own names and shapes, as views of it), and Inductor reads
  all of them through the first one;
- an exported program gets one parameter in their place (`prepack.fold`).

Scales of whole matrices (per-tensor schemes) differ, so that the packed matrix has one per row: `scales_by_row`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ..graph import MARKER, arguments, fake_value
from ..ops import BY_ROW

aten = torch.ops.aten
PACK = torch.ops.ctfp8.pack.default
LINEARS = (aten.linear.default, torch.nn.functional.linear)
_MARKERS = (MARKER, MARKER.overloadpacket)
_BY_ROW = "by row"


def declare(graph: fx.Graph) -> int:
    """Declares, in place, which parameters are to be packed; returns how many groups of linears are one then.

    Args:
        graph: of dynamo or torch.export, in which linears are whole and a marker's weight is a placeholder.
    """
    by_input: dict[Any, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        if node.op == "call_function" and node.target in LINEARS and (alike := _alike(node)) is not None:
            by_input[arguments(node)[0], alike].append(node)
    first = next((node for node in graph.nodes if node.op != "placeholder"), None)

    def pack(consumers: Sequence[fx.Node], index: int, apart: bool = True, rows: Sequence[int] = ()) -> None:
        """Argument `index` of each consumer becomes its part of all of them; or all of them."""
        parts = [arguments(node)[index] for node in consumers]
        with graph.inserting_before(first):
            whole = add(graph, BY_ROW, parts, list(rows)) if rows else add(graph, PACK, parts)
            end = 0
            for i, (node, part) in enumerate(zip(consumers, parts, strict=True)):
                begin, end = end, end + (rows[i] if rows else fake_value(part).shape[0])
                node.update_arg(index, add(graph, aten.slice.Tensor, whole, 0, begin, end) if apart else whole)

    for (_, (_, block, *_)), linears in by_input.items():
        if len(linears) < 2:
            continue
        markers = [arguments(node)[1] for node in linears]
        rows = [fake_value(arguments(marker)[0]).shape[0] for marker in markers]
        pack(markers, 0)
        pack(markers, 1, rows=rows if block == _BY_ROW else ())
        for marker in markers if block == _BY_ROW else ():
            marker.update_arg(3, [1, arguments(marker)[3][1]])
        if arguments(markers[0])[2] is not None:
            pack(markers, 2, apart=False)  # they share their input, so they share its scale: the largest
        if len(arguments(linears[0])) > 2 and arguments(linears[0])[2] is not None:
            pack(linears, 2)
    return sum(len(linears) > 1 for linears in by_input.values())


def groups(graph: fx.Graph) -> list[list[fx.Node]]:
    """The placeholders of parameters that are to be packed, group by group."""
    return [list(arguments(node)[0]) for node in graph.nodes if node.target is PACK]


def _alike(linear: fx.Node) -> Any:
    """What linears must have in common to be fused; None for one that cannot be."""
    _, marker, *bias = arguments(linear)
    if not isinstance(marker, fx.Node) or marker.target not in _MARKERS or len(marker.users) > 1 or linear.kwargs:
        return None
    weight, scale, input_scale, block, activation, dtype = arguments(marker)
    for parameter in (*arguments(marker)[:3], *bias):
        if parameter is not None and not _own(parameter):
            return None
    rows, cols = fake_value(weight).shape
    scales = fake_value(scale).shape[0]
    per_row = scales < rows and block[1] >= cols and activation != "group"  # a scale for all rows, or for several
    if rows % 16 or rows % (scales if per_row else block[0]):
        return None  # a kernel, or a block of scales, would not take them fused
    bias_dtype = fake_value(bias[0]).dtype if bias and bias[0] is not None else None
    scale_dtype = fake_value(scale).dtype
    return (
        cols,
        _BY_ROW if per_row else tuple(block),
        activation,
        dtype,
        scale_dtype,
        input_scale is None,
        bias_dtype,
        fake_value(weight).device,
    )


def _own(parameter: Any) -> bool:
    return isinstance(parameter, fx.Node) and parameter.op == "placeholder" and len(parameter.users) == 1


def add(graph: fx.Graph, op: Any, parts: Any, *args: Any) -> fx.Node:
    """A node of any tracer's graph, with its fake value where that tracer keeps it."""
    node = graph.call_function(op, (parts, *args))
    one = parts if isinstance(parts, fx.Node) else parts[0]
    fakes = fake_value(parts) if isinstance(parts, fx.Node) else [fake_value(p) for p in parts]
    with fake_value(one).fake_mode:
        node.meta["val" if "val" in one.meta else "example_value"] = op(fakes, *args)
    return node
