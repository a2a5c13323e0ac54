"""One random module by every way: eager, compiled, lowered, exported and loaded, each against float64.

`python tests/fuzz/test_differential.py FIRST SECONDS` runs seeds from FIRST on for that long and prints what it finds.
"""

from __future__ import annotations

import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the script
from support.programs import Case, draw

import ctfp8_compile as ctfp8
from ctfp8_compile.graph import is_marker
from ctfp8_compile.inductor.backend import Fp8Pass

#: What a step may add to the relative error, by dtype; and how much worse than eager another way may be.
ROUNDING = {torch.bfloat16: 0.02, torch.float16: 0.004, torch.float32: 2e-5}
ROWS, OTHER_ROWS = 2, 5


def passed(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
    """A backend that does as ours until Inductor writes code: the same graph, the same pass, then run as it is."""

    def run_pass(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        Fp8Pass(ctfp8.Target.detect(torch.device("cpu")))(gm.graph)
        assert not any(is_marker(node) for node in gm.graph.nodes)
        gm.graph.lint()
        gm.recompile()
        return gm

    return aot_autograd(fw_compiler=run_pass, decompositions=select_decomp_table())(gm, example_inputs)


def ways(case: Case, folder: Path, codegen: bool, dynamic: bool) -> dict[str, Any]:
    """Each way to run a module, by name; `dynamic`: for any number of rows."""
    args = case.inputs(ROWS)
    shapes = {"x": {0: torch.export.Dim("rows", min=2, max=64)}} if dynamic else None

    def exported() -> nn.Module:
        path = folder / f"{case.seed}.pt2"
        ctfp8.export(case.module, args, path=path, dynamic_shapes=shapes)
        return ctfp8.load(path)

    found: dict[str, Any] = {
        "pass": lambda: torch.compile(case.module, backend=passed, fullgraph=True, dynamic=dynamic),
        "lower": lambda: ctfp8.lower(case.module, args, target="cpu", dynamic_shapes=shapes).module(),
        "lower for cuda": lambda: _runs_anywhere(case, args, shapes),
        "export, load": exported,
    }
    if codegen:
        found["compile"] = lambda: torch.compile(case.module, backend="ctfp8", fullgraph=True, dynamic=dynamic)
    return found


def _runs_anywhere(case: Case, args: Any, shapes: Any) -> None:
    """What is made for a GPU is not run here; that it can be made is looked at."""
    ctfp8.lower(case.module, args, target="cuda:sm90", dynamic_shapes=shapes)


@torch.no_grad()
def check(case: Case, folder: Path, codegen: bool = False, dynamic: bool = False) -> list[str]:
    """What is wrong with a module, in sentences."""
    wrong = []
    sizes = (ROWS, OTHER_ROWS) if dynamic else (ROWS,)
    truths = {rows: case.truth(*case.inputs(rows)) for rows in sizes}
    bound = ROUNDING[case.dtype] * (1 + sum(word not in ("rms_norm", "back") for word in case.words))
    if case.dtype == torch.float16 and case.magnitude < 0.01:
        bound *= 4  # products of such values are subnormal, and have fewer bits
    errors = {rows: error(case.module(*case.inputs(rows)), truths[rows]) for rows in sizes}
    for rows, found in errors.items():
        if not found < bound:
            wrong.append(f"eager, {rows} rows: error {found:.2e}, allowed {bound:.2e}")
    for name, make in ways(case, folder, codegen, dynamic).items():
        torch._dynamo.reset()
        try:
            run = make()
            for rows in sizes if run is not None else ():
                got = run(*case.inputs(rows))
                allowed = 3 * errors[rows] + ROUNDING[case.dtype]
                if got.dtype != case.dtype:
                    wrong.append(f"{name}: {got.dtype}")
                if not (found := error(got, truths[rows])) < allowed:
                    wrong.append(f"{name}, {rows} rows: error {found:.2e}, allowed {allowed:.2e}")
        except Exception as problem:
            if not _torch_refuses(case, name, dynamic):
                traceback.print_exc()
                wrong.append(f"{name}: {type(problem).__name__}: {str(problem).splitlines()[0][:200]}")
    return wrong


def error(got: Tensor, truth: Tensor) -> float:
    if got.shape != truth.shape:
        return float("inf")
    return ((got.double() - truth).norm() / truth.norm().clamp_min(1e-30)).item()


def _torch_refuses(case: Case, name: str, dynamic: bool) -> bool:
    """Whether torch itself cannot trace the same module with plain weights."""
    from ctfp8_compile.model.freeze import dequantize_

    twin = dequantize_(draw(case.seed).module)
    args = case.inputs(ROWS)
    torch._dynamo.reset()
    try:
        if name in ("pass", "compile"):
            torch.compile(twin, backend="aot_eager_decomp_partition", fullgraph=True, dynamic=dynamic)(*args)
        else:
            shapes = {"x": {0: torch.export.Dim("rows", min=2, max=64)}} if dynamic else None
            torch.export.export(twin, args, dynamic_shapes=shapes).run_decompositions({})
    except Exception:
        return True
    return False


# ---------------------------------------------------------------------------------------------------------- the suite


@pytest.mark.parametrize("seed", range(12))
def test_a_random_module(seed, tmp_path):
    case = draw(seed)
    assert not check(case, tmp_path, codegen=False, dynamic=seed % 3 == 0), str(case)


@pytest.mark.parametrize("seed", range(100, 102))
def test_a_random_module_compiled(seed, tmp_path):
    case = draw(seed)
    assert not check(case, tmp_path, codegen=True, dynamic=seed % 2 == 0), str(case)


#: Modules of `make test-long`.
LONG = 30


@pytest.mark.long
def test_many_random_modules(tmp_path):
    """Of each tenth, Inductor writes the code. A number of seeds, not of minutes: a faster machine tries no others."""
    found = fuzz(1000, 3600, tmp_path, most=LONG)
    assert not found, "\n".join(found)


def fuzz(first: int, seconds: float, folder: Path, say: Any = lambda *words: None, most: int = 1_000_000) -> list[str]:
    end, seed, found, steps = time.monotonic() + seconds, first, [], Counter[str]()
    while time.monotonic() < end and seed < first + most:
        case = draw(seed)
        steps.update(word.split(" ")[0] for word in case.words)
        wrong = check(case, folder, codegen=seed % 10 == 0, dynamic=seed % 3 == 0)
        if wrong:
            found.append(f"{case}\n    " + "\n    ".join(wrong))
            say(found[-1])
        for file in folder.glob("*.pt2"):
            file.unlink()
        seed += 1
        if seed % 50 == 0:
            say(f"{seed - first} modules, {len(found)} with something wrong")
    say(f"seeds {first} to {seed - 1}: {seed - first} modules, {len(found)} with something wrong; steps {dict(steps)}")
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    with (
        tempfile.TemporaryDirectory() as scratch,
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        fuzz(int(sys.argv[1]), float(sys.argv[2]), Path(scratch), lambda *words: print(*words, flush=True))
