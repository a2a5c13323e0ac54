"""The pipeline as data: its line, its order, what is skipped, what each pass does to a small block, what a broken pass is told."""

from __future__ import annotations

import operator
from dataclasses import replace

import pytest
import torch
from conftest import DATA, IDS, fp8_config, quantize, relative_error
from expecttest import TestCase
from torch import nn

import ctfp8_compile as ctfp8
from ctfp8_compile import passes
from ctfp8_compile.aot.lower import rewrite, trace
from ctfp8_compile.errors import PassError
from ctfp8_compile.graph import MARKER, before, call
from ctfp8_compile.inductor.backend import Fp8Pass
from ctfp8_compile.passes import PASSES, Context, Pass, Pipeline, parse, register_pass, runner, standard
from ctfp8_compile.target import Target

aten = torch.ops.aten
CPU = Target("cpu")


@pytest.fixture(autouse=True)
def _own_passes():
    before = list(PASSES)
    yield
    PASSES[:] = before


class GateUp(nn.Module):
    """Two linears with one input, so that horizontal fusion makes them one."""

    def __init__(self):
        super().__init__()
        self.gate, self.up = (nn.Linear(64, 32, bias=False, dtype=torch.bfloat16) for _ in range(2))

    def forward(self, x):
        return torch.nn.functional.silu(self.gate(x)) * self.up(x)


def block(activation="token"):
    torch.manual_seed(0)
    module, state = GateUp(), {}
    for name in module.state_dict():
        state[name], state[f"{name}_scale"] = quantize(torch.randn(32, 64))
    return ctfp8.load_state_dict(module, state, fp8_config("channel", activation))


X = torch.linspace(-1, 1, 192).reshape(3, 64).bfloat16()


