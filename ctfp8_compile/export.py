"""Ahead of time: the same rules and lowering on a graph from `torch.export`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from . import passes
from .report import Report
from .target import Target


def lower(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    target: str | Target | None = None,
    dynamic_shapes: Any = None,
) -> ExportedProgram:
    """Exports a model and rewrites its graph for a target, which need not be on this machine.

    Args:
        model: with FP8 weights, from `from_pretrained`, `prepare` or `load_state_dict`.
        args, kwargs: example inputs, as the model is called.
        target: such as `"cpu"` or `"cuda:sm90"`; default: the device the model is on.
        dynamic_shapes: as for `torch.export.export`.

    Returns:
        The program; its FP8 parameters stay float8_e4m3fn and on the device they are on.

    Raises:
        TargetError: not a target.
    """
    return _lower(model, args, kwargs, target, dynamic_shapes)[0]


def explain(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    target: str | Target | None = None,
    dynamic_shapes: Any = None,
) -> Report:
    """Says what would become of each FP8 weight on a target, without compiling or running the model.

    Args: as for `lower`.

    Returns:
        A report: `print` it, or take `.rewritten` and `.kept`, whose entries have `.name .rule .kernel .reason`;
        `.to_dict()`, `.to_html(path)`.
    """
    return _lower(model, args, kwargs, target, dynamic_shapes)[1]


def _lower(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None, target: Any, dynamic_shapes: Any
) -> tuple[ExportedProgram, Report]:
    if not isinstance(target, Target):
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        target = Target.detect(device) if target is None else Target.parse(target)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)  # torch.export's own
        program = torch.export.export(
            model, tuple(args), dict(kwargs or {}), dynamic_shapes=dynamic_shapes, strict=False
        )
        # an empty table functionalises and keeps linear and attention whole; the default one would decompose them
        program = program.run_decompositions({})
    report = passes.run(program.graph, target)
    program.graph_module.recompile()
    return program, report
