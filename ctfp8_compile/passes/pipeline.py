"""The passes, in order, and the ways to run them.

    traced graph ── packed, prepacked, regions ──▶ match ──▶ decisions ── rewrite ──▶ ctfp8 nodes ── lowered ──▶ target's ops
                  stage traced                     stage post_grad

`torch.compile`, `lower`, `export` and `load` run this one list; a pass says for itself where it has nothing to do (`ways`,
`skips`). `ctfp8 explain CKPT --passes` prints it as a line, and what each pass did.

`explain` ends with the decisions. A CPU export writes them into the artifact (`annotate`) and decomposes the graph; `load`
reads them, selects from its own machine's kernels and goes on from there. Nothing is decided in two places.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from torch import fx

from ..errors import UsageError
from ..graph import CACHED, MARKER
from ..lowering.scaled import QUANTIZE, SCALED
from ..ops import BY_ROW, ROTATE, SWIZZLED, TRANSPOSED, UNSWIZZLED
from ..ops.triton import WEIGHT_ONLY
from ..report import Entry, Report
from ..target import Target
from . import horizontal_fusion, prepack, regions, runner
from .attention import ATTENTIONS, fuse_attention
from .collectives import WAYS, gather_fp8, scatter_tokens
from .combine_linears import combine_linears
from .cse import share_quantization
from .decision import Decision, match, select
from .decompose import decompose
from .graph_pass import Context, Pass, Way
from .horizontal_fusion import LINEARS, PACK
from .inline_triton import inline_triton
from .lower import lower_scaled
from .rewrite import preview, rewrite
from .rule import Rule
from .rules import RULES, is_ours, source_of
from .runner import Pipeline
from .skinny_linear import ELEMENTS, LARGE_LINEARS, ROWS, stream_skinny_linears
from .strides import keep_strides
from .transforms import share_rotations, transforms


def _share_rotations(graph: fx.Graph, context: Context) -> int:
    context.transforms = transforms(graph)
    return share_rotations(graph)


def _pack(graph: fx.Graph, context: Context) -> int:
    done = horizontal_fusion.declare(graph)
    context.packed = horizontal_fusion.groups(graph)
    return done


def _take_prepacked(graph: fx.Graph, context: Context) -> int:
    context.prepacked = prepack.take_out(graph)
    context.packed = horizontal_fusion.groups(graph)  # scales that were packed for a layout of theirs have left, too
    return len(context.prepacked)


def _make_regions(graph: fx.Graph, context: Context) -> int:
    assert graph.owning_module is not None
    context.regions = regions.declare(graph.owning_module)
    return context.regions.count


def _match(graph: fx.Graph, context: Context) -> int:
    context.decisions = decide(graph, context.target, context.rules)
    return len(context.decisions)


def _rewrite(graph: fx.Graph, context: Context) -> int:
    context.decisions, context.kernels = rewrite(graph, context.decisions)
    return sum(bool(decision.after) for decision in context.decisions)


def _fuse_attention(graph: fx.Graph, context: Context) -> int:
    context.attention = fuse_attention(graph, context.target)
    return sum(not entry.reason for entry in context.attention)


def _decompose(graph: fx.Graph, context: Context, caches: int) -> int:
    context.transforms = context.transforms or transforms(graph)  # in a compiled graph, those that were shared
    context.replaced = decompose(graph, bool(caches))
    return len(context.replaced)


def _fold(graph: fx.Graph, context: Context) -> int:
    assert context.program is not None
    return prepack.fold(context.program)


def _on_cpus_as_it_is(context: Context) -> str:
    """A program for CPUs keeps the model's own parameters: the machine that loads it packs what its kernels read."""
    return (
        "a program for CPUs keeps its parameters" if (context.way, context.target.device) == ("export", "cpu") else ""
    )


def _not_for_cpus(context: Context) -> str:
    return "kernels for CPUs read scales as they are" if context.target.device == "cpu" else ""


def _no_program(context: Context) -> str:
    return "" if context.program is not None else "nothing holds its parameters"


_MARKERS = (MARKER, MARKER.overloadpacket)