class Golden(TestCase):
    maxDiff = None

    def test_the_line(self):
        self.assertExpectedInline(
            str(standard()).replace(",", "\n"),
            """\
keep-strides
share-rotations
horizontal-fusion
prepack
take-prepacked
regions
match
rewrite
attention
decompose{caches=1}
share-quantization
combine-linears
lower-scaled
skinny-linears{rows=4
elements=4194304}
inline-triton
fold-parameters""",
        )

    def test_a_block_after_each_pass(self):
        report = ctfp8.explain(block(), (X,), target="xpu", passes="", graphs=True)
        shown, last = [], ""
        for ran in report.passes:
            said = f"{ran.name}: {ran.skipped or ran.matches}"
            shown.append(said if ran.graph in ("", last) else f"{said}\n{ran.graph}\n")
            last = ran.graph or last
        self.assertExpectedInline(
            "\n".join(shown),
            """\
keep-strides: only in torch.compile
share-rotations: none of its operators is in the graph
horizontal-fusion: 1
%0 = placeholder : f8e4m3[32, 64]
%1 = placeholder : f8e4m3[32, 64]
%2 = placeholder : f32[32, 1]
%3 = placeholder : f32[32, 1]
%4 = placeholder : bf16[3, 64]
%5 = ctfp8.pack([%0, %1]) : f8e4m3[64, 64]
%6 = slice(%5, 0, 0, 32) : f8e4m3[32, 64]
%7 = slice(%5, 0, 32, 64) : f8e4m3[32, 64]
%8 = ctfp8.pack([%2, %3]) : f32[64, 1]
%9 = slice(%8, 0, 0, 32) : f32[32, 1]
%10 = slice(%8, 0, 32, 64) : f32[32, 1]
%11 = ctfp8.dequantize(%6, %9, None, [1, 64], token, bfloat16) : bf16[32, 64]
%12 = linear(%4, %11) : bf16[3, 32]
%13 = silu(%12) : bf16[3, 32]
%14 = ctfp8.dequantize(%7, %10, None, [1, 64], token, bfloat16) : bf16[32, 64]
%15 = linear(%4, %14) : bf16[3, 32]
%16 = mul(%13, %15) : bf16[3, 32]
return [%16]

prepack: 0
%0 = placeholder : f8e4m3[32, 64]
%1 = placeholder : f8e4m3[32, 64]
%2 = placeholder : f32[32, 1]
%3 = placeholder : f32[32, 1]
%4 = placeholder : bf16[3, 64]
%5 = ctfp8.pack([%0, %1]) : f8e4m3[64, 64]
%6 = ctfp8.pack([%2, %3]) : f32[64, 1]
%7 = slice(%5, 0, 0, 32) : f8e4m3[32, 64]
%8 = slice(%5, 0, 32, 64) : f8e4m3[32, 64]
%9 = slice(%6, 0, 0, 32) : f32[32, 1]
%10 = slice(%6, 0, 32, 64) : f32[32, 1]
%11 = ctfp8.dequantize(%7, %9, None, [1, 64], token, bfloat16) : bf16[32, 64]
%12 = linear(%4, %11) : bf16[3, 32]
%13 = silu(%12) : bf16[3, 32]
%14 = ctfp8.dequantize(%8, %10, None, [1, 64], token, bfloat16) : bf16[32, 64]
%15 = linear(%4, %14) : bf16[3, 32]
%16 = mul(%13, %15) : bf16[3, 32]
return [%16]

take-prepacked: only in torch.compile
regions: only in torch.compile
match: 2
rewrite: 2
%0 = placeholder : f8e4m3[32, 64]
%1 = placeholder : f8e4m3[32, 64]
%2 = placeholder : f32[32, 1]
%3 = placeholder : f32[32, 1]
%4 = placeholder : bf16[3, 64]
%5 = ctfp8.pack([%0, %1]) : f8e4m3[64, 64]
%6 = ctfp8.pack([%2, %3]) : f32[64, 1]
%7 = slice(%5, 0, 0, 32) : f8e4m3[32, 64]
%8 = slice(%5, 0, 32, 64) : f8e4m3[32, 64]
%9 = slice(%6, 0, 0, 32) : f32[32, 1]
%10 = slice(%6, 0, 32, 64) : f32[32, 1]
%11 = ctfp8.dequantize(%7, %9, None, [1, 64], token, bfloat16) : bf16[32, 64]
%12 = ctfp8.quantize_per_token(%4) : (f8e4m3[3, 64], f32[3, 1])
%13 = getitem(%12, 0) : f8e4m3[3, 64]
%14 = getitem(%12, 1) : f32[3, 1]
%15 = ctfp8.scaled_mm(%13, %7, %14, %9, None, [1, 64], bfloat16) : bf16[3, 32]
%16 = silu(%15) : bf16[3, 32]
%17 = ctfp8.dequantize(%8, %10, None, [1, 64], token, bfloat16) : bf16[32, 64]
%18 = ctfp8.quantize_per_token(%4) : (f8e4m3[3, 64], f32[3, 1])
%19 = getitem(%18, 0) : f8e4m3[3, 64]
%20 = getitem(%18, 1) : f32[3, 1]
%21 = ctfp8.scaled_mm(%19, %8, %20, %10, None, [1, 64], bfloat16) : bf16[3, 32]
%22 = mul(%16, %21) : bf16[3, 32]
return [%22]

attention: none of its operators is in the graph
decompose: 0
%0 = placeholder : f8e4m3[32, 64]
%1 = placeholder : f8e4m3[32, 64]
%2 = placeholder : f32[32, 1]
%3 = placeholder : f32[32, 1]
%4 = placeholder : bf16[3, 64]
%5 = ctfp8.pack([%0, %1]) : f8e4m3[64, 64]
%6 = ctfp8.pack([%2, %3]) : f32[64, 1]
%7 = slice(%5, 0, 0, 32) : f8e4m3[32, 64]
%8 = slice(%5, 0, 32, 64) : f8e4m3[32, 64]
%9 = slice(%6, 0, 0, 32) : f32[32, 1]
%10 = slice(%6, 0, 32, 64) : f32[32, 1]
%11 = ctfp8.quantize_per_token(%4) : (f8e4m3[3, 64], f32[3, 1])
%12 = getitem(%11, 0) : f8e4m3[3, 64]
%13 = getitem(%11, 1) : f32[3, 1]
%14 = ctfp8.scaled_mm(%12, %7, %13, %9, None, [1, 64], bfloat16) : bf16[3, 32]
%15 = silu(%14) : bf16[3, 32]
%16 = ctfp8.quantize_per_token(%4) : (f8e4m3[3, 64], f32[3, 1])
%17 = getitem(%16, 0) : f8e4m3[3, 64]
%18 = getitem(%16, 1) : f32[3, 1]
%19 = ctfp8.scaled_mm(%17, %8, %18, %10, None, [1, 64], bfloat16) : bf16[3, 32]
%20 = mul(%15, %19) : bf16[3, 32]
return [%20]

share-quantization: 3
%0 = placeholder : f8e4m3[32, 64]
%1 = placeholder : f8e4m3[32, 64]
%2 = placeholder : f32[32, 1]
%3 = placeholder : f32[32, 1]
%4 = placeholder : bf16[3, 64]
%5 = ctfp8.pack([%0, %1]) : f8e4m3[64, 64]
%6 = ctfp8.pack([%2, %3]) : f32[64, 1]
%7 = slice(%5, 0, 0, 32) : f8e4m3[32, 64]
%8 = slice(%5, 0, 32, 64) : f8e4m3[32, 64]
%9 = slice(%6, 0, 0, 32) : f32[32, 1]
%10 = slice(%6, 0, 32, 64) : f32[32, 1]
%11 = ctfp8.quantize_per_token(%4) : (f8e4m3[3, 64], f32[3, 1])
%12 = getitem(%11, 0) : f8e4m3[3, 64]
%13 = getitem(%11, 1) : f32[3, 1]
%14 = ctfp8.scaled_mm(%12, %7, %13, %9, None, [1, 64], bfloat16) : bf16[3, 32]
%15 = silu(%14) : bf16[3, 32]
%16 = ctfp8.scaled_mm(%12, %8, %13, %10, None, [1, 64], bfloat16) : bf16[3, 32]
%17 = mul(%15, %16) : bf16[3, 32]
return [%17]

combine-linears: 1
%0 = placeholder : f8e4m3[32, 64]
%1 = placeholder : f8e4m3[32, 64]
%2 = placeholder : f32[32, 1]
%3 = placeholder : f32[32, 1]
%4 = placeholder : bf16[3, 64]
%5 = ctfp8.pack([%0, %1]) : f8e4m3[64, 64]
%6 = ctfp8.pack([%2, %3]) : f32[64, 1]
%7 = ctfp8.quantize_per_token(%4) : (f8e4m3[3, 64], f32[3, 1])
%8 = getitem(%7, 0) : f8e4m3[3, 64]
%9 = getitem(%7, 1) : f32[3, 1]
%10 = ctfp8.scaled_mm(%8, %5, %9, %6, None, [1, 64], bfloat16) : bf16[3, 64]
%11 = slice(%10, 1, 0, 32) : bf16[3, 32]
%12 = clone(%11, memory_format=contiguous_format) : bf16[3, 32]
%13 = slice(%10, 1, 32, 64) : bf16[3, 32]
%14 = clone(%13, memory_format=contiguous_format) : bf16[3, 32]
%15 = silu(%12) : bf16[3, 32]
%16 = mul(%15, %14) : bf16[3, 32]
return [%16]

lower-scaled: 2
%0 = placeholder : f8e4m3[32, 64]
%1 = placeholder : f8e4m3[32, 64]
%2 = placeholder : f32[32, 1]
%3 = placeholder : f32[32, 1]
%4 = placeholder : bf16[3, 64]
%5 = ctfp8.pack([%0, %1]) : f8e4m3[64, 64]
%6 = ctfp8.pack([%2, %3]) : f32[64, 1]
%7 = convert_element_type(%4, float32) : f32[3, 64]
%8 = abs(%7) : f32[3, 64]
%9 = amax(%8, [-1], True) : f32[3, 1]
%10 = clamp_min(%9, 1e-12) : f32[3, 1]
%11 = div(%10, 448.0) : f32[3, 1]
%12 = div(%7, %11) : f32[3, 64]
%13 = clamp_min(%12, -448.0) : f32[3, 64]
%14 = clamp_max(%13, 448.0) : f32[3, 64]
%15 = convert_element_type(%14, float8_e4m3fn) : f8e4m3[3, 64]
%16 = permute(%5, [1, 0]) : f8e4m3[64, 64]
%17 = reshape(%11, [-1, 1]) : f32[3, 1]
%18 = reshape(%6, [1, 64]) : f32[1, 64]
%19 = _scaled_mm(%15, %16, %17, %18, None, None, bfloat16, False) : bf16[3, 64]
%20 = slice(%19, 1, 0, 32) : bf16[3, 32]
%21 = clone(%20, memory_format=contiguous_format) : bf16[3, 32]
%22 = slice(%19, 1, 32, 64) : bf16[3, 32]
%23 = clone(%22, memory_format=contiguous_format) : bf16[3, 32]
%24 = silu(%21) : bf16[3, 32]
%25 = mul(%24, %23) : bf16[3, 32]
return [%25]

skinny-linears: none of its operators is in the graph
inline-triton: only in torch.compile
fold-parameters: nothing holds its parameters""",
        )


