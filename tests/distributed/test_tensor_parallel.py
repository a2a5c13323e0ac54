"""Ranks compute what one process computes, each with its part of the weights, and save the file they came from."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from conftest import DATA, IDS, SCHEMES, logits, relative_error
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import architectures
from support.architectures import Sizes
from support.forge import forge
from support.ranks import on_ranks
from transformers.distributed import DistributedConfig

import ctfp8_compile as ctfp8
from ctfp8_compile import passes
from ctfp8_compile.hf.compat import cache_argument
from ctfp8_compile.ops import FP8


def run(folders: dict[str, Path], config: dict[str, Any], compiled: bool = False, out: Path | None = None) -> Any:
    """On each rank, by name: relative logit error against one process in float64, share of the FP8 bytes held and read, then
    the error of the compiled model and its number of graphs.
    """
    found = {}
    for name, folder in folders.items():
        one = ctfp8.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager")
        with patch("transformers.modeling_utils.safe_open", _Counting):
            _Counting.fp8_bytes = 0
            model = ctfp8.from_pretrained(folder, dtype=torch.float32, distributed_config=DistributedConfig(**config))
        want = logits(one)
        row = [
            relative_error(logits(model), want),
            *(n / _fp8_bytes(one) for n in (_fp8_bytes(model), _Counting.fp8_bytes)),
        ]
        if compiled:
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            forward = torch.compile(model, backend="ctfp8", fullgraph=True)
            row += [relative_error(logits(forward), want), torch._dynamo.utils.counters["stats"]["unique_graphs"]]
        if out is not None:  # in the dtype of the file
            same = ctfp8.from_pretrained(folder, distributed_config=DistributedConfig(**config))
            ctfp8.save_pretrained(same, out / name)
        found[name] = row
    return found


class _Counting:
    """safetensors' `safe_open` for transformers' loader; counts the bytes of FP8 weights that are taken from files."""

    fp8_bytes = 0

    def __init__(self, *args: Any, **kwargs: Any):
        self._file = safe_open(*args, **kwargs)

    def __exit__(self, *args: Any) -> None:
        self._file.__exit__(*args)

    def keys(self) -> list[str]:
        return self._file.keys()

    def metadata(self) -> dict[str, str]:
        return self._file.metadata()

    def get_slice(self, name: str) -> Any:
        view = self._file.get_slice(name)

        class Slice:
            get_shape, get_dtype = view.get_shape, view.get_dtype

            def __getitem__(self, index: Any) -> torch.Tensor:
                part = view[index]
                _Counting.fp8_bytes += part.nbytes if part.dtype == FP8 else 0
                return part

        return Slice()


def _fp8_bytes(model: Any) -> int:
    return sum(p.nbytes for p in model.parameters() if p.dtype == FP8)


def _check(ranks: list[Any], cases: dict[str, Path], size: int) -> None:
    bound = (
        5e-7 * size
    )  # each rank's part of a sum is rounded to float32 by itself: four were 1.02e-6 off, two are below 1e-6
    for found in ranks:
        assert isinstance(found, dict), found
        assert found.keys() == cases.keys()
        for name, (error, held, read, *compiled) in found.items():
            assert error <= bound, name
            assert (held, read) == (pytest.approx(1 / size), pytest.approx(1 / size)), name
            if compiled:
                assert compiled[0] <= bound, name
                assert compiled[1] == 1, name


def _same_bits(before: Path, after: Path) -> None:
    a, b = (load_file(folder / "model.safetensors") for folder in (before, after))
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert (tensor.dtype, tensor.shape) == (b[name].dtype, b[name].shape), name
        assert torch.equal(tensor.view(torch.uint8), b[name].view(torch.uint8)), name


def test_two_ranks(tmp_path):
    """Dense and experts, channel and block scales, static and dynamic activations."""
    cases = {name: DATA / name for name in ("llama/FP8_BLOCK", "mixtral/FP8")}
    _check(on_ranks(2, run, cases, {"tp_size": 2}, False, tmp_path), cases, 2)
    for name, folder in cases.items():
        _same_bits(folder, tmp_path / name)


def _copy(folder: Path, **changes: Any) -> Path:
    shutil.copytree(DATA / "llama/FP8_BLOCK", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def fail(folders: list[list[Path]], config: dict[str, Any]) -> list[str]:
    """What this rank raises for each pair of folders, of which it has one."""
    found = []
    for mine in folders:
        try:
            ctfp8.from_pretrained(mine[int(os.environ["RANK"])], distributed_config=DistributedConfig(**config))
            found.append("")
        except ctfp8.Ctfp8Error as error:
            found.append(str(error))
    return found


def test_a_rank_that_fails_ends_all(tmp_path):
    good, nan, empty = DATA / "llama/FP8_BLOCK", _copy(tmp_path / "nan"), tmp_path / "empty"
    empty.mkdir()
    tensors = load_file(nan / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"].view(torch.uint8)[-1, -1] = 0x7F  # rank 1 has the last row
    save_file(tensors, nan / "model.safetensors")
    heads = _copy(tmp_path / "heads", num_key_value_heads=1)
    short = _copy(tmp_path / "short")
    tensors = load_file(short / "model.safetensors")
    tensors["model.layers.0.mlp.gate_proj.weight"] = tensors["model.layers.0.mlp.gate_proj.weight"][:-8].contiguous()
    save_file(tensors, short / "model.safetensors")
    folders = [[nan, nan], [empty, good], [heads, heads], [good, short], [good, good]]
    first, second = on_ranks(2, fail, folders, {"tp_size": 2})
    assert "up_proj.weight: holds NaN values" in second[0]
    assert first[0].startswith("another rank failed, and so does this one; rank 1 says: model.layers.1.mlp.up_proj")
    assert "neither model.safetensors" in first[1]
    assert "rank 0 says" in second[1]
    assert first[2] == second[2]
    assert "num_key_value_heads is 1, which tp_size=2 does not divide" in first[2]
    assert "another rank failed" in first[3]
    assert "gate_proj.weight (F8_E4M3 [248, 128] in model.safetensors): the model declares" in second[3]
    assert (first[4], second[4]) == ("", "")


def leave(folder: Path, out: Path) -> str:
    """Rank 1 ends, before a load or before a save; what rank 0 raises, and within how many seconds."""
    dist.init_process_group("gloo")
    if out.name == "load" and dist.get_rank() == 1:
        return "gone"
    start = time.monotonic()
    try:
        model = ctfp8.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=2))
        dist.barrier()
        if dist.get_rank() == 1:
            return "gone"
        start = time.monotonic()
        ctfp8.save_pretrained(model, out)
    except ctfp8.RankError as error:
        assert time.monotonic() - start < 60
        return str(error)
    return "nothing"


@pytest.mark.long
@pytest.mark.parametrize("when", ["load", "save"])
def test_a_rank_that_ends(when, tmp_path):
    first, second = on_ranks(2, leave, DATA / "llama/FP8", tmp_path / when)
    assert first.startswith("another rank ended while this one waited for it")
    assert second == "gone"


def cannot_save(folder: Path, outs: list[Path]) -> str:
    model = ctfp8.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=2))
    try:
        ctfp8.save_pretrained(model, outs[dist.get_rank()])
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.long
def test_a_rank_that_cannot_save(tmp_path):
    (tmp_path / "file").write_text("")
    for outs in ([tmp_path / "file/x", tmp_path / "fine"], [tmp_path / "fine", tmp_path / "file"]):
        found = on_ranks(2, cannot_save, DATA / "llama/FP8", outs)
        bad = 0 if outs[0].parent.name == "file" else 1
        assert ("NotADirectoryError" if bad == 0 else "is a file; a checkpoint is saved to a folder") in found[bad]
        assert found[1 - bad].startswith(f"RankError: another rank failed, and so does this one; rank {bad} says: ")


def generate(folders: list[Path], config: dict[str, Any]) -> dict[str, tuple[bool, bool, bool, str]]:
    """By name: same tokens as one process with a growing cache, with a static one, and compiled; the compiled graph."""
    found = {}
    prompt = IDS[:1, :7]
    for folder in folders:
        one = ctfp8.from_pretrained(folder, dtype=torch.float32)
        model = ctfp8.from_pretrained(folder, dtype=torch.float32, distributed_config=DistributedConfig(**config))
        want = one.generate(prompt, max_new_tokens=6, do_sample=False)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        shapes: list[str] = []
        run_passes = passes.run

        def run(graph: Any, *args: Any, shapes: list[str] = shapes, run: Any = run_passes, **kwargs: Any) -> Any:
            report = run(graph, *args, **kwargs)
            shapes.append("\n".join(f"{n.target} {getattr(n.meta.get('val'), 'shape', '')}" for n in graph.nodes))
            return report

        same = [torch.equal(model.generate(prompt, max_new_tokens=6, do_sample=False), want)]
        for compiled in (False, True):
            cache = ctfp8.static_cache(model, 1, 32)
            if compiled:
                passes.run = run  # type: ignore[assignment]
                model.forward = torch.compile(model.forward, backend="ctfp8", fullgraph=True, dynamic=False)
            tokens = model.generate(prompt, max_new_tokens=6, do_sample=False, **{cache_argument(model): cache})
            same.append(torch.equal(tokens, want))
        passes.run = run_passes
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # prompt, and a token
        found["/".join(folder.parts[-2:])] = (*same, "\n\n".join(shapes))
    return found


@pytest.mark.ci(True)
@pytest.mark.long
@pytest.mark.parametrize("experts", [False, True])
def test_generation_and_one_graph_for_all_ranks(experts):
    folders = [DATA / "mixtral/FP8"] if experts else [DATA / "llama/FP8_BLOCK", DATA / "qwen3/FP8_DYNAMIC"]
    first, second = on_ranks(2, generate, folders, {"tp_size": 2} | ({"ep_size": 2} if experts else {}), seconds=900)
    assert isinstance(first, dict), first
    assert isinstance(second, dict), second
    for name, (growing, static, compiled, graphs) in first.items():
        assert (growing, static, compiled) == (True, True, True), name
        assert graphs == second[name][-1] != "", name


def cached(folder: Path, config: dict[str, Any]) -> tuple[float, list[int]]:
    """Relative error of logits with an FP8 cache against one process, and the shape of a rank's scale of the first layer."""
    found = []
    for extra in ({}, {"distributed_config": DistributedConfig(**config)}):
        model = ctfp8.from_pretrained(folder, dtype=torch.float32, **extra)
        cache = ctfp8.static_cache(model, 1, 32)
        found.append([])
        with torch.no_grad():
            for ids in IDS[:1, :8].split([7, 1], dim=1):
                found[-1].append(model(ids, **{cache_argument(model): cache}).logits)
    one, ranks = (torch.cat(logits, 1) for logits in found)
    return relative_error(ranks, one), list(cache.layers[0].scales[0].shape)


