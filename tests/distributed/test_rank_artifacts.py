"""Each rank exports a file of its own, which runs in a fresh process of that rank, without transformers, and in no other."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DATA, IDS, logits
from support.hostile import edited, edited_json
from support.ranks import on_ranks
from torch import fx, nn
from transformers.distributed import DistributedConfig

import ctfp8_compile as ctfp8
from ctfp8_compile.aot.ranks import Ranks, bind

PROMPT, NEW, LENGTH = IDS[:1, :7], 6, 32


def export(folder: Path, out: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Writes a graph; returns what this rank knows of it."""
    rank = int(os.environ["RANK"])
    model = ctfp8.from_pretrained(folder, dtype=torch.float32, distributed_config=DistributedConfig(**config))
    call: Any = (IDS,), {"use_cache": False}
    refused = ""
    try:
        ctfp8.export(model, *call, path=out / "same.pt2")
    except ctfp8.UsageError as error:
        refused = str(error)
    ctfp8.export(model, *call, path=out / f"m-{rank}.pt2")
    torch.save(logits(model), out / f"want-{rank}.pt")
    with zipfile.ZipFile(out / f"m-{rank}.pt2") as file:
        weights = sum(info.file_size for info in file.infolist() if "/weight_" in info.filename)
    return {
        "refused": refused,
        "weights": weights == sum(t.nbytes for t in {id(t): t for t in model.state_dict().values()}.values()),
    }