def test_every_pass_says_why_it_stands_where_it_does():
    for one in PASSES:
        assert one.why.strip(), one.name
        assert one.after or one.before, one.name
        for name in (*one.after, *one.before):
            assert any(name == other.name for other in PASSES), (one.name, name)


@pytest.mark.parametrize("one", PASSES, ids=str)
def test_an_order_that_does_not_work_is_refused(one):
    """Each constraint of each pass, turned round."""
    of = {other.name: other for other in PASSES}
    for wrong in [(one, of[name]) for name in one.after] + [(of[name], one) for name in one.before]:
        if wrong[0].stage == wrong[1].stage:
            with pytest.raises(
                ctfp8.UsageError, match=rf"the pass .* has to run (behind|before) .*{one.name}|{one.name}.* has to run"
            ):
                Pipeline(wrong)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("match,mach", "there is no pass 'mach'; there are keep-strides, "),
        ("rewrite,match", "the pass rewrite has to run behind match: behind match, whose decisions it carries out"),
        ("match,match", "the pass match stands twice"),
        ("match,horizontal-fusion", "horizontal-fusion changes the graph as it was traced, and match the one after"),
        ("decompose{cache=0}", r"the pass decompose takes no setting 'cache=0'; it takes caches=1\."),
        ("decompose{caches=no}", "takes no setting 'caches=no'"),
        ("match{n=1}", "takes no setting 'n=1'; it takes none"),
        ("match rewrite", "'match rewrite' cannot be read"),
        ("match,,rewrite", "',rewrite' cannot be read"),
        ("decompose{caches=0", "cannot be read"),
    ],
)
def test_a_line_that_is_none_is_refused_before_anything_is_traced(line, sentence):
    with pytest.raises(ctfp8.UsageError, match=sentence):
        ctfp8.explain(nn.Identity(), (None,), passes=line)
    with pytest.raises(Exception, match=sentence):
        torch.compile(block(), backend="ctfp8", options={"ctfp8.passes": line})(X)


