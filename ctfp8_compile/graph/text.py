"""A graph as text: one operation a line, what golden tests and reports show."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..compat import OpOverload

aten = torch.ops.aten
_SHORT = {
    torch.bfloat16: "bf16", torch.float32: "f32", torch.float16: "f16", torch.float8_e4m3fn: "f8e4m3", torch.int64: "i64",
    torch.int32: "i32", torch.bool: "b1",
}  # fmt: skip


def format_graph(graph: fx.Graph) -> str:
    """One op a line, names normalised, with dtype and shape: what golden tests and reports show.

    Assertions that export adds about metadata are left out.
    """
    names: dict[fx.Node, str] = {}
    lines = []

    def show(arg: Any) -> str:
        if isinstance(arg, fx.Node):
            return names[arg]
        if isinstance(arg, (list, tuple)):
            return "[" + ", ".join(show(a) for a in arg) + "]"
        return str(arg).removeprefix("torch.")

    for node in graph.nodes:
        if node.op == "output":
            lines.append(f"return {show(node.args[0])}")
            continue
        if node.target is aten._assert_tensor_metadata.default:
            continue
        names[node] = f"%{len(names)}"
        if node.op in ("placeholder", "get_attr"):
            lines.append(f"{names[node]} = {node.op} : {_described(_value(node))}")
            continue
        parts = [show(a) for a in node.args] + [f"{k}={show(v)}" for k, v in node.kwargs.items()]
        lines.append(f"{names[node]} = {op_name(node)}({', '.join(parts)}) : {_described(_value(node))}")
    return "\n".join(lines)


def format_value(value: Any) -> str:
    """`bf16[2, 8] strides [8, 1] on cpu`: all that a graph knows of a value."""
    if isinstance(value, torch.Tensor):
        strides = ", ".join(map(str, value.stride()))
        return f"{_described(value)} strides [{strides}] on {value.device}"
    if isinstance(value, (list, tuple)):
        return "(" + ", ".join(map(format_value, value)) + ")"
    return str(value)


def _described(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{_SHORT.get(value.dtype, str(value.dtype))}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, (list, tuple)):
        return "(" + ", ".join(map(_described, value)) + ")"
    return "" if value is None else str(value)


def _value(node: fx.Node) -> Any:
    """In any tracer's graph."""
    return node.meta.get("val", node.meta.get("example_value"))


def op_name(node: fx.Node) -> str:
    """`mm`, `ctfp8.dequantize`: the operation without `aten`."""
    target = node.target
    if isinstance(target, OpOverload):
        namespace, name = target.namespace, target._schema.name.split("::")[1]
        return name if namespace in ("aten", "prims") else f"{namespace}.{name}"
    return getattr(target, "__name__", str(target))