def export_decoder(folder: Path, out: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Also a decoder with its cache, lowered graphs and a report."""
    found = export(folder, out, config)
    rank = int(os.environ["RANK"])
    model = ctfp8.from_pretrained(folder, dtype=torch.float32, distributed_config=DistributedConfig(**config))
    decoder = ctfp8.StaticCacheDecoder(model, 1, LENGTH)
    shapes = ({1: torch.export.Dim("tokens", max=LENGTH)}, None)
    ctfp8.export(decoder, (PROMPT, torch.tensor(0)), path=out / f"d-{rank}.pt2", dynamic_shapes=shapes)
    one = ctfp8.from_pretrained(folder, dtype=torch.float32)
    torch.save(one.generate(PROMPT, max_new_tokens=NEW, do_sample=False), out / f"tokens-{rank}.pt")
    call: Any = (IDS,), {"use_cache": False}
    lowered = ctfp8.lower(model, *call, target="cuda:sm90").graph
    return found | {
        "collectives": [str(n.target) for n in lowered.nodes if "_c10d_functional.all" in str(n.target)],
        "markers": [str(n.target) for n in lowered.nodes if "ctfp8.dequantize" in str(n.target)],
        "report": str(ctfp8.explain(model, *call, target="cuda:sm90")),
    }


RUN = """
import os, sys
import torch, torch.distributed as dist
import ctfp8_compile as ctfp8
folder, rank, new = sys.argv[1], int(os.environ["RANK"]), int(sys.argv[2])
want = torch.load(f"{folder}/want-{rank}.pt")
with torch.no_grad():
    got = ctfp8.load(f"{folder}/m-{rank}.pt2")(torch.arange(5, 45).reshape(2, 20)).logits
    error = ((got.double() - want.double()).norm() / want.double().norm()).item()
    assert error <= 1e-6, error
    if os.path.exists(f"{folder}/d-{rank}.pt2"):
        tokens = torch.load(f"{folder}/tokens-{rank}.pt")
        decoder, text = ctfp8.load(f"{folder}/d-{rank}.pt2"), tokens[:, : tokens.shape[1] - new]
        step = text
        while text.shape[1] < tokens.shape[1]:
            step = decoder(step, torch.tensor(text.shape[1] - step.shape[1]))[:, -1:].argmax(-1)
            text = torch.cat([text, step], 1)
        assert torch.equal(text, tokens), (text, tokens)
try:
    ctfp8.load(f"{folder}/m-{1 - rank}.pt2")
except ctfp8.Ctfp8Error as error:
    assert f"is for rank {1 - rank} of 2, and this process is rank {rank} of 2" in str(error), error
else:
    raise AssertionError("another rank's file was loaded")
assert "transformers" not in sys.modules
dist.destroy_process_group()
os.write(1, f"fine {rank}\\n".encode())  # at once: the other rank writes to the same place
"""


def _check(write: Any, name: str, config: dict[str, Any], out: Path) -> list[Any]:
    found = on_ranks(2, write, DATA / name, out, config)
    for of in found:
        assert isinstance(of, dict), of
        assert "each rank writes a file of its own" in of["refused"]
        assert not (out / "same.pt2").exists()
        assert of["weights"], "the file holds other bytes than this rank's weights"
    (out / "run.py").write_text(RUN)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = subprocess.run([*start, str(out / "run.py"), str(out), str(NEW)], capture_output=True, text=True,
                         env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert sorted(run.stdout.splitlines()) == ["fine 0", "fine 1"]
    return found


@pytest.mark.long
def test_a_file_of_each_rank_runs_in_a_fresh_process(tmp_path):
    _check(export, "llama/FP8_BLOCK", {"tp_size": 2}, tmp_path)
    with pytest.raises(
        ctfp8.RankError, match="is for rank 1 of 2, and this is a process on its own. Start 2 with torchrun"
    ):
        ctfp8.load(tmp_path / "m-1.pt2")


@pytest.mark.ci("mixtral/FP8_BLOCK-True")
@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "experts"), [("llama/FP8", False), ("mixtral/FP8_BLOCK", False), ("mixtral/FP8_BLOCK", True)]
)
def test_a_decoder_a_lowered_graph_and_a_report(name, experts, tmp_path):
    first, second = _check(export_decoder, name, {"tp_size": 2} | ({"ep_size": 2} if experts else {}), tmp_path)
    assert first["collectives"] == second["collectives"] != []
    assert not first["markers"]
    assert "[1/2 of the columns]" in first["report"]
    cut = "1/2 of the rows; the border cuts its blocks of 128×128 to 64×128, ep_size keeps them whole"
    assert (cut in first["report"]) is (name == "mixtral/FP8_BLOCK" and not experts)
    assert ("1/2 of the matrices" in first["report"]) is experts


def _collective(group: Any = "0", op: str = "sum", name: str = "all_reduce") -> fx.Graph:
    graph = fx.Graph()
    x = graph.placeholder("x")
    rest = (op, group) if name == "all_reduce" else (2, group)
    graph.output(graph.call_function(getattr(torch.ops._c10d_functional, name).default, (x, *rest)))
    return graph


@pytest.mark.parametrize(
    ("graph", "ranks", "message"),
    [
        (_collective(), None, "in a way that its manifest does not say"),
        (_collective(group="1"), Ranks(2, 0, {"0": (0, 1)}), "in a way that its manifest does not say"),
        (_collective(group=7), Ranks(2, 0, {"0": (0, 1)}), "in a way that its manifest does not say"),
        (_collective(op="max"), Ranks(2, 0, {"0": (0, 1)}), "in a way that its manifest does not say"),
        (_collective(name="all_gather_into_tensor"), Ranks(3, 0, {"0": (0, 1, 2)}), "counts other ranks"),
        (_collective(), Ranks(2, 0, {"0": (0, 1), "1": (0,)}), "names process groups that its graph does not"),
    ],
)
def test_a_graph_that_says_other_than_its_manifest(graph, ranks, message):
    with pytest.raises(ctfp8.ArtifactError, match=message):
        bind(graph, ranks)


@pytest.mark.parametrize(
    "ranks",
    [
        {"world": 2, "rank": 2, "groups": {"0": [0, 1]}},
        {"world": 2, "rank": 0, "groups": {"0": [0, 2]}},
        {"world": 2, "rank": 0, "groups": {"0": [1]}},
        {"world": 2, "rank": 0, "groups": {"0": [0, 0]}},
        {"world": 2, "rank": 0, "groups": {}},
    ],
)
def test_a_manifest_whose_ranks_cannot_be(ranks, tmp_path):
    ctfp8.export(nn.Linear(4, 4), (torch.zeros(2, 4),), path=tmp_path / "m.pt2")
    change = {"extra/ctfp8.json": edited_json(lambda manifest: manifest.update(ranks=ranks))}
    with pytest.raises(ctfp8.ArtifactError, match="with groups that these cannot form"):
        ctfp8.load(edited(tmp_path / "m.pt2", tmp_path / "edited.pt2", change))