def test_a_line_is_read_as_it_is_printed():
    assert parse(str(standard())) == standard() == parse("") == parse("  ")
    line = "match,rewrite,decompose{caches=0},skinny-linears{rows=2,elements=4194304}"
    assert str(parse(line)) == str(parse(line.replace(",", " , "))) == line
    assert str(parse("skinny-linears{elements=8}")) == "skinny-linears{rows=4,elements=8}"


def test_options_choose_passes():
    names = {one.name for one in standard().passes}
    assert names == {one.name for one in PASSES if not one.asked}
    asked = standard(("scatter-tokens", "gather-fp8"), ("regions",))
    assert {one.name for one in asked.passes} == names - {"regions"} | {"scatter-tokens", "gather-fp8"}


def test_a_pass_without_its_operators_is_skipped():
    ran = []
    looks = Pass("looks", "post_grad", lambda graph, context: ran.append(1) or 1, why="", operators=(MARKER,))
    always = replace(looks, name="always", operators=())
    for module, expected in ((block(), ["", ""]), (nn.Linear(64, 8, dtype=torch.bfloat16), [None, ""])):
        program = torch.export.export(module, (X,)).run_decompositions({})
        context = Context(CPU)
        Pipeline((looks, always)).run("post_grad", program.graph, context)
        said = [one.skipped for one in context.ran]
        assert said == [why if why is not None else "none of its operators is in the graph" for why in expected]
        assert [one.matches for one in context.ran] == [int(not why) for why in said]
    assert len(ran) == 3


