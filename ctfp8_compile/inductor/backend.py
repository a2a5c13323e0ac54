"""`torch.compile(model, backend="ctfp8")`: Inductor, with our passes at its post-grad hook."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx

from .. import lowering, passes
from ..compat import CompileWrapper, CustomGraphPass, RestartAnalysis, compile_fx, inductor_config, small_loops_alone
from ..errors import TargetError, UsageError
from ..graph import fake_value, is_traced_marker, name_markers
from ..model.storage import some_loaded
from ..passes import regions
from ..passes.collectives import WAYS
from ..passes.regions import Regions
from ..report import Ran, Report
from ..target import Target
from . import pack_lowering as pack_lowering  # Inductor knows it from here on
from .counting import counting_cpp
from .finished import Finished, tell
from .packed import places_of
from .prepacked import made_of
from .progress import stage
from .sources import source_hash
from .toolchain import missing

log = logging.getLogger("ctfp8_compile")

#: Options, and values of options, that had another name before.
_RENAMED: dict[Any, Any] = {
    "ctfp8.join": "ctfp8.horizontal_fusion",
    ("ctfp8.collectives", "codes"): ("ctfp8.collectives", "fp8"),
}
OPTIONS = (
    "ctfp8.target",
    "ctfp8.kernels",
    "ctfp8.horizontal_fusion",
    "ctfp8.collectives",
    "ctfp8.regions",
    "ctfp8.passes",
)


def backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compiles a dynamo graph for inference: FP8 matmuls are rewritten for the target, Inductor does the rest.

    Args:
        mode, options: as for Inductor. Options of ours: `ctfp8.target`, such as `"cuda:sm90"`; default: the device the
            FP8 weights are on. `ctfp8.kernels`: `"auto"`, or only those of `"fbgemm"`, `"mslk"`, `"scaled_mm"` or `"triton"`.
            `ctfp8.horizontal_fusion`: whether linears with one input become one matmul; default: yes. `ctfp8.collectives`, of a
            model on several processes: `"fp8"` all-gathers FP8 values, `"tokens"` also spreads norms over the ranks.
            `ctfp8.regions`: whether layers that repeat, four or more, are compiled once; default: on CPUs. `ctfp8.passes`: the
            passes that run, such as `"match,rewrite,decompose"`, and no others, whatever the options before say.

    Raises:
        UsageError: the graph needs gradients, or an option is unknown.
        TargetError: the target is not the device the weights are on.
    """
    ours, theirs = _split_options(options)
    name_markers(gm.graph)
    marked = [node for node in gm.graph.nodes if is_traced_marker(node)]
    if not marked:
        if not some_loaded():  # else the graph after a graph break, without a weight
            _warn_no_fp8()
    elif torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in example_inputs):
        raise UsageError(
            "ctfp8 compiles for inference, but an input of this graph requires a gradient. "
            "Call the model under torch.no_grad(), or detach the input."
        )
    target = _target(ours, marked)
    config = _config(mode, theirs, target, bool(marked))
    pipeline, said = _pipeline(ours, target, config)
    config["post_grad_custom_pre_pass"] = Fp8Pass(target, config.get("post_grad_custom_pre_pass"), pipeline)
    context = passes.Context(target, "compile", regions=Regions(said))
    stage("passes")
    if marked:
        pipeline.run("traced", gm.graph, context)
    return _finished(gm, _inputs(gm, example_inputs, context), config, context, len(marked))


def _config(mode: str | None, options: dict[str, Any], target: Target, marked: bool) -> dict[str, Any]:
    """Inductor's options: the user's, and ours where they say nothing."""
    config = dict(CompileWrapper(mode, options, None).config)
    if marked and target.device != "cpu":
        # rows of an activation are quantized by one kernel, however long; split, three would do it where rows are few
        config.setdefault("split_reductions", False)
    if marked and target.device == "cpu":
        config = small_loops_alone(torch.get_num_threads()) | config
    return config


def _pipeline(ours: dict[str, Any], target: Target, config: dict[str, Any]) -> tuple[passes.Pipeline, str]:
    """The passes that the options ask for; and why repeated layers will not be regions, where they were meant to be."""
    if "ctfp8.passes" in ours:
        return passes.parse(ours["ctfp8.passes"]), ""
    collectives = ours.get("ctfp8.collectives", "as traced")
    if collectives not in WAYS:
        raise UsageError(f"ctfp8.collectives={collectives!r}: it is one of {', '.join(WAYS)}.")
    without = [] if ours.get("ctfp8.horizontal_fusion", True) else ["horizontal-fusion"]
    wanted = ours.get("ctfp8.regions", target.device == "cpu")
    asked = [f"{name} asks" for name in ("cpp_wrapper", "freezing") if config.get(name, getattr(inductor_config, name))]
    asked += ["norms spread over ranks ask"] * (collectives == "tokens")
    if asked or not wanted:
        without.append("regions")
    said = f"layers compiled one by one, as {asked[0]} for" if wanted and asked else ""
    return passes.standard(WAYS[collectives], without), said


def _inputs(gm: fx.GraphModule, example_inputs: Sequence[Any], context: passes.Context) -> list[Any]:
    """What Inductor compiles for: prepacked scales take the place of those they are made of."""
    first = {one.sources[0] for one in context.prepacked}
    placeholders = gm.graph.find_nodes(op="placeholder")
    return [fake_value(n) if n in first else x for n, x in zip(placeholders, example_inputs, strict=True)]


