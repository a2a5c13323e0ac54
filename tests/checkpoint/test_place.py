"""What is named as a checkpoint and is none: one sentence that says what to give, in Python and on the command line alike."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from conftest import DATA
from typer.testing import CliRunner

import ctfp8_compile as ctfp8
from ctfp8_compile.cli.app import app

SHIPPED = DATA.parent.parent / "examples/models"


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`models/llama` and `models/moe` are checkpoints; files of several kinds, a folder without anything, one of many."""
    for name in ("llama", "moe"):
        (tmp_path / "models" / name).mkdir(parents=True)
        shutil.copy(SHIPPED / name / "config.json", tmp_path / "models" / name)
        os.link(SHIPPED / name / "model.safetensors", tmp_path / "models" / name / "model.safetensors")
    (tmp_path / "alone").mkdir()
    os.link(SHIPPED / "llama/model.safetensors", tmp_path / "alone/flux-fp8.safetensors")
    for name in ("model.pt2", "model.gguf", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    for i in range(9):
        (tmp_path / f"many/run-{i}").mkdir(parents=True)
        (tmp_path / f"many/run-{i}/config.json").write_text("{}")
        (tmp_path / f"many/run-{i}/model.safetensors").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


NOT_CHECKPOINTS = {
    "models/llama/model.safetensors": "is a file. Give its folder, models/llama.",
    "models/llama/config.json": "is a file. Give its folder, models/llama.",
    "alone/flux-fp8.safetensors": "ctfp8.load_state_dict(module, safetensors.torch.load_file(file), None).",
    "model.pt2": "is a file. An exported one is run by ctfp8 generate, and loaded by ctfp8.load.",
    "model.gguf": "is a file. A checkpoint is a folder with a config.json and safetensors files.",
    "notes.txt": "is a file. A checkpoint is a folder with a config.json and safetensors files.",
    "models": "is there. Give one of the checkpoints in it: models/llama, models/moe.",
    "many": "many/run-0, many/run-1, many/run-2, many/run-3, many/run-4 and 4 more.",
    "empty": "is there. Is this a checkpoint folder?",
    "./models/llam": "no such folder, and not a hub id, which is owner/name. Found there: models/llama.",
    "./models/x/y/z": "no such folder, and not a hub id, which is owner/name. Found there: models/llama, models/moe.",
    "./empty/llama": "no such folder, and not a hub id, which is owner/name.",
    "nowhere": "no such folder, and not a hub id, which is owner/name.",
    "/nowhere/at/all": "no such folder, and not a hub id, which is owner/name.",
}


@pytest.mark.parametrize("given", NOT_CHECKPOINTS)
def test_python_says_what_to_give(given: str, tree: Path) -> None:
    with pytest.raises(ctfp8.CheckpointError) as raised:
        ctfp8.from_pretrained(given)
    assert str(raised.value).endswith(NOT_CHECKPOINTS[given])
    assert str(raised.value).startswith(given.removeprefix("./")) or str(raised.value).startswith(given)


@pytest.mark.parametrize("given", NOT_CHECKPOINTS)
@pytest.mark.parametrize("command", ["inspect", "explain"])
def test_the_command_line_says_the_same(command: str, given: str, tree: Path) -> None:
    result = CliRunner().invoke(app, [command, given])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert " ".join(result.stderr.split()).endswith(NOT_CHECKPOINTS[given])
    assert not result.stdout


def test_a_name_like_a_hub_id_is_looked_for_there_first_and_then_beside(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of the HTTP library, which is no OSError, is a line, too."""

    class Unreachable(Exception):
        pass

    def fails(self: object, repository: str) -> None:
        raise Unreachable("no route to host\nmore")

    monkeypatch.setattr("huggingface_hub.HfApi.get_safetensors_metadata", fails)
    result = CliRunner().invoke(app, ["inspect", "models/llam"])
    assert result.exit_code == 1
    said = " ".join(result.stderr.split())
    assert said.startswith(
        "error: models/llam: no such folder, and the hub does not give its headers (no route to host)."
    )
    assert said.endswith("Found there: models/llama.")