CASES = {
    "linears": lambda: (block(), (X[None],), {}),
    "weights only": lambda: (block(None), (X[None],), {}),
    "experts": lambda: (ctfp8.from_pretrained(DATA / "qwen3moe/FP8_DYNAMIC"), (IDS,), {"use_cache": False}),
    "blocks": lambda: (ctfp8.from_pretrained(DATA / "llama/FP8_BLOCK"), (IDS,), {"use_cache": False}),
}


@pytest.mark.quick("linears", "weights only")
@pytest.mark.parametrize("target", ["cpu", "xpu", "cuda:sm90"])
@pytest.mark.parametrize("case", CASES)
def test_a_pass_names_all_operators_that_it_changes(case, target, kernel_everywhere):
    """A pass that is skipped without its operators would have found nothing: nothing but views of activations differs."""
    module, args, kwargs = CASES[case]()

    def lowered(pipeline):
        program = trace(module, args, kwargs, None)
        rewrite(program, context := Context(Target.parse(target), program=program), pipeline)
        views = (aten.reshape.default, aten.view.default, aten.sym_size.int, aten.amax.default, operator.getitem)
        return [str(node.target) for node in program.graph.nodes if node.target not in views], context.ran

    told, ran = lowered(standard())
    always, _ = lowered(Pipeline(tuple(replace(one, operators=()) for one in standard().passes)))
    assert told == always
    assert any(one.skipped == "none of its operators is in the graph" for one in ran)


@pytest.mark.parametrize("activation", [None, "token"])
def test_a_pass_names_all_operators_that_it_changes_in_inductors_graph(activation, kernel_everywhere):
    """There a linear of more than two dimensions is a matmul of a view: each has its own until `share-quantization` ran."""

    def matches():
        torch._dynamo.reset()
        with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
            torch.compile(block(activation), backend="ctfp8", fullgraph=True)(X[None])
        return {one.name: one.matches for one in ctfp8.compiled_reports()[-1].passes}

    told = matches()
    assert told["combine-linears"] == 1
    PASSES[:] = [replace(one, operators=()) for one in PASSES]
    assert told == matches()


@pytest.mark.parametrize(
    ("way", "target", "name", "why"),
    [
        ("export", "cuda:sm90", "regions", "only in torch.compile"),
        ("export", "cpu", "horizontal-fusion", "a program for CPUs keeps its parameters"),
        ("compile", "cpu", "prepack", "kernels for CPUs read scales as they are"),
        ("load", "cpu", "match", "only in torch.compile and programs of torch.export"),
        ("compile", "cpu", "fold-parameters", "only in programs of torch.export"),
        ("export", "xpu", "fold-parameters", "nothing holds its parameters"),
    ],
)
def test_a_pass_says_where_it_has_nothing_to_do(way, target, name, why):
    one = next(one for one in PASSES if one.name == name)
    assert one.why_not(torch.fx.Graph(), Context(Target.parse(target), way)) == why


def test_counts_reach_the_reports():
    def matches(report):
        return {ran.name: ran.matches for ran in report.passes if ran.matches}

    module = block()
    assert not ctfp8.explain(module, (X,), target="cuda:sm90").passes  # nothing was rewritten
    report = ctfp8.explain(module, (X,), target="cuda:sm90+scaled_mm", passes="")
    assert matches(report) == {
        "horizontal-fusion": 1, "match": 2, "rewrite": 2, "share-quantization": 3, "combine-linears": 1, "lower-scaled": 2,
    }  # fmt: skip
    assert report.to_dict()["passes"][2] == {
        "name": "horizontal-fusion", "stage": "traced", "matches": 1, "skipped": "", "graph": "",
    }  # fmt: skip
    with torch.no_grad():
        torch.compile(module, backend="ctfp8", options={"ctfp8.horizontal_fusion": False})(X)
    assert {ran.name for ran in ctfp8.compiled_reports()[-1].passes} == {
        one.name for one in standard(without=("horizontal-fusion",)).passes
    }


