"""The examples run, and print what they are there to show."""

from __future__ import annotations

import importlib.util
import os
import re
import sys

import nbformat
import pytest
import torch
from conftest import DATA
from nbclient import NotebookClient
from rich.console import Console
from rich.table import Table

from ctfp8_compile import passes

ROOT = DATA.parent.parent


def example(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where inspect looks for a class's source
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["example"])
    rules, known = list(passes.RULES), list(passes.PASSES)
    yield
    passes.RULES[:], passes.PASSES[:] = rules, known


def test_quickstart(monkeypatch, capsys):
    quickstart = example("quickstart")
    for name, small in {"WINDOWS": 1, "NEW_TOKENS": 3, "ROUNDS": 1}.items():
        monkeypatch.setattr(quickstart, name, small)
    table = Table()
    for _ in range(6):
        table.add_column()
    quickstart.run("llama", table)
    Console(width=200).print(table)
    out = capsys.readouterr().out
    assert re.search(r"llama +│ 1 +│ 35 \(35 rewritten\)", out)
    plain, eager, ours = map(float, re.search(r"(\d\.\d+) / (\d\.\d+) / (\d\.\d+)", out).groups())
    assert abs(eager - plain) < 0.05
    assert abs(ours - plain) < 0.05


def test_diffusers_transformer(capsys):
    pytest.importorskip("diffusers", reason="examples/requirements-diffusers.txt is not installed")
    example("diffusers_transformer").main()
    out = capsys.readouterr().out
    assert "34 FP8 weights for cpu; 34 linear" in out
    assert float(re.search(r"against float64: (\S+)", out)[1]) < 1e-5
    assert "dtypes and bits: yes" in out


def test_own_module(capsys):
    example("own_module").main()
    out = capsys.readouterr().out
    assert "2 FP8 weights for cpu; 2 linear" in out
    assert "'up.parametrizations.weight.original': 'float8_e4m3fn'" in out
    assert "'head.weight': 'float32'" in out
    assert float(out.rpartition(": ")[2]) < 0.02


@pytest.mark.long
def test_moe(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["moe", str(tmp_path / "moe.html")])
    example("moe").main()
    out = capsys.readouterr().out
    assert "{'torch.float8_e4m3fn'}" in out
    assert "24 FP8 weights for cuda:sm90; 16 linear → fbgemm f8f8bf16_rowwise; 8 grouped experts" in out
    assert "24 FP8 weights for cuda:sm80; 16 linear → Triton weight-only; 8 grouped experts" in out
    assert "24 FP8 weights for cpu; 16 linear" in out
    assert re.search(r"'Return a list of ' goes on with '.+?' \(\d+%\)", out)
    assert (tmp_path / "moe.html").stat().st_size > 5_000


@pytest.mark.long
def test_embeddings(capsys):
    example("embeddings").main()
    out = capsys.readouterr().out
    assert all(float(value) > 0.999 for value in re.findall(r"eagerly ≥ (\S+)", out))
    rows = [[float(v) for v in line.split()[:4]] for line in out.splitlines() if line.startswith("   ")]
    assert rows[0][1] > rows[0][2]  # prose is like prose, Python like Python
    assert rows[2][3] > rows[2][0]
    assert "graphs compiled: 1" in out


