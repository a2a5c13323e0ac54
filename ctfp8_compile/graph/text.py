"""A graph as text: one operation a line, what golden tests and reports show."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..compat import OpOverload
from .nodes import value

aten = torch.ops.aten


def format_graph(graph: fx.Graph) -> str:
    """One op a line, names normalised, with dtype and shape: what golden tests and reports show.

    Assertions that export adds about metadata are left out.
    """
    short = {torch.bfloat16: "bf16", torch.float32: "f32", torch.float16: "f16", torch.float8_e4m3fn: "f8e4m3",
             torch.int64: "i64", torch.int32: "i32", torch.bool: "b1"}  # fmt: skip
    names: dict[fx.Node, str] = {}
    lines = []

    def show(arg: Any) -> str:
        if isinstance(arg, fx.Node):
            return names[arg]
        if isinstance(arg, (list, tuple)):
            return "[" + ", ".join(show(a) for a in arg) + "]"
        return str(arg).removeprefix("torch.")

    def describe(v: Any) -> str:
        if isinstance(v, torch.Tensor):
            return f"{short.get(v.dtype, str(v.dtype))}[{', '.join(str(s) for s in v.shape)}]"
        if isinstance(v, (list, tuple)):
            return "(" + ", ".join(describe(x) for x in v) + ")"
        return "" if v is None else str(v)

    for node in graph.nodes:
        if node.op == "output":
            lines.append(f"return {show(node.args[0])}")
            continue
        if node.target is aten._assert_tensor_metadata.default:
            continue
        names[node] = f"%{len(names)}"
        if node.op in ("placeholder", "get_attr"):
            lines.append(f"{names[node]} = {node.op} : {describe(value(node))}")
            continue
        parts = [show(a) for a in node.args] + [f"{k}={show(v)}" for k, v in node.kwargs.items()]
        lines.append(f"{names[node]} = {op_name(node)}({', '.join(parts)}) : {describe(value(node))}")
    return "\n".join(lines)


def op_name(node: fx.Node) -> str:
    """`mm`, `ctfp8.dequantize`: the operation without `aten`."""
    target = node.target
    if isinstance(target, OpOverload):
        namespace, name = target.namespace, target._schema.name.split("::")[1]
        return name if namespace in ("aten", "prims") else f"{namespace}.{name}"
    return getattr(target, "__name__", str(target))