def test_repeated_layers_count_once(load, kernel_everywhere, monkeypatch):
    """Their region is compiled once, whatever the number of its instances."""
    from ctfp8_compile.passes import regions

    monkeypatch.setattr(regions, "LEAST", 2)
    model = load("llama/FP8_DYNAMIC")
    logits = torch.compile(model, backend="ctfp8", fullgraph=True)(IDS, use_cache=False).logits
    assert relative_error(logits, model(IDS, use_cache=False).logits) < 0.02
    report = ctfp8.compiled_reports()[-1]
    ran = {one.name: one for one in report.passes}
    assert len(report.rewritten) == 14
    assert ran["regions"].matches == 1
    assert ran["match"].matches == ran["rewrite"].matches == 7


POST_GRAD = [one.name for one in standard().passes if one.stage == "post_grad" and one.name != "inline-triton"]


@pytest.mark.parametrize("target", ["cpu", "xpu", "cuda:sm90+scaled_mm", "cuda:sm75"])
@pytest.mark.parametrize("count", range(len(POST_GRAD) + 1))
def test_any_beginning_of_the_pipeline_leaves_a_right_graph(target, count, kernel_everywhere):
    module = block("token")
    program = trace(module, (X,), None, None)
    traced = [one.name for one in standard().passes if one.stage == "traced"]
    line = ",".join([*traced, *POST_GRAD[:count]])
    rewrite(program, Context(Target.parse(target), program=program), parse(line))
    assert relative_error(program.module()(X), module(X)) < 0.06  # activations are quantized


@pytest.mark.parametrize("count", range(len(POST_GRAD) + 1))
def test_any_beginning_of_the_pipeline_compiles(count, kernel_everywhere):
    module = block(None)
    line = ",".join(["horizontal-fusion", "take-prepacked", *POST_GRAD[:count]])
    with torch.no_grad():
        got = torch.compile(module, backend="ctfp8", fullgraph=True, options={"ctfp8.passes": line})(X)
        assert relative_error(got, module(X)) < 0.01


def _renumbered(graph, context):
    (node,) = graph.find_nodes(op="call_function", target=aten.silu.default)
    node.meta["val"] = node.meta["val"].float()
    node.args = node.args
    with before(graph, node):
        new = graph.call_function(aten.silu.default, node.args)
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    return 1


def _without_a_value(graph, context):
    (node,) = graph.find_nodes(op="call_function", target=aten.silu.default)
    with before(graph, node):
        new = graph.call_function(aten.sigmoid.default, node.args)
    node.replace_all_uses_with(new, propagate_meta=False)
    graph.erase_node(node)
    return 1


def _out_of_order(graph, context):
    (node,) = graph.find_nodes(op="call_function", target=aten.silu.default)
    next(iter(graph.nodes)).prepend(node)
    return 1


def _other_output(graph, context):
    output = graph.output_node()
    with before(graph, output):
        wide = call(graph, aten._to_copy.default, output.args[0][0], dtype=torch.float64)
    output.args = ((wide,),)
    return 1


def _other_strides(graph, context):
    (node,) = graph.find_nodes(op="call_function", target=aten.silu.default)
    with before(graph, node):
        turned = call(graph, aten.permute.default, node.args[0], [1, 0])
        turned = call(graph, aten.clone.default, turned, memory_format=torch.contiguous_format)
        turned = call(graph, aten.permute.default, turned, [1, 0])
    node.args = (turned,)  # whose consumers do not know
    return 1


def _wrong_argument(graph, context):
    (node,) = graph.find_nodes(op="call_function", target=aten.silu.default)
    with before(graph, node):
        new = graph.call_function(operator.getitem, (node.args[0], "x"))
        new.meta = dict(node.meta)
    node.replace_all_uses_with(new, propagate_meta=False)
    return 1


BROKEN = [
    (_renumbered, r"%silu.* with the fake value f32\[3, 32\] strides \[32, 1\] on cpu; it computes bf16\[3, 32\]"),
    (_without_a_value, "%sigmoid.* without a fake value"),
    (_out_of_order, "not well formed: Argument 'linear' of Node 'silu' was used before it has been defined"),
    (_other_output, r"gives back torch\.float64\[3, 32\].* and not bf16\[3, 32\].* as its output 0"),
    (_other_strides, r"%silu.* with the fake value bf16\[3, 32\] strides \[32, 1\] .* computes .* strides \[1, 3\]"),
    (_wrong_argument, "%getitem.* does not take its inputs"),
]


