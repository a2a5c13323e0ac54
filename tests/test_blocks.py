"""Every block of the documents can be pasted as it stands, in order: the quick suite runs Python without Inductor, the long one all."""

from __future__ import annotations

import functools
import re
import shlex
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.blocks import PAGES, Block, blocks, workplace
from typer.testing import CliRunner

import ctfp8_compile as ctfp8
from ctfp8_compile import passes
from ctfp8_compile.cli.app import app

WITH_CODE = [page for page in PAGES if any(block.language != "text" for block in blocks(page))]
#: Blocks that not every machine can run, by what they need; how many there are is held, so that none is added to be left out.
NEEDS = {
    "several processes: torchrun --nproc-per-node 2": 3,
    "sentence-transformers, and the folder of an encoder": 1,
    "a network, then a GPU": 1,
    "the server above": 1,
    "openvino-tokenizers": 1,
}
#: Commands that are quick, and run in this process.
QUICK = ("ctfp8 inspect", "ctfp8 explain")


def named(page: Path) -> str:
    return page.name if page.parent.name != "docs" else f"docs/{page.name}"


def commands(block: Block) -> list[list[str]]:
    """The commands of a shell block, each split into words."""
    return [words for line in block.text.splitlines() if (words := shlex.split(line, comments=True))]


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    monkeypatch.chdir(tmp_path)
    rules = list(passes.RULES)
    yield workplace(tmp_path)
    passes.RULES[:] = rules


def test_every_block_says_what_it_is() -> None:
    found = [block for page in PAGES for block in blocks(page)]
    assert not [block.where for block in found if block.language not in ("python", "sh", "text")]
    assert not [block.where for block in found if block.language == "text" and block.needs]
    fences = sum(len(re.findall(r"^ *```", page.read_text(), re.MULTILINE)) for page in PAGES)
    assert fences == 2 * len(found), "a fence is not closed"


def test_what_not_every_machine_can_run_is_counted() -> None:
    assert Counter(block.needs for page in PAGES for block in blocks(page) if block.needs) == NEEDS


@pytest.mark.parametrize("page", WITH_CODE, ids=named)
def test_blocks_are_code(page: Path) -> None:
    for block in blocks(page):
        if block.language == "python":
            compile(block.text, block.where, "exec")
        elif block.language == "sh":
            check = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True)
            assert check.returncode == 0, f"{block.where}: {check.stderr}"
            assert not re.search(r"^\s*[$>] ", block.text, re.MULTILINE), f"{block.where}: a prompt is pasted, too"


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, about what peft asks it
@pytest.mark.parametrize(
    "page", [p for p in WITH_CODE if any(b.language == "python" and not b.needs for b in blocks(p))], ids=named
)
def test_python_runs_in_order(page: Path, clone: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """All but code generation: what the README compiles runs as dynamo traced it, what other pages compile stays as it is."""
    traced = functools.partial(ctfp8.compile, backend="eager")
    monkeypatch.setattr(ctfp8, "compile", traced if page.name == "README.md" else lambda model, **arguments: model)
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.language == "python" and not block.needs:
            exec(compile(block.text, block.where, "exec"), names)


@pytest.mark.parametrize("page", [p for p in WITH_CODE if any(b.language == "sh" for b in blocks(p))], ids=named)
def test_commands_exist_and_quick_ones_print_what_is_shown(page: Path, clone: dict[str, str]) -> None:
    """Their options are known, and lines of a `text` block behind a command are in its output; `…` stands for others."""
    out = ""
    for block in blocks(page):
        if block.language == "text" and block.follows and out:
            said = " ".join(re.sub(r"\(.*?\)", "()", out).split())
            for line in block.text.splitlines():
                assert " ".join(re.sub(r"\(.*?\)", "()", line.strip("… ")).split()) in said, f"{block.where}: {line}"
        out = ""
        if block.language != "sh" or block.needs:
            continue
        for words in commands(block):
            if " ".join(words[:2]) in QUICK:
                result = CliRunner().invoke(app, words[1:])
                assert result.exit_code == 0, f"{block.where}: {words}: {result.stderr}"
                out += result.stdout
            elif words[0] == "ctfp8":
                known = CliRunner().invoke(app, [words[1], "--help"]).stdout
                assert all(word in known for word in words if word.startswith("--")), f"{block.where}: {words}"
            else:
                assert words[0] in ("make", "python", "pip"), f"{block.where}: {words}"


@pytest.mark.ci("README.md", "docs/quickstart.md", "docs/writing-a-pass.md", "docs/lora.md")
@pytest.mark.long(minutes=4)
@pytest.mark.parametrize("page", WITH_CODE, ids=named)
def test_a_reader_pastes_them(page: Path, clone: dict[str, str], tmp_path: Path) -> None:
    """A page in a fresh process for each language, nothing replaced; what needs several processes has two."""
    alone = [b for b in blocks(page) if not b.needs]
    together = [b for b in blocks(page) if b.needs.startswith("several processes")]
    torchrun = ["python", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for parts, language, start in (
        (alone, "python", ["python"]),
        (alone, "sh", ["bash", "-euo", "pipefail"]),
        (together, "python", torchrun),
    ):
        text = "\n".join(block.text for block in parts if block.language == language)
        if text:
            script = tmp_path / f"{len(start)}.{language}"
            script.write_text(text)
            run = subprocess.run([*start, script], cwd=tmp_path, env=clone, capture_output=True, text=True)
            assert run.returncode == 0, f"{page.name}: {run.stdout[-2000:]}{run.stderr[-4000:]}"
