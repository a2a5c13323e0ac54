"""`ctfp8 export CKPT m.onnx | m.xml`: what the command writes runs, and what it cannot be asked is said."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import DATA, IDS
from support.runtimes import compiled, session
from typer.testing import CliRunner

import ctfp8_compile as ctfp8
from ctfp8_compile.cli.app import app


def command(*arguments, code=0):
    result = CliRunner().invoke(app, ["export", *map(str, arguments)], env={"COLUMNS": "100"})
    assert result.exit_code == code, result.output
    return result


@pytest.mark.long
@pytest.mark.parametrize("options", [["model.onnx"], ["openvino_model.xml", "--stateless"]], ids=["onnx", "xml"])
def test_what_it_writes_runs(options, tmp_path):
    """And what lies beside it says what is in it; the programs that read it are not installed here (docs/export.md)."""
    checkpoint, file = DATA / "llama/FP8", tmp_path / "new" / options[0]
    said = json.loads(command(checkpoint, file, *options[1:], "--folder", "--json").stdout)
    beside = file.parent / ("model.onnx.data" if file.suffix == ".onnx" else "openvino_model.bin")
    assert said["bytes"] == file.stat().st_size + beside.stat().st_size
    assert (said["path"], said["weights"], said["dtype"]) == (str(file), 14, "float32")
    model = ctfp8.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        want = model(IDS).logits.numpy()
    config = model.config
    kept = json.loads((file.parent / "config.json").read_text())
    assert (kept["model_type"], kept["architectures"], kept["dtype"]) == ("llama", ["LlamaForCausalLM"], "float32")
    assert "quantization_config" not in kept
    assert (file.parent / "generation_config.json").is_file()
    if file.suffix == ".onnx":
        _names_are_the_files(json.loads((file.parent / "genai_config.json").read_text())["model"], said, config)
    nothing = np.zeros((2, config.num_key_value_heads, 0, config.head_dim), np.float32)
    feed = {name: nothing for name in said["inputs"] if name.startswith("past_key_values.")}
    mask = np.ones(IDS.shape, np.int64)
    feed |= {"input_ids": IDS.numpy(), "attention_mask": mask, "position_ids": mask.cumsum(1) - 1}
    got = session(file).run(["logits"], feed)[0] if file.suffix == ".onnx" else compiled(file)(feed)["logits"]
    assert np.abs(got - want).max() < 1e-4


def _names_are_the_files(genai, said, config):
    decoder = genai["decoder"]
    assert (decoder["filename"], genai["type"], genai["vocab_size"]) == ("model.onnx", "decoder", config.vocab_size)
    sizes = (decoder["num_hidden_layers"], decoder["num_key_value_heads"], decoder["head_size"])
    assert sizes == (config.num_hidden_layers, config.num_key_value_heads, config.head_dim)
    for ports in ("inputs", "outputs"):
        plain = [name for name in decoder[ports].values() if "%d" not in name]
        numbered = [name % i for name in decoder[ports].values() if "%d" in name for i in range(sizes[0])]
        assert sorted(plain + numbered) == sorted(said[ports])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["m.onnx", "--target", "cuda:sm90"], "--target is for .pt2 files"),
        (["m.xml", "--cache", "64"], "--cache is for .pt2 files"),
        (["m.onnx", "--stateless"], "--stateless is for .xml files"),
        (["m.pt2", "--dtype", "float16"], "--dtype is for .onnx and .xml files"),
        (["m.pt2", "--quantize-activations"], "--quantize-activations is for .onnx and .xml files"),
        (["m.onnx", "--folder"], "other programs look for model.onnx in a folder. Write"),
        (["no/m.onnx"], "does not exist. Make it first."),
    ],
)
def test_what_it_cannot_be_asked(arguments, sentence, tmp_path):
    error = command(DATA / "llama/FP8", tmp_path / arguments[0], *arguments[1:], code=1).stderr
    assert sentence in " ".join(error.split())


def test_a_folder_is_not_the_checkpoints_own(tmp_path):
    shutil.copytree(DATA / "llama/FP8", tmp_path / "ckpt")
    error = command(tmp_path / "ckpt", tmp_path / "ckpt/model.onnx", "--folder", code=1).stderr
    assert "--folder writes a config.json, and that folder has the checkpoint's" in " ".join(error.split())
