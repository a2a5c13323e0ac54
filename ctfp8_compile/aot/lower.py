"""Ahead of time: the passes on a graph from `torch.export`, for a machine that need not be this one."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from ..compat import export_arguments, following
from ..errors import UsageError
from ..model.beside import Beside, beside
from ..passes import Context, Pipeline, attention, parse, report_of, standard
from ..passes.plain import plain
from ..report import Entry, Report
from ..target import Target
from .parts import with_parts


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
        UsageError: the call returns objects that only transformers can rebuild, such as a cache.
    """
    program = trace(model, args, kwargs, dynamic_shapes)
    rewrite(program, Context(target_of(model, target), program=program), standard())
    return program


def explain(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    target: str | Target | None = None,
    dynamic_shapes: Any = None,
    passes: str | None = None,
    graphs: bool = False,
) -> Report:
    """Says what would become of each FP8 weight on a target, without compiling or running the model.

    Args: as for `lower`.
        passes: their names, such as `"match,rewrite,decompose"`, or all (`""`): they are run, and the report's `.passes` say
            what each did. Default: nothing is rewritten.
        graphs: with `passes`, whether each of `.passes` has the `.graph` behind it, as text.

    Returns:
        A report: `print` it, or take `.rewritten` and `.kept`, whose entries have `.name .rule .kernel .reason`;
        `.to_dict()`, `.to_html(path)`.

    Raises:
        TargetError: not a target.
        UsageError: a pass that is not there, or in an order that does not work.
    """
    target = target_of(model, target)
    report = _explain(model, args, kwargs, target, dynamic_shapes, passes, graphs)
    for other in beside(model):
        found = _explain(other.module, other.args, None, target, None, None, False)
        rewritten, kept = (_own(entries, other) for entries in (found.rewritten, found.kept))
        report = replace(report, rewritten=(*report.rewritten, *rewritten), kept=(*report.kept, *kept))
    return replace(report, experts_per_token=_experts_per_token(model), model=_name(model))


def _explain(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None,
    target: Target,
    dynamic_shapes: Any,
    passes: str | None,
    graphs: bool,
) -> Report:
    program = trace(model, args, kwargs, dynamic_shapes)
    context = Context(target, graphs=graphs)
    rewrite(program, context, parse(_EXPLAINED if passes is None else passes))
    if passes is None:
        context.attention = attention(program.graph, target)
    report = with_parts(report_of(context), model, context.decisions, target)
    return replace(report, passes=report.passes if passes is not None else ())


def _own(entries: tuple[Entry, ...], other: Beside) -> tuple[Entry, ...]:
    """Of what runs beside a model, the weights that are not the model's."""
    return tuple(
        replace(e, name=other.shown + e.name.removeprefix(other.prefix))
        for e in entries
        if e.name.startswith(other.prefix)
    )


#: What tells a model's decisions: fused, weights may be for another kernel.
_EXPLAINED = "share-rotations,horizontal-fusion,prepack,match"


ONLY_THERE = (
    "which only transformers can build. Pass kwargs={'use_cache': False}, or take "
    "ctfp8.StaticCacheDecoder(model, ...), which keeps its cache in the artifact."
)


def trace(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None, dynamic_shapes: Any
) -> ExportedProgram:
    """The model as a functional ATen graph in which each use of an FP8 weight is a marker."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)  # torch.export's own
        try:
            program = torch.export.export(
                model,
                tuple(args),
                dict(kwargs or {}),
                dynamic_shapes=dynamic_shapes,
                strict=False,
                **export_arguments(),
            )
        except RuntimeError as error:
            if match := re.search(r"Found <class '(?:\w+\.)*(\w+)'> in output, which is not a known type", str(error)):
                raise UsageError(f"the model returns a {match[1]}, {ONLY_THERE}") from error
            raise
        # an empty table functionalises and keeps linear and attention whole; the default one would decompose them
        return program.run_decompositions({})


def rewrite(program: ExportedProgram, context: Context, pipeline: Pipeline) -> None:
    """Rewrites a program in place; what the passes leave to be told is in the context."""
    pipeline.run("traced", program.graph, context)
    with following(program):
        pipeline.run("post_grad", program.graph, context)
    plain(program.graph)
    program.graph_module.recompile()


def target_of(model: nn.Module, target: str | Target | None) -> Target:
    """The target asked for; by default the device the model is on."""
    if isinstance(target, Target):
        return target
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return Target.detect(device) if target is None else Target.parse(target)


def _name(model: nn.Module) -> str:
    """`llama (LlamaForCausalLM)`: where a checkpoint was loaded from, and the class."""
    source = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "").rstrip("/").rpartition("/")[2]
    return f"{source} ({type(model).__name__})" if source else type(model).__name__


def _experts_per_token(model: nn.Module) -> int | None:
    """As a transformers config says it, under one of the names that architectures give it."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    names = ("num_experts_per_tok", "moe_k", "moe_topk", "num_experts_per_token", "top_k_experts")
    return next((n for n in (getattr(config, name, None) for name in names) if isinstance(n, int)), None)