@pytest.mark.long
def test_serve_and_ask():
    import subprocess

    pytest.importorskip("openai")
    command = [sys.executable, ROOT / "examples/serve_and_ask.py", "--eager"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "llama is served at http://127.0.0.1:" in run.stdout
    assert re.search(r"the same texts: [78] of 8", run.stdout)  # in bf16 a tie may fall the other way


@pytest.mark.long
def test_export_and_load():
    import subprocess

    run = subprocess.run([sys.executable, ROOT / "examples/export_and_load.py"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "35 FP8 weights for cpu" in run.stdout
    assert "Return a list of " in run.stdout


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, about what peft asks it
def test_lora(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lora", str(tmp_path)])
    example("lora").main()
    out = capsys.readouterr().out
    before, after = map(float, re.search(r"without the adapter (\S+), after 30 steps (\S+) nats", out).groups())
    assert after < before / 10
    assert "35 of 35 in FP8" in out
    assert float(re.search(r"loaded and compiled: (\S+)", out)[1]) < before / 10
    assert "dequantize=True" in re.search(r"merging into FP8 weights: (.*)", out)[1]
    assert float(re.search(r"merged into a plain .* model: (\S+);", out)[1]) < before / 10


@pytest.mark.long
def test_the_notebook():
    notebook = nbformat.read(ROOT / "examples/tour.ipynb", as_version=4)
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    client = NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": ROOT / "examples"}}
    )
    client.execute(env=environment)
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    printed = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    assert "35 FP8 weights for cpu" in printed
    assert "35 FP8 weights for cuda:sm90" in printed
    assert "Return a list of " in printed
    assert "next token: " in printed
    assert any("<iframe" in str(output.get("data", {}).get("text/html")) for output in outputs)


@pytest.mark.long
def test_tensor_parallel():
    import ast
    import subprocess

    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         ROOT / "examples/tensor_parallel.py"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    sizes = ast.literal_eval(re.search(r"on each rank: (\[.+\])", run.stdout)[1])
    assert sizes[0] == sizes[1] > 1e6
    assert float(re.search(r"from eager ones: (\S+)", run.stdout)[1]) < 0.5
    assert len(ast.literal_eval(re.search(r"tokens: (\[.+\])", run.stdout)[1])) > 8


def test_add_a_rule_and_its_tutorial(capsys):
    module = example("add_a_rule")
    module.main()
    out = capsys.readouterr().out
    assert "no rule knows this use of a weight" in out.splitlines()[0]
    assert "1 weight on the left → " in out.splitlines()[1]
    assert float(out.rpartition(": ")[2]) < 1e-5
    assert_shown("writing-a-rule", "add_a_rule")


def assert_shown(tutorial, name):
    """A tutorial shows code of its example, as it is there."""
    source = (ROOT / f"examples/{name}.py").read_text()
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / f"docs/{tutorial}.md").read_text(), re.S)
    assert len(blocks) >= 2
    for block in blocks:
        missing = [line for line in block.splitlines() if line.strip() not in source and "examples/models" not in line]
        assert not missing, f"the tutorial shows code that the example does not have: {missing}"


@pytest.mark.long
def test_add_a_pass_and_its_tutorial(capsys):
    module = example("add_a_pass")
    module.main()
    *ran, error = capsys.readouterr().out.splitlines()
    names = [line.partition(":")[0] for line in ran]
    assert names.index("multiply-squares") == names.index("decompose") + 1
    assert "multiply-squares: 11" in ran
    assert "multiply-squares: 11" in (ROOT / "docs/writing-a-pass.md").read_text()
    assert float(error.rpartition(": ")[2]) < 0.02
    assert_shown("writing-a-pass", "add_a_pass")


def test_a_rule_of_ones_own_enters_the_cache_key_and_replaces_its_older_self():
    module = example("add_a_rule")
    before = passes.fingerprint()
    passes.register(module.WeightOnTheLeft())
    assert passes.fingerprint() != before
    assert "weight on the left" in passes.fingerprint()
    passes.register(module.WeightOnTheLeft())
    assert sum(rule.name == "weight on the left" for rule in passes.RULES) == 1


def test_a_rule_without_roots_is_refused():
    class Nameless(passes.Rule):
        pass

    with pytest.raises(Exception, match="needs a name and roots"):
        passes.register(Nameless())


@pytest.mark.parametrize("dims", [2, 3, 4])
def test_the_tutorials_rule_is_right_in_every_rank(dims):
    module = example("add_a_rule")
    passes.register(module.WeightOnTheLeft())
    model, x = module.model(), torch.randn(*[2, 3][: dims - 2], 256, 20)
    import ctfp8_compile as ctfp8

    program = ctfp8.lower(model, (x,))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-3)
    assert not ctfp8.explain(model, (x,)).kept