@pytest.mark.long
@pytest.mark.parametrize("by_head", [False, True])
def test_ranks_keep_the_scales_of_their_heads(by_head, tmp_path):
    folder = shutil.copytree(DATA / "llama/FP8_DYNAMIC_KV", tmp_path / "kv")
    tensors = load_file(folder / "model.safetensors")
    scales = [name for name in tensors if re.search("[kv]_scale$", name)]
    if by_head:  # each head's own, far from its neighbour's
        tensors |= {name: tensors[name] * torch.tensor([1.0, 4.0]).to(tensors[name].dtype) for name in scales}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert scales
    for found in on_ranks(2, cached, folder, {"tp_size": 2}):
        assert isinstance(found, tuple), found
        error, shape = found
        assert error <= 1e-6
        assert shape == [1]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"tp_size": 2}, "tp_size=2, but 1 process run. Start the script with torchrun --nproc-per-node 2."),
        ({"fsdp_size": 2}, "FSDP and pipeline parallelism"),
    ],
)
def test_a_launch_that_does_not_fit(config, message):
    with pytest.raises(ctfp8.UsageError, match=re.escape(message)):
        ctfp8.from_pretrained(DATA / "llama/FP8", distributed_config=DistributedConfig(**config))


@pytest.mark.ci("qwen3moe-True", "llama-False", "mixtral-False")
@pytest.mark.long
@pytest.mark.parametrize(
    ("architecture", "experts"),
    [
        ("qwen3moe", True),
        ("mixtral", False),
        ("llama", False),
        ("mixtral", True),
        ("qwen3", False),
        ("qwen3moe", False),
    ],
)
def test_every_scheme_eager_compiled_and_saved(architecture, experts, tmp_path):
    cases = {f"{architecture}/{scheme}": DATA / architecture / scheme for scheme in SCHEMES}
    config = {"tp_size": 2, "ep_size": 2} if experts else {"tp_size": 2}
    _check(on_ranks(2, run, cases, config, True, tmp_path, seconds=900), cases, 2)
    for name, folder in cases.items():
        _same_bits(folder, tmp_path / name)


