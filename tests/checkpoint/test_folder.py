"""The index says which file a tensor is in: copies, strays, wrong and missing entries; `inspect` sees what a load reads."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from conftest import DATA, logits
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import ctfp8_compile as ctfp8
from ctfp8_compile.checkpoint.contents import look
from ctfp8_compile.checkpoint.files import Checkpoint
from ctfp8_compile.checkpoint.folder import of_folder
from ctfp8_compile.checkpoint.notes import Notes
from ctfp8_compile.checkpoint.source import same_bits
from ctfp8_compile.model.parametrization import quantized_parameters, stored_weight
from ctfp8_compile.ops import FP8

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"
UP = "model.layers.0.mlp.up_proj.weight"


def _first(name: str) -> bool:
    return ".layers.0." in name


def sharded(name: str, folder: Path, metadata=True) -> Path:
    """A checkpoint of tests/data in two files and an index."""
    state = load_file(DATA / name / "model.safetensors")
    folder.mkdir()
    (folder / "config.json").write_text((DATA / name / "config.json").read_text())
    for shard, first in zip(SHARDS, (True, False), strict=True):
        save_file({k: v for k, v in state.items() if _first(k) == first}, folder / shard, {"format": "pt"})
    where = {k: SHARDS[0] if _first(k) else SHARDS[1] for k in state}
    index = {"weight_map": where} | ({"metadata": {"total_size": 1}} if metadata is True else metadata)
    (folder / INDEX).write_text(json.dumps(index))
    return folder


def edit(folder: Path, change) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def add(folder: Path, shard: str, tensors) -> None:
    have = load_file(folder / shard) if (folder / shard).exists() else {}
    save_file({**have, **tensors}, folder / shard, {"format": "pt"})


def other(tensor: torch.Tensor) -> torch.Tensor:
    """Another value of the same shape and dtype."""
    values = torch.randn(tensor.shape).abs() * (0.01 if tensor.dtype != FP8 else 60)
    return values.to(tensor.dtype)


def _stale(folder, state):
    add(folder, SHARDS[1], {n: other(state[n]) for n in (UP, UP + "_scale")})


def _both_ways_of_one_file(folder, state):
    add(folder, "overlay.safetensors", {n: state[n] for n in (UP, UP + "_scale")})
    add(folder, SHARDS[0], {n: other(state[n]) for n in (UP, UP + "_scale")})
    edit(folder, lambda i: i["weight_map"].update(dict.fromkeys((UP, UP + "_scale"), "overlay.safetensors")))


def _overlay_that_sorts_first(folder, state):
    add(folder, "a.safetensors", {n: state[n] for n in (UP, UP + "_scale")})
    add(folder, SHARDS[0], {n: other(state[n]) for n in (UP, UP + "_scale")})
    edit(folder, lambda i: i["weight_map"].update(dict.fromkeys((UP, UP + "_scale"), "a.safetensors")))


def _strays(folder, state):
    strays = {n.replace("layers.0", "layers.7"): other(t) for n, t in state.items() if "layers.0" in n}
    add(folder, SHARDS[0], strays | {"model.layers.0.mlp.extra.weight": torch.ones(3, 3)})


def _not_anywhere(folder, state):
    edit(folder, lambda i: i["weight_map"].update({"model.layers.9.mlp.up_proj.weight_scale_inv": SHARDS[0]}))


def _a_file_that_is_not_needed(folder, state):
    edit(folder, lambda i: i["weight_map"].update({"mtp.0.up_proj.weight": "mtp.safetensors"}))


def _in_the_other_file(folder, state):
    edit(folder, lambda i: i["weight_map"].update({UP: SHARDS[1], "lm_head.weight": SHARDS[0]}))


def _scales_not_named(folder, state):
    edit(folder, lambda i: [i["weight_map"].pop(n) for n in list(i["weight_map"]) if n.endswith("_scale")])


def _parameters_not_named(folder, state):
    names = ("model.norm.weight", UP, UP + "_scale")
    edit(folder, lambda i: [i["weight_map"].pop(n, None) for n in names])


def _another_model(folder, state):
    save_file({n: other(t) for n, t in state.items()}, folder / "model.safetensors", {"format": "pt"})


def _a_file_that_is_none(folder, state):
    (folder / "consolidated.safetensors").write_bytes(b"not one")


EDITS = [
    _stale, _both_ways_of_one_file, _overlay_that_sorts_first, _strays, _not_anywhere, _a_file_that_is_not_needed, _in_the_other_file, _scales_not_named, _parameters_not_named,
    _another_model, _a_file_that_is_none,
]  # fmt: skip


@pytest.mark.parametrize("change", EDITS)
@pytest.mark.parametrize("name", ["llama/FP8_DYNAMIC", "qwen3moe/FP8_BLOCK"])
def test_the_index_decides(name, change, load, tmp_path):
    folder = sharded(name, tmp_path / "in")
    state = load_file(DATA / name / "model.safetensors")
    if "moe" in name:
        up = UP.replace("mlp.up_proj", "mlp.experts.1.up_proj")
        state |= {UP: state[up], UP + "_scale": state[up + "_scale"]}
        if change in (_stale, _both_ways_of_one_file, _overlay_that_sorts_first, _in_the_other_file):
            pytest.skip("of a dense layer")
    change(folder, state)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = ctfp8.from_pretrained(folder)
    assert torch.equal(logits(model), logits(load(name)))
    said = [str(w.message) for w in caught if "read as its files say" in str(w.message)]
    assert len(said) == (change not in (_scales_not_named, _a_file_that_is_none))
    seen = look(folder)
    assert {row.what for row in seen.rows if row.fp8} == {row.what for row in look(DATA / name).rows if row.fp8}
    assert bool(seen.notes) == bool(said)
    ctfp8.save_pretrained(model, tmp_path / "out")
    saved = load_file(tmp_path / "out" / "model.safetensors")
    kept = load_file(DATA / name / "model.safetensors")
    assert all(torch.equal(saved[n].view(torch.uint8), t.view(torch.uint8)) for n, t in kept.items())
    assert "transformers_weights" not in json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.parametrize("metadata", [{}, {"metadata": None}, {"metadata": []}, {"metadata": {}}])
def test_an_index_without_metadata(metadata, load, tmp_path):
    folder = sharded("llama/FP8_DYNAMIC", tmp_path / "in", metadata)
    assert torch.equal(logits(ctfp8.from_pretrained(folder)), logits(load("llama/FP8_DYNAMIC")))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda f, s: edit(f, lambda i: i.update(weight_map=[])), "not a safetensors index"),
        (lambda f, s: edit(f, lambda i: i["weight_map"].update(x="../x.safetensors")), "leaves the checkpoint's folder"),
        (lambda f, s: edit(f, lambda i: i["weight_map"].update({UP: "absent.safetensors"})) or _drop(f, UP), "absent.safetensors, which is missing, and the model needs .*up_proj.weight"),
        (lambda f, s: _norm_in_two(f, s), "model.norm.weight is in .* and .*does not name it. Add it to the index"),
        (lambda f, s: (_stale(f, s), add(f, SHARDS[0], {"lm_head.weight": s["lm_head.weight"]})), "and the other way round, such as .*(up_proj|lm_head).weight"),
        (lambda f, s: (_stale(f, s), _three(f, s)), "but it is in .* and .*Correct the index"),
    ],
)  # fmt: skip
def test_what_an_index_cannot_say(change, sentence, tmp_path):
    folder = sharded("llama/FP8_DYNAMIC", tmp_path / "in")
    change(folder, load_file(DATA / "llama/FP8_DYNAMIC/model.safetensors"))
    with pytest.raises(ctfp8.CheckpointError, match=sentence):
        ctfp8.from_pretrained(folder)


def _drop(folder, name):
    state = load_file(folder / SHARDS[0])
    del state[name]
    save_file(state, folder / SHARDS[0], {"format": "pt"})


def _norm_in_two(folder, state):
    add(folder, SHARDS[0], {"model.norm.weight": state["model.norm.weight"]})
    edit(folder, lambda i: i["weight_map"].pop("model.norm.weight"))


def _three(folder, state):
    add(folder, "a.safetensors", {"model.norm.weight": state["model.norm.weight"]})
    edit(folder, lambda i: i["weight_map"].update({UP: "a.safetensors", "model.norm.weight": "a.safetensors"}))


def test_two_files_without_an_index(tmp_path):
    folder = sharded("llama/FP8_DYNAMIC", tmp_path / "in")
    _stale(folder, load_file(DATA / "llama/FP8_DYNAMIC/model.safetensors"))
    with pytest.raises(ctfp8.CheckpointError, match="is in both .* and there is no .*index.json that says which"):
        Checkpoint([folder / shard for shard in SHARDS])


NAMES, FILES = [f"w{i}" for i in range(5)], ["a.safetensors", "b.safetensors", "c.safetensors"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    headers=st.fixed_dictionaries({file: st.sets(st.sampled_from(NAMES), min_size=1) for file in FILES}),
    index=st.dictionaries(st.sampled_from(NAMES), st.sampled_from(FILES), min_size=1),
)
def test_headers_against_indexes(headers, index, tmp_path_factory):
    """Each tensor is read from the file that the index names, or the only one that has it; and the last copy is that one."""
    folder = tmp_path_factory.mktemp("headers")
    for file, names in headers.items():
        save_file({name: torch.full((2,), float(FILES.index(file))) for name in names}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    used = sorted(set(index.values()))
    holders = {name: [file for file in used if name in headers[file]] for name in NAMES}
    notes = Notes()
    try:
        found = of_folder(folder, notes)
    except ctfp8.CheckpointError as error:
        wrong = [n for n, f in index.items() if f not in holders[n] and len(holders[n]) > 1]
        crossed = any(
            set(holders[m]) & {index[n]} and set(holders[n]) & {index[m]}
            for m in index
            for n in index
            if index[m] != index[n]
        )
        assert wrong if "Correct the index" in str(error) else crossed or len(used) == 3  # noqa: PT017
        return
    tensors = found.open()
    want = {n: f if f in holders[n] else holders[n][0] for n, f in index.items() if holders[n]}
    assert {name: info.file.name for name, info in tensors.items()} == want
    assert all(tensors.read([n])[n][0] == FILES.index(f) for n, f in want.items())
    last = {name: file.name for file in found.files for name in Checkpoint([file])}  # as transformers reads them
    assert {n: f for n, f in last.items() if n in want} == want
    assert set(found.stale) == {n for n in NAMES if holders[n] and n not in index}


def one_layer() -> tuple[dict[str, torch.Tensor], str]:
    """The tensors of a small model, and its config."""
    config = json.loads((DATA / "llama/FP8_DYNAMIC/config.json").read_text()) | {"num_hidden_layers": 1}
    state = load_file(DATA / "llama/FP8_DYNAMIC/model.safetensors")
    return {name: tensor for name, tensor in state.items() if ".layers.1." not in name}, json.dumps(config)


STATE, CONFIG = one_layer()
GONE = "gone.safetensors"
#: What may be wrong with a tensor, and with which file: a copy of another value in it; the index says that it is there; the index does
#: not name it; no file has it; the index names a tensor that no model has.
FAULTS = st.tuples(st.sampled_from(["copy", "says", "unnamed", "lost", "ghost"]), st.sampled_from(sorted(STATE)),
                   st.sampled_from([*FILES, GONE]))  # fmt: skip


def owner(name: str, index: dict[str, str], held: dict[str, dict[str, torch.Tensor]]) -> str | None:
    """Which file's tensor is the right one; None: nobody can say, or none has it. Written down from docs, not from our code."""
    read = [file for file in sorted(set(index.values())) if file in held]
    holders = [file for file in read if name in held[file]]
    if index.get(name) in holders:
        return index[name]
    if name not in index and name.endswith("_scale"):  # beside its weight
        weight = owner(name.removesuffix("_scale"), index, held)
        return weight if weight in holders else None
    return holders[0] if len(holders) == 1 else None


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    homes=st.lists(st.sampled_from(FILES), min_size=len(STATE), max_size=len(STATE)),
    faults=st.lists(FAULTS, max_size=3),
)
@example(  # each of two files has a copy of what the other one is asked for
    homes=[FILES[i % 2] for i in range(len(STATE))],
    faults=[("copy", name, FILES[1 - i % 2]) for i, name in enumerate(STATE)],
)
def test_a_model_of_headers_and_indexes(homes, faults, tmp_path_factory):
    """The right bits of each tensor, or an error that names one that is not right; what nothing is wrong with loads."""
    index = dict(zip(STATE, homes, strict=True))
    held = {file: {n: STATE[n] for n, home in index.items() if home == file} for file in FILES}
    for kind, name, file in faults:
        if kind == "copy" and file != GONE and name not in held[file]:
            held[file][name] = other(STATE[name])
        elif kind == "says":
            index[name] = file
        elif kind == "unnamed":
            index.pop(name, None)
        elif kind == "lost":
            for tensors in held.values():
                tensors.pop(name, None)
        elif kind == "ghost":
            index[f"ghost.{name}"] = file
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(CONFIG)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    for file, tensors in held.items():
        save_file(tensors, folder / file, {"format": "pt"})
    owners = {name: owner(name, index, held) for name in STATE}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = ctfp8.from_pretrained(folder)
    except ctfp8.Ctfp8Error as error:
        wrong = {name for _, name, _ in faults}
        assert any(name in str(error) for name in wrong), (error, faults)  # noqa: PT017
        return
    loaded = dict(model.state_dict())
    for name, module, how in quantized_parameters(model):
        loaded[name], loaded[f"{name}_scale"] = stored_weight(module, "weight"), how.weight_scale
    for name, file in owners.items():
        assert file is not None, (name, faults)
        want = held[file][name]
        assert same_bits(loaded[name], want.to(loaded[name].dtype)), (name, file, faults)
