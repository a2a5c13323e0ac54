"""Files made to run code when they are loaded: each ran it before; nothing of them runs now (docs/security.md)."""

from __future__ import annotations

import json
import os
import struct
import sys
import threading
import zipfile

import pytest
import torch
from conftest import fp8_config, quantize
from support.hostile import Touch, edited, edited_json, pickled, records_of, two_directories
from torch import nn

import ctfp8_compile as ctfp8
from ctfp8_compile.aot import archive
from ctfp8_compile.aot import instantiate as loading

WEIGHTS = "data/weights/model_weights_config.json"
X = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A Linear that returns a dict, in a file."""
    torch.manual_seed(0)

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(64, 32)

        def forward(self, x):
            return {"out": self.linear(x).relu()}

    weight, scale = quantize(torch.randn(32, 64))
    state = {"linear.weight": weight, "linear.weight_scale": scale, "linear.bias": torch.randn(32)}
    path = tmp_path_factory.mktemp("hostile") / "m.pt2"
    ctfp8.export(ctfp8.load_state_dict(Layer(), state, fp8_config()), (X,), path=path)
    return path


def _pickled_weight(content):
    next(iter(content["config"].values()))["use_pickle"] = True


def _evil(file, mark):
    """Records of `file` in which a weight is pickled, and unpickling it creates `mark`."""
    changed = edited(file, mark.with_suffix(".tmp"),
                     {WEIGHTS: edited_json(_pickled_weight), "data/weights/weight_0": pickled(Touch(mark))})  # fmt: skip
    return dict(records_of(changed))


def test_two_central_directories(file, tmp_path):
    """Python's zipfile saw a file without pickles, torch's reader one with."""
    mark, path = tmp_path / "mark", tmp_path / "m.pt2"
    honest = records_of(file)
    other = {name: data for name, data in _evil(file, mark).items() if dict(honest)[name] != data}
    path.write_bytes(two_directories(honest, other))
    with zipfile.ZipFile(path) as archive:
        assert [(name, archive.read(name)) for name in archive.namelist()] == honest
    with pytest.raises(ctfp8.ArtifactError, match="two central directories"):
        ctfp8.load(path)
    assert not mark.exists()


MODULE = "open({mark!r}, 'w').close()\nimport enum\nclass Kind(enum.Enum):\n    A = 1\n"


@pytest.mark.parametrize("which", ["in_spec", "out_spec"])
@pytest.mark.parametrize("key", ['"__enum__"', r'"\u005f_enum__"'])
def test_an_enum_in_the_call(file, tmp_path, monkeypatch, which, key):
    """torch imports the module that an enum names, however the JSON spells the key."""
    mark = tmp_path / "mark"
    (tmp_path / "evil_module.py").write_text(MODULE.format(mark=str(mark)))
    monkeypatch.syspath_prepend(tmp_path)

    def change(content):
        call = content["graph_module"]["module_call_graph"][0]["signature"]
        context = f'[{{{key}: true, "fqn": "evil_module:Kind", "name": "A"}}]'
        spec = json.loads(call[which])
        (spec[1] if which == "out_spec" else spec[1]["children_spec"][1]).update(
            type="builtins.dict", context=context, children_spec=[{"type": None, "context": None, "children_spec": []}]
        )
        call[which] = json.dumps(spec)

    with pytest.raises(ctfp8.ArtifactError, match="a dict of"):
        ctfp8.load(edited(file, tmp_path / "m.pt2", {"models/model.json": edited_json(change)}))
    assert not mark.exists()
    assert "evil_module" not in sys.modules


@pytest.mark.parametrize("moment", ["read_manifest", "check_records", "read_program"])
def test_a_file_replaced_while_it_is_loaded(file, tmp_path, monkeypatch, moment):
    """Whatever lies at the path after the file was opened is not read."""
    mark, path, evil = tmp_path / "mark", tmp_path / "m.pt2", tmp_path / "evil.pt2"
    path.write_bytes(file.read_bytes())
    with zipfile.ZipFile(evil, "w") as archive:
        for name, data in _evil(file, mark).items():
            archive.writestr(name, data)
    step = getattr(loading, moment)

    def swap(*args):
        evil.replace(path)
        return step(*args)

    monkeypatch.setattr(loading, moment, swap)
    want = torch.export.load(file).module()(X)["out"]
    torch.testing.assert_close(ctfp8.load(path)(X).out, want, atol=0.02, rtol=0.02)
    assert not mark.exists()


@pytest.mark.parametrize("named", [True, False])
def test_a_file_replaced_before_it_gets_a_name(file, tmp_path, monkeypatch, named):
    """A loader that opens a file by its name gets the one that was opened, also where a system does not name open files."""
    path, kept = tmp_path / "m.pt2", file.read_bytes()
    path.write_bytes(kept)
    with archive.open_archive(path) as opened:
        (tmp_path / "other").write_bytes(b"other")
        (tmp_path / "other").replace(path)
        if not named:
            monkeypatch.setattr(archive.Path, "exists", lambda self: False)
        with opened.as_file() as name, open(name, "rb") as again:
            assert again.read() == kept


def test_what_is_read_ahead_is_checked(file, tmp_path, monkeypatch):
    """Large records are read by another thread; what it finds is said, and what is left of it does not outlast the file."""
    monkeypatch.setattr(archive, "_LARGE", 1)
    torch.testing.assert_close(
        ctfp8.load(file)(X).out, torch.export.load(file).module()(X)["out"], atol=0.02, rtol=0.02
    )
    path = tmp_path / "m.pt2"
    with zipfile.ZipFile(file) as zipped:
        contents = next(zipped.read(record) for record in zipped.infolist() if record.filename.endswith("weight_0"))
    data = bytearray(file.read_bytes())
    data[data.index(contents)] ^= 1
    path.write_bytes(data)
    before = threading.active_count()
    with pytest.raises(ctfp8.ArtifactError, match="weight_0 is damaged"):
        ctfp8.load(path)
    assert threading.active_count() == before


def _directory(offset, to, of=b"PK\1\2"):
    """Writes over the first entry of the central directory, or of the record that `of` starts."""

    def change(data):
        start = data.index(of) + offset
        return data[:start] + to + data[start + len(to) :]

    return change


LAYOUTS = {
    "bytes before": lambda data: b"#!/bin/sh\n" + data,
    "bytes after": lambda data: data + b"\0",
    "a comment": lambda data: data[:-2] + struct.pack("<H", 3) + b"abc",
    "a size beyond the file": _directory(20, struct.pack("<2I", 2**31, 2**31)),
    "another size": _directory(20, struct.pack("<2I", 8, 8)),
    "another name": _directory(50, b"Z"),
    "another offset": _directory(42, struct.pack("<I", 64)),
    "another checksum": _directory(16, b"abcd"),
    "encrypted": _directory(8, b"\1\0"),
    "compressed": _directory(10, b"\x08\0"),
    "an unknown extra field": _directory(30 + len("m/data/weights/weight_0"), b"up", of=b"PK\3\4"),
    "more records than there are": lambda data: data[:-14] + struct.pack("<2H", 60000, 60000) + data[-10:],
    "a directory of 2 GiB": lambda data: data[:-10] + struct.pack("<I", 2**31) + data[-6:],
    "zip64 sizes that differ": _directory(40, struct.pack("<Q", 2**40), of=b"PK\6\6"),
}


@pytest.mark.parametrize("how", LAYOUTS)
def test_a_layout_that_readers_could_differ_on(file, tmp_path, how):
    path = tmp_path / "m.pt2"
    path.write_bytes(LAYOUTS[how](file.read_bytes()))
    with pytest.raises(ctfp8.ArtifactError, match="truncated or damaged"):
        ctfp8.load(path)


def test_other_ways_to_write_a_zip_file(file, tmp_path):
    """Deflated is refused; names that differ by case are, which some file systems would make one; stored anew is fine."""
    stored = edited(file, tmp_path / "stored.pt2", {})
    assert torch.equal(ctfp8.load(stored)(X).out, ctfp8.load(file)(X).out)
    with zipfile.ZipFile(tmp_path / "deflated.pt2", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in records_of(file):
            archive.writestr(name, data)
    with pytest.raises(ctfp8.ArtifactError, match="compressed"):
        ctfp8.load(tmp_path / "deflated.pt2")
    again = edited(file, tmp_path / "case.pt2", {"models/MODEL.json": lambda _: b"{}"})
    with pytest.raises(ctfp8.ArtifactError, match="is there twice"):
        ctfp8.load(again)
    with pytest.raises(ctfp8.ArtifactError, match="a key is there twice"):
        ctfp8.load(edited(file, again, {WEIGHTS: lambda data: data[:-1] + b', "config": {}}'}))


def _meta(**fields):
    def change(content):
        next(p for p in content["config"].values() if len(p["tensor_meta"]["sizes"]) == 2)["tensor_meta"].update(fields)

    return {WEIGHTS: edited_json(change)}


def _ints(*numbers):
    return [{"as_int": n} for n in numbers]


TENSORS = {
    "more rows than bytes": (_meta(sizes=_ints(33, 64)), "reaches beyond"),
    "strides past the end": (_meta(strides=_ints(65, 1)), "reaches beyond"),
    "a stride backwards": (_meta(strides=_ints(-64, 1)), "of -64"),
    "an offset past the end": (_meta(storage_offset={"as_int": 1}), "reaches beyond"),
    "an offset before the start": (_meta(storage_offset={"as_int": -1}), "of -1"),
    "as many elements as memory has not": (_meta(sizes=_ints(2**40, 2**40), strides=_ints(0, 0)), "reaches beyond"),
    "a size that is none": (_meta(sizes=[{"as_int": True}, {"as_int": 64}]), "is True, no int"),
    "another dtype": (_meta(dtype=1), "which the graph does not say"),
    "a dtype that is none": (_meta(dtype=99), "is 99, no ScalarType"),
    "sparse": (_meta(layout=1), "not strided"),
    "on a device of no kind": (_meta(device={"type": "cuda", "index": 0}), "which it was not made for"),
    "symbolic": (_meta(sizes=[{"as_expr": {"expr_str": "Symbol('s0')", "hint": None}}, {"as_int": 64}]), "symbolic size"),
}  # fmt: skip


@pytest.mark.parametrize("how", TENSORS)
def test_a_tensor_that_its_bytes_do_not_hold(file, tmp_path, how):
    changes, sentence = TENSORS[how]
    with pytest.raises(ctfp8.ArtifactError, match=sentence):
        ctfp8.load(edited(file, tmp_path / "m.pt2", changes))


def _graph(change):
    return {"models/model.json": edited_json(lambda content: change(content["graph_module"], content))}


def _first_input(value):
    return _graph(lambda module, _: module["graph"]["nodes"][-1]["inputs"][0].update(arg=value))


GRAPHS = {
    "another tensor": (_first_input({"as_tensor": {"name": "nothing"}}), "torch cannot read its graph"),
    "a function": (_first_input({"as_operator": "torch.load"}), "passes functions or objects"),
    "an object": (_first_input({"as_custom_obj": {"name": "x", "class_fqn": "os.system"}}), "passes functions or objects"),
    "two arguments in one": (_first_input({"as_int": 1, "as_none": True}), "is 2 of the kinds"),
    "an argument of no kind": (_first_input({"as_python": "1"}), "adds 'as_python'"),
    "an operator that writes": (_graph(lambda m, _: m["graph"]["nodes"][-1].update(target="torch.ops.aten.relu_.default")),
                                "which ctfp8 does not load"),
    "an operator that prints": (_graph(lambda m, _: m["graph"]["nodes"][-1].update(target="torch.ops.aten._print.default")),
                                "which ctfp8 does not load"),
    "an input called torch": (_graph(lambda m, _: m["module_call_graph"][0]["signature"].update(forward_arg_names=["torch"])),
                              "for a name"),
    "a field of another version": (_graph(lambda m, content: content.update(python="1")), "adds 'python'"),
    "another format": (_graph(lambda m, content: content.update(verifiers=["EDGE"])), "names the verifiers"),
    "a power that never ends": (_graph(lambda m, _: m["graph"]["sym_int_values"].update(s={"as_expr": {
        "expr_str": "Pow(Integer(9), Integer(999999999))", "hint": None}})), "that is no arithmetic"),
    "a parameter that is part of Python": (_graph(lambda m, _: m["signature"]["input_specs"][0]["parameter"].update(
        parameter_name="__class__.weight")), "which no module could have"),
}  # fmt: skip


@pytest.mark.parametrize("how", GRAPHS)
def test_a_graph_that_is_not_on_the_closed_list(file, tmp_path, how):
    changes, sentence = GRAPHS[how]
    with pytest.raises(ctfp8.ArtifactError, match=sentence):
        ctfp8.load(edited(file, tmp_path / "m.pt2", changes))


def test_a_pipe_is_no_artifact(tmp_path):
    os.mkfifo(tmp_path / "m.pt2")
    with pytest.raises(ctfp8.ArtifactError, match="no such file"):
        ctfp8.load(tmp_path / "m.pt2")
