"""Writes a model, rewritten for a target, to one `.pt2` file."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from .. import passes
from ..compat import (
    OpOverload,
    aot_compile,
    forget_example_inputs,
    free_symbols,
    package_pt2,
    set_range_constraints,
    small_loops_alone,
    version,
)
from ..errors import ArtifactError, TargetError, UsageError
from ..model.parametrization import quantized_parameters
from ..model.ranks import agree, together
from ..model.storage import detach_from_mmap
from ..report import Report
from ..target import Target
from .call import inputs_of, positional_names, ranges_of
from .exponents import as_bytes, others_refused
from .lower import ONLY_THERE, rewrite, target_of, trace
from .manifest import NAME, Manifest
from .operators import check_operator
from .parts import is_spread, with_parts
from .ranks import ranks_of

aten = torch.ops.aten


def export(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    path: str | Path = "model.pt2",
    target: str | Target | None = None,
    dynamic_shapes: Any = None,
    package: str | None = None,
) -> Report:
    """The `.pt2` of `interchange.export.export`, which says what the arguments are.

    The file is torch.export's own archive with a manifest (`ctfp8_compile.aot.manifest`) in it. Its graph for cpu is annotated
    (`ctfp8_compile.passes.annotate`), so that `load` may choose kernels again.
    """
    spread = is_spread(model)
    with together(spread):
        return _export(model, args, kwargs, Path(path), target_of(model, target), dynamic_shapes, package, spread)


def check_suffix(path: Path) -> None:
    """Returns if a path ends in `.pt2`.

    Raises:
        UsageError: it does not; names the suffixes of all files that are written.
    """
    if path.suffix != ".pt2":
        raise UsageError(f"{path}: what is written is a .pt2, .onnx or .xml file; give the path one of these suffixes.")


def _export(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None,
    path: Path,
    target: Target,
    dynamic_shapes: Any,
    package: str | None,
    spread: bool,
) -> Report:
    check_suffix(path)
    if package not in (None, "aoti"):
        raise UsageError(f"package={package!r}: it is None for a program or 'aoti' for AOTInductor's machine code.")
    if package == "aoti" and target != (here := target_of(model, None)):
        raise TargetError(f"package='aoti' compiles for the machine at hand, {here}, not for {target}.")
    program = trace(model, args, kwargs, dynamic_shapes)
    _plain_call(program)
    ranks = ranks_of(program.graph)
    if ranks is not None and package == "aoti":
        raise UsageError(
            "package='aoti': machine code names the process group of the process that made it. Export a program "
            "(package=None) for each rank."
        )
    if spread:
        _own_file(path)
        # this rank's rows are a view of a file's whole tensor, all of which would be written
        detach_from_mmap((*model.parameters(), *model.buffers()))
    as_found = package is None and target.device == "cpu"  # the machine that loads it picks its own kernels
    context = passes.Context(target, program=program)
    rewrite(program, context, passes.parse(_TO_BE_LOADED) if as_found else passes.standard())
    report = replace(passes.report_of(context), passes=())  # of this machine; who loads the file has passes of its own
    report = with_parts(report, model, context.decisions, target)
    _clean(program)
    if package is None:
        _operators_that_load(program)
    manifest = Manifest(
        package=package or "program",
        target=str(target),
        schemes=dict(Counter(str(q.info.scheme) for _, _, q in quantized_parameters(model))),
        kernels=dict(Counter(e.kernel for e in report.rewritten)),
        report=report.to_dict(),
        versions={name: version(name) for name in _PACKAGES},
        positional=positional_names(model.forward, len(args)),
        inputs=inputs_of(program),
        ranges=ranges_of(program),
        notes=passes.notes(context.decisions, program.graph, context.replaced) if as_found else (),
        ranks=ranks,
    )
    extra = {NAME: manifest.to_json()}
    if package == "aoti":
        package_pt2(str(path), aoti_files={"model": _compile(program)}, extra_files=extra)
    else:
        forget_example_inputs(program)
        package_pt2(str(path), exported_programs={"model": program}, extra_files=extra)
    return report


#: What a program for the kernels of another CPU goes through: plain ATen, which any machine runs, but for its FP8 caches, which
#: wait for the attention of the machine that loads it.
_TO_BE_LOADED = "share-rotations,match,decompose{caches=0}"


def _own_file(path: Path) -> None:
    """Refuses two ranks that would write one file."""
    paths = agree(say=str(path))
    if len({*paths}) < len(paths):
        raise UsageError(
            f"{path}: each rank writes a file of its own; give it a name of its own, such as "
            'f"model-{torch.distributed.get_rank()}.pt2".'
        )


def _operators_that_load(program: ExportedProgram) -> None:
    """What `load` would refuse is said now, when something can still be done about it."""
    for node in program.graph.nodes:
        if node.op == "call_function" and node.target is not operator.getitem:  # an operator's outputs, in a file
            overload = isinstance(node.target, OpOverload)
            name = f"torch.ops.{node.target}" if overload else f"{node.target.__module__}.{node.target.__name__}"
            try:
                check_operator(name)
            except ArtifactError as error:
                raise UsageError(
                    f"the model's graph calls {name}, which ctfp8.load does not take from a file. Export with "
                    "torch.export what needs it, or say it by operators of ATen."
                ) from error


_PACKAGES = ("torch", "ctfp8-compile", "transformers", "compressed-tensors")


def _plain_call(program: ExportedProgram) -> None:
    """Makes the call's containers Python's own, so that a process without transformers can build them."""
    signature = program.module_call_graph[0].signature
    assert signature is not None
    signature.in_spec = _plain(signature.in_spec, "takes")
    signature.out_spec = _plain(signature.out_spec, "returns")


def _plain(spec: pytree.TreeSpec, what: str) -> pytree.TreeSpec:
    children = [_plain(child, what) for child in spec.children()]
    if spec.is_leaf() or spec.type in (tuple, list, dict):
        return spec if spec.is_leaf() else pytree.TreeSpec(spec.type, spec.context, children)
    if what == "returns" and issubclass(spec.type, dict) and isinstance(spec.context, list):
        return pytree.TreeSpec(dict, spec.context, children)  # transformers' ModelOutput
    raise UsageError(f"the model {what} a {spec.type.__name__}, {ONLY_THERE}")


def _clean(program: ExportedProgram) -> None:
    """Leaves out what a file must not hold or cannot run without transformers.

    Tracing metadata names files of this machine and is numbered at random, assertions on metadata repeat what the graph
    says, and transformers' grouped matmul has an ATen operator of the same meaning.
    """
    fallback = getattr(torch.ops.transformers, "grouped_mm_fallback", None)
    for node in list(program.graph.nodes):
        node.meta = {k: v for k, v in node.meta.items() if k in ("val", "custom", "nn_module_stack")}
        if node.target is aten._assert_tensor_metadata.default:
            program.graph.erase_node(node)
        elif fallback is not None and node.target is fallback.default:
            node.target = aten._grouped_mm.default
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()
    used = {symbol for node in program.graph.nodes for symbol in free_symbols(node.meta.get("val"))}
    set_range_constraints(program, {s: ends for s, ends in program.range_constraints.items() if s in used})


def _compile(program: ExportedProgram) -> list[Any]:
    assert program.example_inputs is not None
    args, kwargs = program.example_inputs
    options = {"aot_inductor.package": True} | small_loops_alone(torch.get_num_threads())
    module = program.module(check_guards=False)
    as_bytes(module)
    with others_refused():
        return list(aot_compile(module, args, kwargs, options=options))
