"""Checks a graph after each pass, where that is asked for: it is well formed, and each new node has the fake value it computes.

    with ctfp8_compile.passes.verifying():          # or CTFP8_VERIFY_PASSES=1 in the environment
        torch.compile(model, backend="ctfp8")(x)

A node is computed again where the pass made it, changed its inputs, or changed their values. What a tracer wrote and no pass
touched is not looked at, so that a fault is that of the pass which is named.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from ..compat import HigherOrderOperator, enable_python_dispatcher
from ..errors import PassError
from ..graph import format_value, same_kind
from .effects import only_computes

_asked = False


@contextlib.contextmanager
def verifying(on: bool = True) -> Iterator[None]:
    """Checks the graph after each pass that runs inside."""
    global _asked
    before, _asked = _asked, on
    try:
        yield
    finally:
        _asked = before


@contextlib.contextmanager
def verified(graph: fx.Graph, name: str) -> Iterator[None]:
    """Checks what the pass that runs inside leaves, if that is asked for.

    Raises:
        PassError: naming the pass and the node.
    """
    if not _asked and os.environ.get("CTFP8_VERIFY_PASSES", "0") in ("", "0"):
        yield
        return
    before = {node: _inputs(node) for node in graph.nodes}
    gave = [_value(node) for node in graph.output_node().all_input_nodes]
    yield
    try:
        graph.lint()
    except Exception as error:
        raise PassError(
            f"the pass {name} left a graph that is not well formed: {str(error).partition(chr(10))[0]}"
        ) from error
    for node in graph.nodes:
        if node.op in ("call_function", "call_method") and _differ(before.get(node), _inputs(node)):
            _check(node, name)
    gives = [_value(node) for node in graph.output_node().all_input_nodes]
    for place, (old, new) in enumerate(zip(gave, gives, strict=False)):
        if not same_kind(old, new):
            said = f"{format_value(new)} and not {format_value(old)}"
            raise PassError(f"the pass {name} left a graph that gives back {said} as its output {place}.")


def _inputs(node: fx.Node) -> tuple[str, list[Any]]:
    """What a node computes, and of what values."""
    return repr((node.target, node.args, node.kwargs)), [_value(n) for n in node.all_input_nodes]


def _differ(before: tuple[str, list[Any]] | None, now: tuple[str, list[Any]]) -> bool:
    return before is None or before[0] != now[0] or any(a is not b for a, b in zip(before[1], now[1], strict=True))


def _value(node: fx.Node) -> Any:
    return node.meta.get("val", node.meta.get("example_value"))


def _check(node: fx.Node, name: str) -> None:
    inputs = [_value(n) for n in node.all_input_nodes]
    if isinstance(node.target, HigherOrderOperator) or any(value is None for value in inputs):
        return  # a graph is among its arguments, or something that tracers give no value
    if (has := _value(node)) is None:
        if not node.users:  # it gives back nothing, such as an assertion
            return
        raise PassError(f"the pass {name} left {node.format_node()} without a fake value in its meta.")
    if "example_value" in node.meta and not only_computes(node):
        return
    try:
        computed = _computed(node, inputs)
    except Exception as error:
        raise PassError(
            f"the pass {name} left {node.format_node()}, which does not take its inputs: {error}"
        ) from error
    if not same_kind(has, computed):
        raise PassError(
            f"the pass {name} left {node.format_node()} with the fake value {format_value(has)}; it computes "
            f"{format_value(computed)}."
        )


def _computed(node: fx.Node, inputs: list[Any]) -> Any:
    """The node's value of its inputs' fake values; nothing is learned of dynamic sizes by it."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), _value)
    mode = next((part.fake_mode for value in inputs for part in _parts(value) if hasattr(part, "fake_mode")), None)
    with contextlib.ExitStack() as inside:
        inside.enter_context(torch.no_grad())
        if mode is not None:
            inside.enter_context(mode)
            inside.enter_context(enable_python_dispatcher())
            if mode.shape_env is not None:
                inside.enter_context(mode.shape_env.suppress_guards())
                inside.enter_context(mode.shape_env.ignore_fresh_unbacked_symbols())
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        target: Any = node.target
        return target(*args, **kwargs)


def _parts(value: Any) -> Iterator[Any]:
    if isinstance(value, (tuple, list)):
        for part in value:
            yield from _parts(part)
    else:
        yield value
