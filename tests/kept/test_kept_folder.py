"""The folder of kept graphs: who may read what, what goes when it is full, what a folder does that cannot be used."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import stat
from pathlib import Path

import pytest
from typer.testing import CliRunner

import ctfp8_compile as ctfp8
from ctfp8_compile.cli.app import app
from ctfp8_compile.kept import folder

MODEL, FACTS = "a" * 32, {"model": "Net", "of": "2 FP8 weights", "torch": "2.13.0", "made": 1.0}


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("CTFP8_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    folder._say_once.cache_clear()
    return tmp_path / "cache"


def files(place):
    return sorted(path for path in place.rglob("*") if path.is_file())


def test_what_was_kept_is_read(place):
    assert folder.read(MODEL, "one") is None
    assert folder.names(MODEL) == []
    assert folder.write(MODEL, "one", FACTS, b"first")
    assert folder.write(MODEL, "two", FACTS, b"second")
    assert folder.read(MODEL, "one") == b"first"
    assert sorted(folder.names(MODEL)) == ["one", "two"]
    assert folder.names("b" * 32) == []
    assert {entry.facts["model"] for entry in folder.entries()} == {"Net"}
    assert folder.clear()[0] == 2
    assert files(place) == []


def test_nobody_else_may_look(place):
    folder.write(MODEL, "one", FACTS, b"first")
    key = folder.key_file()
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert len(key.read_bytes()) == 32
    for path in files(place):
        assert not stat.S_IMODE(path.stat().st_mode) & 0o077
        assert key.read_bytes() not in path.read_bytes()


@pytest.mark.parametrize("spoil", [lambda key: key.chmod(0o644), lambda key: key.write_bytes(b"short")])
def test_a_key_that_others_may_know_is_not_used(place, spoil, caplog):
    folder.write(MODEL, "one", FACTS, b"first")
    spoil(folder.key_file())
    with caplog.at_level(logging.WARNING, "ctfp8_compile"):
        assert folder.read(MODEL, "one") is None
        assert not folder.write(MODEL, "two", FACTS, b"second")
    assert "delete it, and a new one is made" in caplog.text


def test_with_another_key_nothing_is_read_nor_lost(place, tmp_path, monkeypatch):
    """Two users of one folder."""
    folder.write(MODEL, "one", FACTS, b"first")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "another"))
    assert folder.names(MODEL) == []
    assert folder.entries() == []
    folder.write(MODEL, "one", FACTS, b"theirs")
    folder.clear()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    assert folder.read(MODEL, "one") == b"first"


def test_a_file_of_another_user_in_our_place_is_not_read(place, tmp_path, monkeypatch):
    folder.write(MODEL, "one", FACTS, b"first")
    (ours,) = files(place)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "another"))
    folder.write(MODEL, "one", FACTS, b"theirs")
    (theirs,) = set(files(place)) - {ours}
    ours.write_bytes(theirs.read_bytes())
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    assert folder.read(MODEL, "one") is None
    assert folder.entries() == []


@pytest.mark.parametrize("cut", range(0, 120, 7))
def test_a_torn_file_is_as_none(place, cut):
    folder.write(MODEL, "one", FACTS, b"first" * 9)
    (path,) = files(place)
    path.write_bytes(path.read_bytes()[:cut])
    assert folder.read(MODEL, "one") is None
    assert folder.entries() == []
    assert folder.write(MODEL, "one", FACTS, b"again")
    assert folder.read(MODEL, "one") == b"again"


def test_a_bit_anywhere_is_noticed(place):
    folder.write(MODEL, "one", FACTS, b"first")
    (path,) = files(place)
    data = path.read_bytes()
    for i in range(len(data)):
        path.write_bytes(data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :])
        assert folder.read(MODEL, "one") is None, i


def test_what_was_unused_for_longest_goes_first(place, monkeypatch):
    monkeypatch.setenv("CTFP8_CACHE_SIZE", "0.01")
    for i in range(4):
        folder.write(MODEL, f"{i}", FACTS, bytes(2000))
        os.utime(place / folder._name_of(folder._key()) / MODEL / f"{i}.kept", (i, i))
    folder.read(MODEL, "0")
    folder.write("b" * 32, "new", FACTS, bytes(2500))
    assert sorted(folder.names(MODEL)) == ["0", "2", "3"]
    assert not folder.write(MODEL, "large", FACTS, bytes(11_000))
    monkeypatch.setenv("CTFP8_CACHE_SIZE", "0")
    assert not folder.write(MODEL, "none", FACTS, b"x")
    assert sum(path.stat().st_size for path in files(place)) <= 10_000


def test_a_models_graphs_are_sixteen(place):
    for i in range(18):
        folder.write(MODEL, f"{i:02}", FACTS, b"x")
        os.utime(place / folder._name_of(folder._key()) / MODEL / f"{i:02}.kept", (i, i))
    folder.write(MODEL, "new", FACTS, b"x")
    assert sorted(folder.names(MODEL)) == [*(f"{i:02}" for i in range(3, 18)), "new"]


@pytest.mark.parametrize("size", ["much", "-1", "nan", "inf", ""])
def test_a_size_that_is_none(monkeypatch, size):
    monkeypatch.setenv("CTFP8_CACHE_SIZE", size)
    with pytest.raises(ctfp8.UsageError, match="CTFP8_CACHE_SIZE=.* is no size"):
        folder.limit()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CTFP8_CACHE_DIR", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING, "ctfp8_compile"):
        for name in ("one", "two"):
            assert not folder.write(MODEL, name, FACTS, b"first")
    assert len(caplog.records) == 1
    assert "CTFP8_CACHE_DIR names another folder" in caplog.text


def write_many(number):
    for i in range(20):
        folder.write(MODEL, f"{i % 5}", FACTS, f"{number}".encode() * 5000)
        found = folder.read(MODEL, f"{i % 5}")
        if found is None or len(found) != 5000 or len(set(found)) != 1:
            return f"{i}: {found if found is None else found[:20]}"
    return ""


def test_several_processes_write_and_read_at_once(place):
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert pool.map(write_many, range(4)) == [""] * 4
    assert not list(place.rglob(".*.tmp"))
    assert len(folder.entries()) == 5


def cli(*words):
    done = CliRunner().invoke(app, ["cache", *words])
    return done.exit_code, done.output


def test_list_and_clear(place):
    assert cli("list") == (0, f"0 graphs, 0.0 of 1024 MB, in {place}\n")
    folder.write(MODEL, "one", FACTS, b"first")
    code, text = cli("list")
    assert not code
    assert "Net" in text
    assert f"1 graph, 0.0 of 1024 MB, in {place}" in text
    about = json.loads(cli("list", "--json")[1])
    assert about["graphs"][0].items() >= FACTS.items()
    assert about["limit"] == 1024_000_000
    assert cli("clear")[1].startswith("cleared 1 graph")
    assert json.loads(cli("clear", "--json")[1])["cleared"] == 0


def test_where_nothing_is_kept(monkeypatch):
    monkeypatch.setenv("CTFP8_CACHE_DIR", "")
    assert folder.place() is None
    for word in ("list", "clear"):
        code, text = cli(word)
        assert code == 1
        assert "so no compiled graphs are kept" in text


def test_the_usual_place(monkeypatch):
    monkeypatch.delenv("CTFP8_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert folder.place() == Path("/somewhere/ctfp8")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(folder.sys, "platform", "linux")
    assert folder.place() == Path.home() / ".cache/ctfp8"
    monkeypatch.setattr(folder.sys, "platform", "darwin")
    assert folder.place() == Path.home() / "Library/Caches/ctfp8"
