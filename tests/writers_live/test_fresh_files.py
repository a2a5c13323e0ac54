"""The real writers' packages, pinned, each in an environment of its own, write a file now, and it is read within its bound.

make test-writers      # WRITERS="modelopt torchao" for some; environments are kept under build/writers

A writer is `write_NAME.py`, which uses its documented API and knows nothing of ours, and `requirements-NAME.txt`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import DATA, relative_error
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import ctfp8_compile as ctfp8
from ctfp8_compile.ops import FP8

pytestmark = [pytest.mark.writers, pytest.mark.filterwarnings("ignore")]

HERE = Path(__file__).parent
ENVIRONMENTS = HERE.parent.parent / "build" / "writers"
SOURCE = DATA / "llama/dense"
IDS = torch.arange(2, 50).mul(5).remainder(120).reshape(2, 24)
BOUND = 0.13  #: relative error of logits against the dense source, of a dense model's FP8 file read right
#: By writer, the ways it is asked to write, in its own words.
WAYS = {
    "compressed_tensors": ["FP8_DYNAMIC"],  # whoever calls it computes the scales; llm-compressor does for the others
    "llmcompressor": ["FP8_DYNAMIC", "FP8_BLOCK", "MXFP8"],
    "modelopt": ["FP8_DEFAULT_CFG", "FP8_PER_CHANNEL_PER_TOKEN_CFG", "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG", "MXFP8_DEFAULT_CFG"],
    "quark": ["fp8", "ptpc_fp8"],
    "auto_round": ["FP8_BLOCK", "MXFP8"],  # static scales want a data set from the hub
    "torchao": ["weight_only", "PerRow", "PerTensor"],
    "gptqmodel": ["row", "tensor"],  # of blocks it wants whole ones, which this model does not have
}  # fmt: skip
CHOSEN = os.environ.get("WRITERS", "").split() or list(WAYS)


def python(writer: str) -> Path:
    """The interpreter of a writer's environment, made where it is not there."""
    found = ENVIRONMENTS / writer / "bin" / "python"
    ready = ENVIRONMENTS / writer / ".ready"
    if not ready.exists():
        subprocess.run([sys.executable, "-m", "venv", ENVIRONMENTS / writer], check=True)
        requirements = HERE / f"requirements-{writer}.txt"
        done = subprocess.run(
            [found, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", requirements],
            capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            pytest.fail(f"{requirements.name} cannot be installed here:\n{done.stderr[-2000:]}")
        ready.touch()
    return found


def written(writer: str, way: str, folder: Path) -> Path:
    """The folder with a file that the writer wrote in its own process."""
    command = [python(writer), HERE / f"write_{writer}.py", SOURCE, way, folder]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}  # nothing of ours in it
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder.parent)
    if done.returncode and "requires CUDA" in done.stderr:
        pytest.skip(f"{writer} writes {way} on a GPU only")
    if done.returncode:
        pytest.fail(f"write_{writer}.py {way} does not write:\n{done.stdout[-1000:]}\n{done.stderr[-2000:]}")
    return next(folder.rglob("config.json")).parent  # AutoRound writes to a folder below


@pytest.fixture(scope="module")
def dense():
    model = AutoModelForCausalLM.from_pretrained(SOURCE, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


@pytest.mark.parametrize(("writer", "way"), [(w, way) for w in CHOSEN for way in WAYS[w]])
def test_a_fresh_file_is_read(writer, way, dense, tmp_path):
    folder = written(writer, way, tmp_path / "out")
    before = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    model = ctfp8.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        got = model(IDS, use_cache=False).logits
        error = relative_error(got, dense)
        assert 0 < error < BOUND
        if way == WAYS[writer][0]:
            compiled = torch.compile(model, backend="ctfp8", fullgraph=True)(IDS, use_cache=False).logits
            assert relative_error(compiled, got) < 1e-2
    in_file = sum(t.numel() for t in before.values() if t.dtype == FP8)
    assert in_file > 0
    assert sum(p.numel() for p in model.parameters() if p.dtype == FP8) == in_file
    ctfp8.save_pretrained(model, tmp_path / "again")
    after = load_file(tmp_path / "again" / "model.safetensors")
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        assert (tensor.dtype, tensor.shape) == (before[name].dtype, before[name].shape), name
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), before[name].reshape(-1).view(torch.uint8)), name
    print(f"{writer} {way}: relative error {error:.3f}")
