"""Weight-only kernels without a GPU: their arithmetic in Triton's interpreter, their code for every capability."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

from ctfp8_compile import compat

triton = pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import triton_resources as resources  # noqa: E402 - it lies beside the benchmarks

BLOCK = (128, 128)
_INTERPRETER = pytest.mark.skipif(
    compat.release(triton.__version__) < (3, 7) and compat.release(numpy.__version__) >= (2, 4),
    reason="needs NumPy before 2.4: the interpreter of Triton 3.6 makes Python numbers of its arrays",
)


def interpreted(examples: int) -> None:
    """Runs `interpreted_kernels.py`, in which Triton is another one than here."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "tests/ops/interpreted_kernels.py"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "CTFP8_EXAMPLES": str(examples)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@_INTERPRETER
def test_arithmetic_against_float64():
    interpreted(examples=0)


@_INTERPRETER
@pytest.mark.long
def test_arithmetic_against_float64_at_random():
    interpreted(examples=100)


def fits(make, capability: int, *args, **kwargs) -> resources.Built:
    built = resources.build(make(*args, **kwargs, capability=capability), capability)
    assert built.local == 0, "registers are spilled to memory"
    assert built.shared <= resources.shared(capability) * 1024
    assert ".ftz" not in built.ptx  # e4m3's subnormals must come through
    assert "e4m3" not in built.ptx  # decoded by bits; sm80 has no conversion
    return built


@pytest.mark.parametrize("capability", resources.CAPABILITIES)
def test_kernels_build(capability):
    few = fits(resources.linear, capability, 1, 4096, 4096)
    assert "cp.async" in few.ptx  # tiles are loaded ahead
    assert "mma.sync" in few.ptx  # warps have columns of their own, also where the GPU has larger matrix instructions
    many = fits(resources.grouped, capability, 16384, 128, 1536, 2048, BLOCK)
    instruction = {90: "wgmma", 100: "tcgen05.mma"}.get(capability, "mma.sync")
    assert instruction in many.ptx
    fits(resources.gathered, capability, 8, 8, 96, 100)  # neither size is a multiple of a tile


def test_kernels_build_for_sm75():
    """Which has neither bfloat16 nor conversions of FP8, and, of Triton, no matrix instructions."""
    half = torch.float16
    for make, args in (
        (resources.linear, (1, 4096, 4096)),
        (resources.linear, (16, 1024, 4096, BLOCK)),
        (resources.gathered, (8, 8, 96, 100)),
    ):
        assert "bf16" not in fits(make, 75, *args, dtype=half).ptx


SIZES = [(4096, 4096), (28672, 4096), (1000, 200), (96, 33)]


@pytest.mark.long
@pytest.mark.parametrize("capability", resources.CAPABILITIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_tile_builds(capability, dtype):
    for block in (None, BLOCK, (64, 32)):
        for rows in (1, 16, 32, 64, 256, 4096):
            for n, k in SIZES:
                fits(resources.linear, capability, rows, n, k, block, dtype)
        for rows in (8, 1024, 65536):
            fits(resources.grouped, capability, rows, 128, 768, 2048, block, dtype)
        fits(resources.gathered, capability, 8, 128, 768, 2048, block, dtype)


def test_tiles():
    """Powers of two, and the parts that warps take as large as a matrix instruction wants."""
    for block_cols in (0, 1, 16, 24, 32, 48, 64, 96, 100, 128, 256):
        for cols in (1, 31, 64, 100, 256, 4096, 14336):
            for rows in (1, 9, 20, 50, 100, 5000, "any"):
                for matrices in (1, 128):
                    tile = resources.operators.tiles.choose(rows, 4096, cols, block_cols, matrices)
                    assert tile.cols & (tile.cols - 1) == 0
                    assert tile.cols // tile.split >= 16


WITHOUT = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
import torch
from torch import nn
import ctfp8_compile as ctfp8
weight = torch.arange(64 * 32, dtype=torch.uint8).remainder(100).view(64, 32).view(torch.float8_e4m3fn)
group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}
config = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group}}
module = nn.Sequential(nn.Linear(32, 64, bias=False)).eval()
state = {"0.weight": weight, "0.weight_scale": torch.rand(64, 1) + 0.5}
ctfp8.load_state_dict(module, state, config)
x = torch.randn(3, 32)
program = ctfp8.lower(module, (x,), target="cuda:sm80")
assert "ctfp8.weight_only_linear" in str(program.graph), program.graph
torch.testing.assert_close(program.module()(x), module(x), rtol=1e-4, atol=1e-4)
assert "triton" not in sys.modules
"""


def test_triton_is_optional():
    """A machine without it loads checkpoints, lowers them for a GPU, and runs what it lowered on the CPU."""
    done = subprocess.run([sys.executable, "-c", WITHOUT], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if "riton" in line]
    assert not [line for line in said if "flop counting" not in line]  # torch 2.14 says that much itself


@pytest.mark.parametrize(
    ("installed", "sentence"),
    [
        ((), "Triton is not installed: pip install triton"),
        (("triton",), "the Triton that is installed has no backend for xpu"),
        (("triton", "triton.backends.intel"), None),
    ],
)
def test_a_gpu_at_hand_is_asked(monkeypatch, installed, sentence):
    operators = resources.operators
    assert operators.missing("xpu") is None  # it is not here
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    monkeypatch.setattr(operators.importlib.util, "find_spec", lambda name: "there" if name in installed else None)
    assert operators.missing("xpu") == sentence