#: The passes, in the order in which they run.
PASSES: list[Pass] = [
    Pass(
        "keep-strides", "traced", lambda graph, context: keep_strides(graph), operators=(torch.cat,), ways=("compile",),
        why="first: it writes a copy into the graph, which is then part of a layer like any other node",
        before=("regions",),
    ),
    Pass(
        "share-rotations", "traced", _share_rotations, operators=(ROTATE,), ways=("compile", "export"),
        why="before horizontal fusion, which asks for linears with one input",
        before=("horizontal-fusion", "regions"),
    ),
    Pass(
        "horizontal-fusion", "traced", _pack, operators=LINEARS, ways=("compile", "export"), skips=_on_cpus_as_it_is,
        why="while linears are whole, and before prepacking, which lays out the scales of what is packed as one",
        before=("prepack",),
    ),
    Pass(
        "prepack", "traced", lambda graph, context: prepack.declare(graph, context.target), operators=_MARKERS,
        ways=("compile", "export"), skips=_not_for_cpus,
        why="behind horizontal fusion: the scales of fused linears are one tensor by then",
        after=("horizontal-fusion",), before=("match",),
    ),
    Pass(
        "take-prepacked", "traced", _take_prepacked, operators=(BY_ROW, TRANSPOSED, SWIZZLED, PACK), ways=("compile",),
        why="behind all that is computed of parameters alone: none of it is left in the graph",
        after=("horizontal-fusion", "prepack"), before=("regions",),
    ),
    Pass(
        "regions", "traced", _make_regions, ways=("compile",),
        why="last of its stage: what any pass changes in one layer it has to have changed in all, or they differ",
        after=("keep-strides", "horizontal-fusion", "prepack", "take-prepacked"),
    ),
    Pass(
        "match", "post_grad", _match, operators=(MARKER,), ways=("compile", "export"),
        why="first: rules know the graph as tracers write it; of a loaded artifact its notes say what they found",
        before=("rewrite", "attention", "decompose"),
    ),
    Pass(
        "rewrite", "post_grad", _rewrite, operators=(MARKER,),
        why="behind match, whose decisions it carries out, and before what makes plain ATen of the markers left",
        after=("match",), before=("decompose",),
    ),
    Pass(
        "attention", "post_grad", _fuse_attention, operators=ATTENTIONS,
        why="before decompose, which makes plain ATen of an FP8 cache that no attention took",
        before=("decompose",),
    ),
    Pass(
        "decompose", "post_grad", _decompose, operators=(MARKER, CACHED, ROTATE), settings=(("caches", 1),),
        why="before all that follows a rewrite: what no kernel took is plain ATen then, and every dead view of a weight gone",
        after=("match", "rewrite", "attention"),
    ),
    Pass(
        "share-quantization", "post_grad", lambda graph, context: share_quantization(graph), operators=(*QUANTIZE, PACK),
        why="before combining, which asks for one input, and before lowering, while a quantization is one node",
        after=("rewrite",), before=("combine-linears", "lower-scaled"),
    ),
    Pass(
        "combine-linears", "post_grad", lambda graph, context: combine_linears(graph, context.kernels), operators=(PACK,),
        why="behind sharing, which makes the inputs of q, k and v one node; before lowering, which takes a matmul apart",
        after=("share-quantization", "decompose"), before=("lower-scaled",),
    ),
    Pass(
        "scatter-tokens", "post_grad", lambda graph, context: scatter_tokens(graph), asked=True,
        why="before gathers are made FP8: it makes gathers",
        after=("combine-linears",), before=("gather-fp8",),
    ),
    Pass(
        "gather-fp8", "post_grad", lambda graph, context: gather_fp8(graph), operators=QUANTIZE, asked=True,
        why="before lowering, while a quantization is one node, and behind combining: fused linears have one gather",
        after=("share-quantization", "combine-linears"), before=("lower-scaled",),
    ),
    Pass(
        "lower-scaled", "post_grad", lambda graph, context: lower_scaled(graph, context.kernels),
        operators=(*SCALED, *QUANTIZE, UNSWIZZLED),
        why="behind all that knows our operators; nothing above knows a target's",
        after=("rewrite", "decompose", "share-quantization", "combine-linears"),
    ),
    Pass(
        "skinny-linears", "post_grad",
        lambda graph, context, rows, elements: stream_skinny_linears(graph, context.target, rows, elements),
        operators=LARGE_LINEARS, settings=(("rows", ROWS), ("elements", ELEMENTS)),
        why="behind decompose and lowering, which may leave a matmul with a weight that is not FP8",
        after=("decompose", "lower-scaled"),
    ),
    Pass(
        "inline-triton", "post_grad", lambda graph, context: inline_triton(graph), operators=tuple(WEIGHT_ONLY.values()),
        ways=("compile",),
        why="behind combining and lowering: a kernel's launch is opaque to them",
        after=("combine-linears", "lower-scaled"),
    ),
    Pass(
        "fold-parameters", "post_grad", _fold, operators=(BY_ROW, TRANSPOSED, SWIZZLED, PACK), ways=("export",),
        skips=_no_program,
        why="last: combining has to see what is packed, and takes apart what no one kernel reads",
        after=("prepack", "combine-linears", "lower-scaled"),
    ),
]  # fmt: skip
runner.check_order(PASSES)


