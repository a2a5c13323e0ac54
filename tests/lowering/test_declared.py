"""Declared operators give way to the library that has them, and a library that was there first is given what it lacks.

Each order runs in a process of its own, as torch keeps operators for as long as the process. The stand-in registers itself as the
wheels do (`gpu_codegen/fbgemm_stub.py`); the wheel loads without a GPU where torch is built for CUDA.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.scaled import layer

import ctfp8_compile as ctfp8
from ctfp8_compile.target import KernelLibrary

TESTS = Path(__file__).parent.parent
_PROGRAM = """
import importlib.util, sys
import torch
import ctfp8_compile as ctfp8
from support.scaled import layer

def lowered(strategy, activation):
    module, _ = layer(256, 512, torch.bfloat16, strategy, activation)
    x = torch.randn(21, 512).bfloat16()
    (entry,) = ctfp8.explain(module, (x,), target="cuda:sm90+fbgemm").rewritten
    program = ctfp8.lower(module, (x,), target="cuda:sm90+fbgemm")
    (operator,) = [node.target for node in program.graph.nodes if "fbgemm" in str(node.target)]
    assert entry.kernel.removeprefix("fbgemm ") in str(operator), (entry.kernel, operator)
    return program, operator, x

SCHEMES = ("block", "group"), ("channel", "token")
before = [lowered(*scheme) for scheme in SCHEMES] if sys.argv[1] == "declared first" else []
for program, _, x in before:
    assert program.module()(x).shape == (21, 256)  # by the reference
importlib.util.find_spec("fbgemm_gpu")  # who only looks changes nothing
for program, _, x in before:
    assert program.module()(x).shape == (21, 256)
importlib.import_module("fbgemm_gpu.experimental.gen_ai")
for program, operator, x in [*before, *(lowered(*scheme) for scheme in SCHEMES)]:
    assert operator.has_kernel_for_dispatch_key("CUDA"), operator  # it is the library's now, in older graphs too
    assert operator.has_kernel_for_dispatch_key("Meta"), operator
    program.run_decompositions({})  # runs meta functions
print("done")
"""
_STAND_IN = "import fbgemm_stub\nfbgemm_stub.register()\n"


@pytest.mark.parametrize("order", ["declared first", "library first"])
@pytest.mark.parametrize("library", ["stand-in", "wheel"])
def test_either_order(library: str, order: str, tmp_path: Path) -> None:
    paths = [str(TESTS.parent), str(TESTS), str(TESTS / "gpu_codegen")]
    if library == "stand-in":
        for name in ("fbgemm_gpu", "fbgemm_gpu/experimental", "fbgemm_gpu/experimental/gen_ai"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "__init__.py").write_text(_STAND_IN if name.endswith("gen_ai") else "")
        paths.insert(0, str(tmp_path))
    elif importlib.util.find_spec("fbgemm_gpu") is None or torch.version.cuda is None:
        pytest.skip("needs fbgemm-gpu-genai and a torch built for CUDA")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])}
    ran = subprocess.run([sys.executable, "-c", _PROGRAM, order], env=environment, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout.strip()) == (0, "done"), ran.stderr[-3000:]


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="needs a machine without a GPU: with one, libraries must be installed"
)
@pytest.mark.parametrize("target", ["cuda:sm90", "cuda:sm90+fbgemm"])
@pytest.mark.parametrize("unpaired", [None, "no release of fbgemm-gpu-genai is known"])
@pytest.mark.parametrize(("strategy", "activation"), [("block", "group"), ("channel", "token")])
def test_explain_and_lower_agree_on_a_pair(monkeypatch, target, unpaired, strategy, activation):
    monkeypatch.setattr(KernelLibrary, "unpaired", lambda self: unpaired)
    module, _ = layer(256, 512, torch.bfloat16, strategy, activation)
    x = torch.zeros(4, 512).bfloat16()
    (entry,) = ctfp8.explain(module, (x,), target=target).rewritten
    assert entry.kernel.startswith("fbgemm") == (unpaired is None or "+" in target)
    matmul = entry.kernel.replace(" ", ".")
    called = {
        str(node.target).removesuffix(".default") for node in ctfp8.lower(module, (x,), target=target).graph.nodes
    }
    assert matmul in called
