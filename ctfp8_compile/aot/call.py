"""How an artifact is called: each leaf of the flattened call, and the sizes that its tensors may have."""

from __future__ import annotations

import ast
import functools
import inspect
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.export import ExportedProgram

from ..compat import free_symbols


@dataclass(frozen=True)
class Input:
    """One leaf of the flattened call: a tensor (`dtype` and `shape`, symbols by name) or, without a dtype, a constant.

    A size is a number, a symbol (`s70`) or arithmetic on symbols (`2*s70 + 1`).
    """

    name: str
    dtype: str | None = None
    shape: tuple[int | str, ...] = ()
    constant: bool | int | float | str | None = None

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]" if self.dtype else repr(self.constant)


def positional_names(forward: Callable[..., object], count: int) -> tuple[str, ...]:
    """The names of the first `count` positional arguments; those of `*xs` are `xs_0`, `xs_1`, …"""
    names: list[str] = []
    for parameter in inspect.signature(forward).parameters.values():
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}_{i}" for i in range(count - len(names))]
        else:
            names.append(parameter.name)
    return tuple(names[:count])


def inputs_of(program: ExportedProgram) -> tuple[Input, ...]:
    """The flattened call of a program."""
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    out = []
    for i, name in enumerate(program.graph_signature.user_inputs):
        value = values.get(name) if isinstance(name, str) else None
        if isinstance(value, torch.Tensor):
            out.append(
                Input(name, dtype_name(value.dtype), tuple(s if type(s) is int else str(s) for s in value.shape))
            )
        else:
            out.append(Input(f"input {i}", constant=name))
    return tuple(out)


def ranges_of(program: ExportedProgram) -> dict[str, tuple[int, int | None]]:
    """The ends of each symbol in an input's shape."""
    taken = set(program.graph_signature.user_inputs)
    shapes = [n.meta["val"].shape for n in program.graph.nodes
              if n.op == "placeholder" and n.name in taken and isinstance(n.meta.get("val"), torch.Tensor)]  # fmt: skip
    named = {str(symbol) for shape in shapes for size in shape for symbol in free_symbols(size)}
    return {
        str(symbol): (int(r.lower), int(r.upper) if r.upper.is_Integer else None)
        for symbol, r in sorted(program.range_constraints.items(), key=str)
        if str(symbol) in named
    }


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def symbols_in(size: str) -> tuple[str, ...]:
    """The symbols that a size names."""
    return _parsed(size)[1]


def evaluate(size: str, symbols: Mapping[str, int]) -> int | None:
    """A size, given its symbols; None if it is more than sums, products and quotients of them."""
    tree, names = _parsed(size)
    if tree is None or any(name not in symbols for name in names):
        return None
    try:
        return _value(tree, symbols)
    except ZeroDivisionError:
        return None


def solve(size: str, is_: int, symbols: Mapping[str, int], unknown: str) -> int | None:
    """The value of the one unknown symbol with which a size is so large; None if no integer is, or it is not linear."""
    at0, at1 = (evaluate(size, {**symbols, unknown: n}) for n in (0, 1))
    if at0 is None or at1 is None or at0 == at1:
        return None
    found = (is_ - at0) // (at1 - at0)
    return found if evaluate(size, {**symbols, unknown: found}) == is_ else None


_ARITHMETIC: dict[type, Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


@functools.lru_cache(maxsize=1024)
def _parsed(size: str) -> tuple[ast.expr | None, tuple[str, ...]]:
    try:
        tree = ast.parse(size, mode="eval").body if len(size) < 1000 else None
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        tree = None
    nodes = [] if tree is None else list(ast.walk(tree))
    plain = (ast.BinOp, ast.Name, ast.Load, *_ARITHMETIC)
    if not all(isinstance(n, plain) or (isinstance(n, ast.Constant) and type(n.value) is int) for n in nodes):
        tree = None
    return tree, tuple(dict.fromkeys(n.id for n in nodes if isinstance(n, ast.Name)))


def _value(tree: ast.expr, symbols: Mapping[str, int]) -> int:
    if isinstance(tree, ast.BinOp):
        return _ARITHMETIC[type(tree.op)](_value(tree.left, symbols), _value(tree.right, symbols))
    if isinstance(tree, ast.Name):
        return symbols[tree.id]
    assert isinstance(tree, ast.Constant)
    assert isinstance(tree.value, int)
    return tree.value
