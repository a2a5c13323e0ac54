"""Ahead of time: the same rules and lowering on a graph from `torch.export`, and the file it is saved in."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch._inductor import aot_compile
from torch.export import ExportedProgram
from torch.export.pt2_archive._package import package_pt2
from torch.fx.experimental.symbolic_shapes import free_symbols
from torch.utils import _pytree as pytree

from .. import passes
from ..compat import version
from ..errors import TargetError, UsageError
from ..model.parametrization import quantized_parameters
from ..passes import side_by_side
from ..report import Report
from ..target import Target
from . import sites
from .call import inputs_of, positional_names, ranges_of
from .manifest import NAME, Manifest

aten = torch.ops.aten


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
    program, _ = _lower(model, args, kwargs, target, dynamic_shapes)
    side_by_side.fold(program)
    return program


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
    report = _lower(model, args, kwargs, target, dynamic_shapes)[1]
    return replace(report, experts_per_token=_experts_per_token(model))


def _experts_per_token(model: nn.Module) -> int | None:
    """As a transformers config says it, under one of the names that families give it."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    names = ("num_experts_per_tok", "moe_k", "moe_topk", "num_experts_per_token", "top_k_experts")
    return next((n for n in (getattr(config, name, None) for name in names) if isinstance(n, int)), None)


def export(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    path: str | Path = "model.pt2",
    target: str | Target | None = None,
    dynamic_shapes: Any = None,
    package: str | None = None,
) -> Report:
    """Writes a model, rewritten for a target, to one `.pt2` file that `ctfp8.load` runs without transformers.

    The file is torch.export's own archive with a manifest (`ctfp8_compile.aot.manifest`) in it. FP8 weights stay FP8. For cpu and
    xpu its graph is plain ATen, so `torch.export.load` runs it without this package too; `ctfp8.load` puts the CPU kernels of
    its machine back (`ctfp8_compile.aot.sites`). For cuda it may name operators of fbgemm.

    For a language model with a static cache see `StaticCacheDecoder`.

    Args:
        model: with FP8 weights, from `from_pretrained`, `prepare` or `load_state_dict`.
        args, kwargs: example inputs, as the model is called. What is no tensor (`use_cache=False`) is fixed in the file.
        path: a file name that ends in `.pt2`; what is there is replaced.
        target: such as `"cpu"` or `"cuda:sm90"`, which need not be on this machine; default: the device the model is on.
        dynamic_shapes: as for `torch.export.export`; a dimension that is not named there has its example's size for good.
        package: None for a program, `"aoti"` for AOTInductor's machine code for this machine.

    Returns:
        What became of each FP8 weight, as from `explain`.

    Raises:
        TargetError: not a target, or `package="aoti"` for another machine.
        UsageError: the call takes or returns objects that only transformers can rebuild.
    """
    path, target = Path(path), _target(model, target)
    if path.suffix != ".pt2":
        raise UsageError(f"{path}: artifacts are .pt2 files; give the path that suffix.")
    if package not in (None, "aoti"):
        raise UsageError(f"package={package!r}: it is None for a program or 'aoti' for AOTInductor's machine code.")
    if package == "aoti" and target != _target(model, None):
        raise TargetError(f"package='aoti' compiles for the machine at hand, {_target(model, None)}, not for {target}.")
    program = _trace(model, args, kwargs, dynamic_shapes)
    _plain_call(program)
    if package is None and target.device == "cpu":
        report = passes.run(_copy(program.graph), target)
        sites.record(program.graph, passes.RULES)
        _rewrite(program, target, rules=())
    else:
        report = _rewrite(program, target)
        side_by_side.fold(program)
    _clean(program)
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
    )
    extra = {NAME: manifest.to_json()}
    if package == "aoti":
        package_pt2(str(path), aoti_files={"model": _compile(program)}, extra_files=extra)
    else:
        program._example_inputs = None  # they would be pickled
        package_pt2(str(path), exported_programs={"model": program}, extra_files=extra)
    return report


_ONLY_THERE = (
    "which only transformers can build. Pass kwargs={'use_cache': False}, or take "
    "ctfp8.StaticCacheDecoder(model, ...), which keeps its cache in the artifact."
)
_PACKAGES = ("torch", "ctfp8-compile", "transformers", "compressed-tensors")


def _target(model: nn.Module, target: str | Target | None) -> Target:
    if isinstance(target, Target):
        return target
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return Target.detect(device) if target is None else Target.parse(target)


def _trace(
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
                # torch 2.11 refuses a dynamic sequence for attention otherwise
                prefer_deferred_runtime_asserts_over_guards=torch.__version__ < "2.13",
            )
        except RuntimeError as error:
            if match := re.search(r"Found <class '(?:\w+\.)*(\w+)'> in output, which is not a known type", str(error)):
                raise UsageError(f"the model returns a {match[1]}, {_ONLY_THERE}") from error
            raise
        # an empty table functionalises and keeps linear and attention whole; the default one would decompose them
        return program.run_decompositions({})


def _lower(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None, target: Any, dynamic_shapes: Any
) -> tuple[ExportedProgram, Report]:
    target = _target(model, target)
    program = _trace(model, args, kwargs, dynamic_shapes)
    return program, _rewrite(program, target)


def _rewrite(program: ExportedProgram, target: Target, rules: Sequence[passes.Rule] = passes.RULES) -> Report:
    if target.device != "cpu" and rules:
        side_by_side.declare(program.graph)
    # the signature names the nodes that are outputs: it has to follow when a rule replaces one of them
    with program.graph_module._set_replace_hook(program.graph_signature.get_replace_hook()):
        report = passes.run(program.graph, target, rules)
    program.graph_module.recompile()
    return report


def _copy(graph: fx.Graph) -> fx.Graph:
    copy = fx.Graph()
    copy.output(copy.graph_copy(graph, {}))
    return copy


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
    raise UsageError(f"the model {what} a {spec.type.__name__}, {_ONLY_THERE}")


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
    program._range_constraints = {s: ends for s, ends in program.range_constraints.items() if s in used}


def _compile(program: ExportedProgram) -> list[Any]:
    assert program.example_inputs is not None
    args, kwargs = program.example_inputs
    files = aot_compile(program.module(check_guards=False), args, kwargs, options={"aot_inductor.package": True})
    return list(files)
