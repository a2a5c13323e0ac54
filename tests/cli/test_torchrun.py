"""`torchrun … -m ctfp8_compile … --tp`: what one process prints, once."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from conftest import DATA
from typer.testing import CliRunner

from ctfp8_compile.cli.app import app

LLAMA = DATA.parent.parent / "examples/models/llama"


def _on_two(*arguments: object) -> subprocess.CompletedProcess[str]:
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
    return subprocess.run([*start, *map(str, arguments)], capture_output=True, text=True, timeout=600,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip


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
def test_an_error_is_printed_once():
    run = _on_two("generate", DATA / "llama/FP8", "--prompt", "x", "--tp")  # no tokenizer
    assert run.returncode != 0
    assert run.stderr.count("no tokenizer that transformers can read is there") == 1


def test_one_process_is_told():
    run = CliRunner().invoke(app, ["generate", str(LLAMA), "--prompt", "x", "--tp"])
    assert run.exit_code == 1
    assert "--tp is for several processes. Start them with: torchrun --nproc-per-node 2" in run.output