@pytest.mark.parametrize(("change", "sentence"), BROKEN, ids=[change.__name__ for change, _ in BROKEN])
def test_what_a_pass_breaks_is_told_with_its_name(change, sentence, monkeypatch):
    def run():
        program = trace(block(), (X,), None, None)
        mine = Pass("mine", "post_grad", change, why="")
        Pipeline((mine,)).run("post_grad", program.graph, Context(CPU))

    with pytest.raises(PassError, match=rf"^the pass mine left .*{sentence}"):
        run()
    with passes.verifying(False):
        run()
        monkeypatch.setenv("CTFP8_VERIFY_PASSES", "0")
        run()
        monkeypatch.setenv("CTFP8_VERIFY_PASSES", "1")
        with pytest.raises(PassError, match="the pass mine left"):
            run()


def test_what_a_pass_breaks_in_dynamos_graph_is_told_too():
    def wider(graph, context):
        (node,) = [n for n in graph.nodes if n.target is torch.nn.functional.silu]
        with graph.inserting_after(node):
            new = graph.call_function(torch.relu, (node,))
        new.meta = {**node.meta, "example_value": node.meta["example_value"].float()}
        node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new, propagate_meta=False)
        return 1

    register_pass(Pass("wider", "traced", wider, why=""))
    with pytest.raises(Exception, match=r"the pass wider left %relu.* with the fake value f32"), torch.no_grad():
        torch.compile(block(), backend="ctfp8", fullgraph=True)(X)


def _count(graph, context):
    return len(graph.nodes)


COUNT = Pass("count", "post_grad", _count, why="behind lowering", after=("lower-scaled",), before=("inline-triton",))


def test_a_pass_of_ones_own_takes_its_place_and_its_older_self_gives_way():
    register_pass(COUNT)
    names = [one.name for one in PASSES]
    assert names[names.index("lower-scaled") + 1] == "count"
    register_pass(replace(COUNT, after=(), before=("match",)))
    names = [one.name for one in PASSES]
    assert names.count("count") == 1
    assert names[names.index("match") - 1] == "count"
    register_pass(replace(COUNT, name="last", after=(), before=()))
    assert PASSES[-1].name == "last"
    register_pass(replace(COUNT, name="early", stage="traced", after=(), before=()))
    assert [one.stage for one in PASSES] == sorted((one.stage for one in PASSES), reverse=True)
    assert ctfp8.explain(block(), (X,), target="cpu", passes="early,count").passes[0].matches > 0


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"name": "match"}, "the pass match is one of ctfp8's. Give yours another name"),
        (
            {"after": ("lowr",)},
            "the pass count is to run before or behind lowr; there is no such pass, but keep-strides",
        ),
        ({"after": ("lower-scaled",), "before": ("match",)}, "count has to run before match"),
        ({"stage": "traced"}, "count changes the graph as it was traced"),
        ({"run": len}, "count runs <built-in function len>, which is no Python function"),
    ],
)
def test_a_pass_for_which_there_is_no_place_is_refused(change, sentence):
    before = list(PASSES)
    with pytest.raises(ctfp8.UsageError, match=sentence):
        register_pass(replace(COUNT, **change))
    assert before == PASSES


def test_the_key_of_inductors_cache_covers_which_passes_run():
    one = Fp8Pass(CPU).uuid()
    assert one == Fp8Pass(CPU).uuid()
    assert one != Fp8Pass(CPU, None, standard(("gather-fp8",))).uuid()
    assert one != Fp8Pass(CPU, None, standard(without=("attention",))).uuid()
    assert one != Fp8Pass(CPU, None, parse(str(standard()).replace("rows=4", "rows=2"))).uuid()
    register_pass(COUNT)
    two = Fp8Pass(CPU).uuid()
    assert one != two
    register_pass(replace(COUNT, run=lambda graph, context: 0))
    assert two != Fp8Pass(CPU).uuid()  # its source


def test_check_order_takes_what_is_there():
    runner.check_order(PASSES)


def test_a_checkpoint_lowered_for_each_target_is_verified():
    model = ctfp8.from_pretrained(DATA / "qwen3moe/FP8_BLOCK")
    for target in ("cpu", "cuda:sm90", "cuda:sm89", "cuda:sm80", "xpu", "cuda:sm75"):
        ctfp8.lower(model, (IDS,), {"use_cache": False}, target=target)
