"""What a node of dynamo's graph does besides computing its result: operators are there as they were called, in place too."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ..compat import HigherOrderOperator, OpOverload, OpOverloadPacket


def only_computes(node: fx.Node) -> bool:
    """Whether a node of dynamo's graph neither writes to memory nor changes how what follows is computed."""
    target: Any = node.target
    if node.op == "call_method":
        return not str(target).endswith("_") or str(target).endswith("__")
    if node.op != "call_function" or isinstance(target, HigherOrderOperator):
        return False
    if node.kwargs.get("out") is not None or node.kwargs.get("inplace") or _in_place(target, node.args):
        return False
    if isinstance(target, OpOverloadPacket):
        return not _has_writing_overload(target)
    if isinstance(target, OpOverload):
        return not target._schema.is_mutable
    name, module = getattr(target, "__name__", "_"), getattr(target, "__module__", "")
    if module in ("operator", "_operator"):
        return name not in _WRITES
    if module == "torch" and isinstance(operator_of_it := getattr(torch.ops.aten, name, None), OpOverloadPacket):
        return not _has_writing_overload(operator_of_it)  # _grouped_mm is private, and only computes
    return not name.startswith("_") and not name.endswith("_")


def _has_writing_overload(packet: OpOverloadPacket) -> bool:
    """One that writes without being asked to by `out`."""
    return any(getattr(packet, name)._schema.is_mutable for name in packet.overloads() if not name.endswith("out"))


_WRITES = {
    "setitem", "delitem", "iadd", "iand", "iconcat", "ifloordiv", "ilshift", "imatmul", "imod", "imul", "ior", "ipow", "irshift",
    "isub", "itruediv", "ixor",
}  # fmt: skip


def _in_place(target: Any, args: Sequence[Any]) -> bool:
    """Whether `inplace` of a function is given by its place."""
    at = _place_of_inplace(target) if True in [a for a in args if isinstance(a, bool)] else None
    return at is not None and at < len(args) and args[at] is True


@functools.cache
def _place_of_inplace(target: Any) -> int | None:
    try:
        names = list(inspect.signature(target).parameters)
    except (TypeError, ValueError):
        return None
    return names.index("inplace") if "inplace" in names else None
