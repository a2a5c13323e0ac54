"""`ctfp8 explain --passes`: the pipeline's line, what each pass did, the graph after each, and some passes alone."""

from __future__ import annotations

import json

import pytest
from conftest import DATA
from typer.testing import CliRunner

from ctfp8_compile import passes
from ctfp8_compile.cli.app import app

SHIPPED = DATA.parent.parent / "examples/models"
FOR_XPU = ("--target", "xpu")


def explained(*arguments, code=0):
    result = CliRunner().invoke(app, ["explain", *map(str, arguments)], env={"COLUMNS": "100"})
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else " ".join(result.stderr.split())


def test_the_pipeline_needs_no_checkpoint():
    assert explained("--passes") == f"{passes.standard()}\n"
    assert explained("--passes", "match,decompose{caches=0}") == "match,decompose{caches=0}\n"
    assert "--passes prints the pipeline and no more" in explained(code=2)
    assert "Missing argument" in explained("--passes", "match", "--graphs", code=2)


def test_what_each_pass_did():
    line, _, *rows, _ = explained(SHIPPED / "llama", *FOR_XPU, "--passes").splitlines()
    assert line == str(passes.standard())
    said = {row.split()[0]: " ".join(row.split()[2:]) for row in rows}
    assert [*said] == [one.name for one in passes.standard().passes]
    assert said["horizontal-fusion"] == "10"
    assert said["match"] == said["rewrite"] == "35"
    assert said["regions"] == "skipped: only in torch.compile"


@pytest.mark.parametrize("arguments", [("--passes", "llama"), ("llama", "--passes"), ("--passes", "match", "llama")])
def test_a_folder_may_be_called_like_a_pass(arguments, monkeypatch):
    monkeypatch.chdir(SHIPPED)
    out = explained(*FOR_XPU, *arguments)
    assert out.startswith("match\n" if "match" in arguments else f"{passes.standard()}\n")
    assert "35 FP8 weights" in out


def test_the_passes_named_run_and_the_graph_after_each_is_shown():
    arguments = (SHIPPED / "llama", *FOR_XPU, "--passes", "match,rewrite")
    out = explained(*arguments, "--graphs")
    assert out.startswith("match,rewrite\n")
    matched, rewritten = out.partition("# after match\n")[2].split("# after rewrite\n")
    assert matched.count("ctfp8.dequantize(") == rewritten.count("ctfp8.scaled_mm(") == 35
    assert "scaled_mm(" not in matched
    assert rewritten.count("ctfp8.dequantize(") == 35  # what nothing reads goes with `decompose`
    ran = json.loads(explained(*arguments, "--json"))["passes"]
    assert [(one["name"], one["matches"], one["graph"]) for one in ran] == [("match", 35, ""), ("rewrite", 35, "")]
