"""The documents: links lead somewhere, every message has its place in troubleshooting, names of the API exist."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import DATA

import ctfp8_compile as ctfp8

ROOT = DATA.parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            headings = [
                re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-")
                for h in re.findall(r"^#+ (.*)$", file.read_text(), re.M)
            ]
            assert anchor in headings, target


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_files_named_in_code_exist(page):
    for path in re.findall(r"`((?:ctfp8_compile|tests|examples|benchmarks|docs)/[\w/.\-]+)`", page.read_text()):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_names_of_the_api_exist(page):
    for name in set(re.findall(r"\bctfp8\.([a-zA-Z_]\w*)\(", page.read_text())):
        assert hasattr(ctfp8, name) or hasattr(torch.ops.ctfp8, name), name


def test_every_public_name_is_in_the_reference():
    text = (ROOT / "docs/quickstart.md").read_text() + (ROOT / "docs/README.md").read_text()
    assert not [n for n in ctfp8.__all__ if n not in text and not n.endswith("Error") and n != "ops"]


def messages() -> Iterator[str]:
    """The longest literal part of each message that the package raises or warns with."""
    for file in (ROOT / "ctfp8_compile").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            name = getattr(node.func, "id", "") or getattr(node.func, "attr", "")
            if name not in ("warn", *(n for n in ctfp8.__all__ if n.endswith("Error"))):
                continue
            text = node.args[0]
            parts = text.values if isinstance(text, ast.JoinedStr) else [text]
            literals = [p.value for p in parts if isinstance(p, ast.Constant) and isinstance(p.value, str)]
            longest = max(literals, key=len, default="").strip(" .:;,()")
            if len(longest) > 12:
                yield " ".join(longest.split())


def test_every_message_is_in_troubleshooting():
    text = " ".join((ROOT / "docs/troubleshooting.md").read_text().split())
    found = sorted(set(messages()))
    assert len(found) > 80
    assert not [message for message in found if message not in text]


def test_import_is_clean_and_light():
    """No warning of ours, and none of the libraries a loaded artifact does not need."""
    code = (
        "import torch, sys, time; t = time.perf_counter(); import ctfp8_compile; took = time.perf_counter() - t;"
        "assert 'transformers' not in sys.modules and 'compressed_tensors' not in sys.modules; print(took)"
    )
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_public_functions_have_hints_and_docstrings():
    import inspect

    for name in ctfp8.__all__:
        thing = getattr(ctfp8, name)
        assert inspect.getdoc(thing), name
        members = [m for n, m in vars(thing).items() if not n.startswith("_")] if inspect.isclass(thing) else [thing]
        for function in filter(inspect.isfunction, [getattr(m, "__func__", m) for m in members]):
            assert inspect.getdoc(function), f"{name}.{function.__name__}"
            hints = inspect.signature(function)
            assert hints.return_annotation is not inspect.Signature.empty, function
            for parameter in hints.parameters.values():
                assert parameter.annotation is not inspect.Parameter.empty or parameter.name in ("self", "cls"), (
                    function
                )
    assert (Path(ctfp8.__file__).parent / "py.typed").exists()


@pytest.mark.long
def test_the_site_builds_without_a_dead_link(tmp_path):
    pytest.importorskip("mkdocs")
    build = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path)]
    run = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "dequantized_linear" in (tmp_path / "index.html").read_text()
    api = (tmp_path / "api.html").read_text()
    assert all(
        f'id="ctfp8_compile.{name}"' in api for name in ("hf.hub.from_pretrained", "aot.load.load", "passes.rule.Match")
    )