def _finished(
    gm: fx.GraphModule, inputs: list[Any], config: dict[str, Any], context: passes.Context, marked: int
) -> Callable[..., Any]:
    """The compiled graph, called as the caller of the model does; its report is among those of this process."""
    before = len(_reports)
    compiled, repeated = _compile(gm, inputs, config, context.regions)
    if marked and len(_reports) == before:
        log.info("%d uses of FP8 weights for %s; code came from Inductor's cache", marked, context.target)
    elif len(_reports) > before:
        parts = _reports[before:]
        ran = Ran.summed([context.ran, *(part.passes for part in parts)])
        _reports[before:] = [replace(repeated.report(parts), passes=ran)]
        log.info("%s", _reports[-1].summary())
    around = Finished(
        made_of(gm.graph, context.prepacked),
        places_of(gm.graph, context.packed),
        leaves_files=bool(marked) and context.target.device == "cpu",
    )
    if not any(True for _ in chain(gm.parameters(), gm.buffers())):  # else it is more than its arguments
        tell(compiled, config, around, context.target)
    return around.around(compiled)


def _compile(
    gm: fx.GraphModule, inputs: list[Any], config: dict[str, Any], repeated: Regions
) -> tuple[Callable[..., Any], Regions]:
    gm.recompile()
    before = len(_reports)
    try:
        with counting_cpp():
            return compile_fx(gm, inputs, config_patches=config), repeated
    except RestartAnalysis:  # dynamo traces again
        raise
    except Exception as error:
        if lacks := missing(error):
            raise UsageError(lacks) from error
        if not repeated.names:
            raise
        # whatever torch does not take of a region: the graph is compiled as without
        reason = str(error).strip().partition("\n")[0]
        log.warning("repeated layers are compiled one by one; as regions they could not be: %s", reason)
        del _reports[before:]
        regions.inline(gm, repeated.stacks)
        return _compile(gm, inputs, config, Regions(f"layers compiled one by one: {type(error).__name__} as regions"))


class Fp8Pass(CustomGraphPass):
    """Our pipeline as Inductor's post-grad pass; another custom pass the user set runs before it.

    Its `uuid` enters the key of Inductor's code cache: same sources, passes, target and kernels, same code.
    """

    def __init__(self, target: Target, first: Any = None, pipeline: passes.Pipeline | None = None):
        self.target, self.first = target, first
        self.pipeline = passes.standard() if pipeline is None else pipeline

    def __call__(self, graph: fx.Graph) -> None:
        for custom in self.first if isinstance(self.first, (list, tuple)) else [self.first]:
            if custom is not None:
                custom(graph)
        report = passes.run(graph, self.target, pipeline=self.pipeline, way="compile")
        if report.rewritten or report.kept or report.attention:
            _reports.append(report)

    def uuid(self) -> Any:
        theirs = []
        for custom in self.first if isinstance(self.first, (list, tuple)) else [self.first]:
            if custom is not None:
                theirs.append(custom.uuid() if isinstance(custom, CustomGraphPass) else None)
                if theirs[-1] is None:
                    return None  # a pass Inductor cannot identify: no caching, as it would do itself
        return (
            source_hash(),
            passes.fingerprint(),
            str(self.pipeline),
            str(self.target),
            lowering.fingerprint(self.target),
            tuple(map(str, theirs)),
        )


#: Reports of the graphs compiled in this process, newest last; a cache hit adds none.
_reports: list[Report] = []


def compiled_reports() -> tuple[Report, ...]:
    """The reports of all graphs this process compiled (Inductor cache hits excepted: they skip the passes)."""
    return tuple(_reports)


def _split_options(options: dict[str, Any] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    theirs = dict(options or {})
    ours = {}
    for key in [key for key in theirs if key.startswith("ctfp8.")]:
        name, value = _renamed(key, theirs.pop(key))
        if name not in OPTIONS:
            raise UsageError(f"unknown option {key!r}; ctfp8 knows {', '.join(OPTIONS)}.")
        ours[name] = value
    return ours, theirs


def _renamed(option: str, value: Any) -> tuple[str, Any]:
    """An option as it is spelled today; earlier spellings work, with a warning."""
    new = _RENAMED.get(
        option, _RENAMED.get((option, value), (option, value)) if isinstance(value, str) else (option, value)
    )
    name, today = (new, value) if isinstance(new, str) else new
    if (name, today) != (option, value):
        warnings.warn(f"{option}={value!r} is now spelled {name}={today!r}.", FutureWarning, stacklevel=3)
    return name, today


def _target(ours: dict[str, Any], marked: list[fx.Node]) -> Target:
    """The target asked for, checked against the device the weights are on, by default that device; with its kernels."""
    target = _machine(ours.get("ctfp8.target"), marked)
    return target.limited_to(ours["ctfp8.kernels"]) if "ctfp8.kernels" in ours else target


def _machine(wanted: str | None, marked: list[fx.Node]) -> Target:
    weights = [n.args[0].meta.get("example_value") for n in marked if isinstance(n.args[0], fx.Node)]
    device = next((w.device for w in weights if isinstance(w, Tensor)), torch.device("cpu"))
    if wanted is None:
        return Target.detect(device)
    target = Target.parse(wanted)
    if target.device != device.type:
        raise TargetError(
            f"ctfp8.target is {target}, but the model's weights are on {device}. Move the model with .to({target.device!r}), "
            "or compile for another machine with ctfp8.lower."
        )
    return target


@functools.cache
def _warn_no_fp8() -> None:
    warnings.warn(
        "backend='ctfp8': this graph holds no FP8 weight, so it is compiled by plain Inductor. Load the checkpoint with "
        "ctfp8_compile.from_pretrained (transformers' own from_pretrained dequantizes the weights), or a plain "
        "nn.Module with ctfp8_compile.load_state_dict.",
        stacklevel=3,
    )


__all__ = ["backend", "compiled_reports"]