def standard(asked: Collection[str] = (), without: Collection[str] = ()) -> Pipeline:
    """The pipeline that runs where no other is named: with the passes asked for, without those not wanted."""
    return runner.chosen(PASSES, asked, without)


def parse(line: str) -> Pipeline:
    """A pipeline from a line such as `match,rewrite,decompose{caches=0}`; the empty line is the standard one.

    Raises:
        UsageError: see `runner.parse`.
    """
    return runner.parse(line, PASSES) if line.strip() else standard()


def decide(graph: fx.Graph, target: Target, rules: Sequence[Rule] | None = None) -> list[Decision]:
    """What would become of each use of an FP8 weight on a target; the graph stays as it is."""
    return select(match(graph, RULES if rules is None else rules), target)


def apply(graph: fx.Graph, target: Target, decisions: Sequence[Decision]) -> Report:
    """Rewrites a graph in place as decided by the notes of an artifact, and says what it did."""
    context = Context(target, "load", decisions=list(decisions))
    standard().run("post_grad", graph, context)
    return report_of(context)


def run(
    graph: fx.Graph,
    target: Target,
    rules: Sequence[Rule] | None = None,
    lower: bool = True,
    collectives: str = "as traced",
    pipeline: Pipeline | None = None,
    way: Way = "export",
) -> Report:
    """Rewrites a graph in place, and says what it did.

    Args:
        graph: an ATen graph with fake values in `node.meta["val"]`, from Inductor's post-grad hook or `torch.export`.
        lower: whether to end with the target's own operators, or with the `ctfp8::` ones that any machine can run.
        collectives: one of `collectives.WAYS`.
        pipeline: whose passes run, instead of what the two before say.
    """
    if pipeline is None:
        pipeline = standard(WAYS[collectives], () if lower else ("lower-scaled", "skinny-linears"))
    context = Context(target, way, rules)
    pipeline.run("post_grad", graph, context)
    return report_of(context)


def report_of(context: Context) -> Report:
    """What passes left to be told."""
    found = report(context.target, preview(context.decisions), context.attention, context.transforms)
    return replace(found, passes=tuple(context.ran))


def report(
    target: Target, decisions: Sequence[Decision], attention: Sequence[Entry] = (), transforms: Sequence[Entry] = ()
) -> Report:
    """The report of a list of decisions, of what became of attention, and of transforms of activations."""
    weights = Report.of(str(target), [decision.entry() for decision in decisions])
    return replace(weights, attention=tuple(attention), transforms=tuple(transforms))


def register_pass(one: Pass) -> Pass:
    """Adds a pass of yours, for every graph compiled or lowered in this process from now on.

    It stands right behind the last pass that its `after` names, else right before the first that its `before` names, else at
    the end of its stage. A pass of yours of the same name gives way to it.

    Raises:
        UsageError: its name is one of ours, it is no function that runs, or no place fits.
    """
    if any(known.name == one.name and is_ours(known.run) for known in PASSES):
        raise UsageError(f"the pass {one.name} is one of ctfp8's. Give yours another name.")
    if not inspect.isfunction(one.run):
        raise UsageError(
            f"the pass {one.name} runs {one.run!r}, which is no Python function. Write one: Inductor's cache reads its source."
        )
    PASSES[:] = runner.inserted(one, PASSES)
    return one


def fingerprint() -> str:
    """The sources of the rules and passes that are not ours; enters Inductor's cache key, as the package's own sources do."""
    theirs = [type(rule) for rule in RULES if not is_ours(type(rule))]
    passes = [one for one in PASSES if not is_ours(one.run)]
    facts = [f"{one} {one.stage} {one.operators} {one.ways}" for one in passes]
    return "".join([*map(source_of, theirs), *facts, *(source_of(f) for one in passes for f in (one.run, one.skips))])
