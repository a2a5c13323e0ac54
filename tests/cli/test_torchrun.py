"""`torchrun … -m ctfp8_compile … --tp`: what one process prints, once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import DATA
from typer.testing import CliRunner

from ctfp8_compile.cli.app import app

LLAMA = DATA.parent.parent / "examples/models/llama"


def _on_two(*arguments: object, folder: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    start = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "ctfp8_compile",
    ]
    return subprocess.run([*start, *map(str, arguments)], capture_output=True, text=True, timeout=600, cwd=folder,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **env})  # fmt: skip


@pytest.mark.nightly
@pytest.mark.long
def test_generate_and_bench_print_once():
    prompt = ("--prompt", "def area(width, height):", "--max-new-tokens", 12)
    run = _on_two("generate", LLAMA, *prompt, "--tp", "--json")
    assert run.returncode == 0, run.stderr
    (line,) = run.stdout.splitlines()
    one = CliRunner().invoke(app, ["generate", str(LLAMA), *map(str, prompt), "--eager", "--json"])
    assert json.loads(line)["text"] == json.loads(one.stdout)["text"]
    run = _on_two("bench", LLAMA, "--prompt-tokens", 8, "--new-tokens", 4, "--rounds", 1, "--tp", "--json")
    assert run.returncode == 0, run.stderr
    (line,) = run.stdout.splitlines()
    found = json.loads(line)
    assert 0.5 < found["ctfp8"]["weight_bytes"] / found["bf16 eager"]["weight_bytes"] < 0.75


@pytest.mark.long
@pytest.mark.parametrize("later", [0, 1])
def test_an_error_is_printed_once(later, tmp_path):
    """Whichever rank fails first: torchrun ends the other one."""
    (tmp_path / "sitecustomize.py").write_text(
        f"import os, time\nif os.environ.get('RANK') == '{later}': time.sleep(3)\n"
    )
    run = _on_two("generate", DATA / "llama/FP8", "--prompt", "x", "--tp", PYTHONPATH=str(tmp_path))  # no tokenizer
    assert run.returncode != 0
    assert run.stderr.count("no tokenizer that transformers can read is there") == 1


@pytest.mark.long
def test_the_error_of_another_rank_than_the_first(tmp_path):
    shutil.copytree(DATA / "llama/FP8", tmp_path / "model")
    (tmp_path / "sitecustomize.py").write_text("import os\nif os.environ.get('RANK') == '1': os.chdir('/')\n")
    run = _on_two("bench", "./model", "--tp", PYTHONPATH=str(tmp_path), folder=tmp_path)
    assert run.returncode != 0
    assert run.stderr.count("error: ./model: no such folder") == 1, run.stderr


def test_one_process_is_told():
    run = CliRunner().invoke(app, ["generate", str(LLAMA), "--prompt", "x", "--tp"])
    assert run.exit_code == 1
    assert "--tp is for several processes. Start them with: torchrun --nproc-per-node 2" in run.output