@pytest.mark.ci("qwen3_moe")
@pytest.mark.long
@pytest.mark.parametrize(("architecture", "expert"), [("llama", 256), ("qwen3_moe", 96)])
def test_groups_that_a_border_between_ranks_cuts(architecture, expert, tmp_path):
    """Groups of 32 columns, of which a rank has 48: its scales are of 16, and float32; what is saved is what was read."""
    forged = forge(architecture, "MXFP8", tmp_path / "in", sizes=Sizes(hidden=128, intermediate=96, expert=expert))
    _check(on_ranks(2, run, {"cut": forged.folder}, {"tp_size": 2}, True, tmp_path), {"cut": forged.folder}, 2)
    _same_bits(forged.folder, tmp_path / "cut")


@pytest.mark.ci("mixtral")
@pytest.mark.long
@pytest.mark.parametrize(("architecture", "experts"), [("qwen3", False), ("mixtral", True)])
def test_four_ranks(architecture, experts, tmp_path, monkeypatch):
    """With more key-value heads than the checkpoints under tests/data have."""
    monkeypatch.setattr(architectures, "KV_HEADS", 4)
    sizes = Sizes(hidden=256, intermediate=512, expert=256)
    cases = {}
    for scheme in SCHEMES:
        forged = forge(architecture.replace("3moe", "3_moe"), scheme, tmp_path / scheme, sizes=sizes)
        cases[f"{architecture}/{scheme}"] = forged.folder
    config = {"tp_size": 4, "ep_size": 4} if experts else {"tp_size": 4}
    _check(on_ranks(4, run, cases, config, True, seconds=900), cases, 4)
