"""Every rule, ours and the tutorial's, gives one result: eager, compiled, lowered, and exported and loaded where it is not known.

What a rule found travels in the artifact, the rule does not. The loading process here is a fresh one that never saw the rule.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import fp8_config, quantize, relative_error
from torch import nn

import ctfp8_compile as ctfp8
from ctfp8_compile import passes

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import add_a_rule

ROUTE = torch.tensor([3, 0, 2, 2, 1, 3, 3, 0, 1, 2])
#: Of each rule: how a module uses its weight, the weight's shape, its inputs.
USES = {
    "LinearRule": (lambda w, x: F.linear(x, w), (16, 32), (torch.randn(2, 5, 32),)),
    "MatmulRule": (lambda w, x: x @ w.t(), (16, 32), (torch.randn(5, 32),)),
    "BatchedMatmulRule": (lambda w, x: F.linear(x.transpose(0, 1), w), (16, 32), (torch.randn(2, 5, 32),)),
    "GroupedExpertsRule": (
        lambda w, x, offs: torch._grouped_mm(x, w.transpose(-2, -1), offs=offs),
        (4, 16, 32),
        (torch.randn(10, 32), torch.tensor([3, 3, 8, 10], dtype=torch.int32)),
    ),
    "GatheredExpertsRule": (
        lambda w, x, ids: torch.bmm(w[ids], x.unsqueeze(-1)).squeeze(-1),
        (4, 16, 32),
        (torch.randn(10, 32), ROUTE),
    ),
    "EmbeddingRule": (lambda w, ids: F.embedding(ids, w), (16, 32), (ROUTE.view(2, 5) * 5,)),
    "WeightOnTheLeft": (lambda w, x: w @ x, (16, 32), (torch.randn(2, 32, 5),)),
}


class Uses(nn.Module):
    def __init__(self, run, shape):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16))
        self.run = run

    def forward(self, x, route=None):
        return self.run(self.w, x) if route is None else self.run(self.w, x, route)


def _module(run, shape):
    torch.manual_seed(0)
    parts = [quantize(torch.randn(shape[-2:]) * 0.1) for _ in range(shape[0] if len(shape) == 3 else 1)]
    weight, scale = (torch.stack(t) if len(shape) == 3 else t[0] for t in zip(*parts, strict=True))
    return ctfp8.load_state_dict(Uses(run, shape), {"w": weight, "w_scale": scale}, fp8_config()), weight, scale


LOAD = """
import sys, torch, ctfp8_compile as ctfp8, json
for name in sys.argv[1:]:
    module = ctfp8.load(name + ".pt2")
    torch.save(module(*torch.load(name + ".in")), name + ".out")
    print(json.dumps([[e.rule, bool(e.kernel), e.reason] for e in (*module.report.rewritten, *module.report.kept)]))
"""


@pytest.mark.usefixtures("kernel_everywhere")
def test_every_rule_gives_one_result_in_four_ways(tmp_path):
    rules = list(passes.RULES)
    passes.register(add_a_rule.WeightOnTheLeft())
    try:
        assert {type(rule).__name__ for rule in passes.RULES} == set(USES), "a rule without a use in this test"
        names = {type(rule).__name__: rule.name for rule in passes.RULES}
        want = {}
        for rule, (run, shape, args) in USES.items():
            module, weight, scale = _module(run, shape)
            args = tuple(a.to(torch.bfloat16) if a.is_floating_point() else a for a in args)
            exact = (weight.double() * scale.double()).float()
            want[rule] = run(
                exact.to(torch.bfloat16).float(), *(a.float() if a.is_floating_point() else a for a in args)
            )
            compiled = torch.compile(module, backend="ctfp8", fullgraph=True)
            for way in (module, compiled, ctfp8.lower(module, args).module()):
                assert relative_error(way(*args), want[rule]) < 0.01, rule
            assert [e.rule for e in ctfp8.compiled_reports()[-1].rewritten] == [names[rule]]
            report = ctfp8.export(module, args, path=tmp_path / f"{rule}.pt2")
            assert [e.rule for e in report.rewritten] == [names[rule]]
            torch.save(args, tmp_path / f"{rule}.in")
    finally:
        passes.RULES[:] = rules
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *USES], cwd=tmp_path, capture_output=True, text=True, env=os.environ, check=False
    )
    assert done.returncode == 0, done.stderr
    for rule, line in zip(USES, done.stdout.splitlines(), strict=True):
        [(name, rewritten, reason)] = json.loads(line)
        assert name == names[rule]
        assert rewritten or "could not be built" in reason  # a machine without a compiler keeps them dequantized
        assert relative_error(torch.load(tmp_path / f"{rule}.out"), want[rule]) < 0.01, rule


@pytest.mark.parametrize("method", ["check", "rewrite"])
def test_a_rule_that_rewrites_by_itself_is_refused(method):
    rule = type("Mine", (add_a_rule.WeightOnTheLeft,), {method: lambda self, *args: None})()
    with pytest.raises(ctfp8.UsageError, match=f"Mine.{method}: a rule only finds"):
        passes.register(rule)


def test_a_pattern_that_does_not_describe_its_node_is_refused():
    class Wrong(passes.Rule):
        name = "wrong"
        roots = (torch.ops.aten.matmul.default,)

        def pattern(self, node):
            match = add_a_rule.WeightOnTheLeft().pattern(node)
            return match and passes.Match.of(node, "linear", match.x, _weight(node), x_views=match.x_views)

    module, *_ = _module(*USES["WeightOnTheLeft"][:2])
    x = torch.randn(2, 32, 5, dtype=torch.bfloat16)
    rules = list(passes.RULES)
    passes.register(Wrong())
    try:
        with pytest.raises(ctfp8.UsageError, match="the rule 'wrong' would replace matmul"):
            ctfp8.lower(module, (x,))
    finally:
        passes.RULES[:] = rules


def _weight(node):
    from ctfp8_compile.graph import trace_weight

    return trace_weight(node.args[0])


@pytest.mark.parametrize("time", [7, 16])
def test_consumers_get_the_strides_they_were_traced_with(time, kernel_everywhere):
    """`matmul(W, x)` is `linear(x.mT, W).mT`, whose strides a `view` behind it does not take."""
    rules = list(passes.RULES)
    passes.register(add_a_rule.WeightOnTheLeft())
    try:
        module = add_a_rule.model()
        plain = module.forward
        module.forward = lambda x: plain(x).view(-1)
        x = torch.randn(2, 256, time)
        program = ctfp8.lower(module, (x,))
        assert "ctfp8.dequantized_linear" in str(program.graph)
        assert relative_error(program.module()(x), module(x)) < 1e-5
    finally:
        passes.RULES[:] = rules
