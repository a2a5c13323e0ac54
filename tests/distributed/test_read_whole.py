"""Parameters of which each rank reads all and keeps a part: turned experts, packed values, parts that are stored in different ways."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DATA, logits, relative_error
from safetensors.torch import load_file, save_file
from support.mixed import mix
from support.ranks import on_ranks
from support.saved import differing
from transformers.distributed import DistributedConfig

import ctfp8_compile as ctfp8
from ctfp8_compile.ops import FP8

LLAMA, MOE = DATA / "llama/FP8_DYNAMIC", DATA / "qwen3moe/FP8_DYNAMIC"
#: Presets of compressed-tensors, by what they are given to: both ways that a plan cuts a weight, scales and zero points of rows,
#: of groups that a border cuts, and packed along the rows.
PACKED = {
    "int4": {"W4A16": r"re:.*layers\.1\.mlp\..*_proj$"},
    "int4, zero points": {"W4A16_ASYM": r"re:.*layers\.0\.(mlp|self_attn)\..*_proj$"},
    "int8": {"W8A16": r"re:.*(o_proj|q_proj)$"},
    "nvfp4 and int4": {"NVFP4A16": r"re:.*down_proj$", "W4A16": r"re:.*up_proj$"},
}


def plainly(source: Path, folder: Path, pattern: str) -> Path:
    """A copy in which the weights of a pattern are bfloat16."""
    shutil.copytree(source, folder)
    state = load_file(folder / "model.safetensors")
    for name in [name for name in state if re.search(pattern, name) and state[name].dtype == FP8]:
        state[name] = (state[name].float() * state.pop(f"{name}_scale")).bfloat16()
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


def one_turned_layer(source: Path, folder: Path) -> Path:
    """A copy with a second layer, whose experts are bfloat16: the same names, and nothing to turn."""
    shutil.copytree(source, folder)
    state, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    for name in [name for name in state if "layers.0." in name and not name.endswith("_scale")]:
        tensor = state[name]
        if tensor.dtype == FP8:
            scale = state[f"{name}_scale"]
            tensor = (tensor.float() * (scale.mT if name.endswith("experts.down_proj") else scale)).bfloat16()
        state[name.replace("layers.0.", "layers.1.")] = tensor.clone()
    config |= {"num_hidden_layers": 2, "moe_layers": [0, 1], "layer_types": config["layer_types"] * 2}
    config["no_rope_layers"] = config["no_rope_layers"] * 2
    config["quantization_config"]["modules_to_not_convert"] = ["model.layers.1"]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def run(
    folders: dict[str, Path], config: dict[str, Any], out: Path, compiled: bool
) -> dict[str, tuple[int, list[float]]]:
    """By name: how many weights of which this rank has a half were dequantized, and relative errors of logits against one process
    in float64. Saves each.
    """
    found = {}
    for name, folder in folders.items():
        spread = DistributedConfig(**config)
        want = logits(ctfp8.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager"))
        model = ctfp8.from_pretrained(folder, dtype=torch.float32, distributed_config=spread)
        cuts, errors = model.hf_quantizer.cuts, [relative_error(logits(model), want)]
        dequantized = cuts.keys() & {*model.hf_quantizer.packed, *model.hf_quantizer.mixed}
        assert all(2 * model.get_parameter(n).numel() == torch.Size(cuts[n][0]).numel() for n in dequantized)
        if name == compiled:
            torch._dynamo.reset()
            errors.append(relative_error(logits(torch.compile(model, backend="ctfp8", fullgraph=True)), want))
        same = ctfp8.from_pretrained(folder, distributed_config=spread)
        same.save_pretrained(out / name, max_shard_size="200KB")
        found[name] = (len(dequantized), errors)
    return found


def check(
    folders: dict[str, Path], halves: dict[str, int], config: dict[str, Any], out: Path, compiled: str = ""
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ranks = on_ranks(2, run, folders, config, out, compiled)
    for found in ranks:
        assert isinstance(found, dict), found
        assert {name: count for name, (count, _) in found.items()} == halves
        assert all(max(errors) < 1e-5 for _, errors in found.values()), found
    for name, folder in folders.items():
        assert differing(folder, out / name) == set(), name


def test_files_of_writers(tmp_path: Path) -> None:
    folders = {name: DATA / "writers" / name for name in ("hf-fbgemm-llama4", "modelopt-mixed-llama")}
    check(folders, {"hf-fbgemm-llama4": 0, "modelopt-mixed-llama": 3}, {"tp_size": 2}, tmp_path / "out")


@pytest.mark.long
def test_linears(tmp_path: Path) -> None:
    folders = {name: mix(LLAMA, tmp_path / name, presets).folder for name, presets in PACKED.items()}
    folders["turned"] = one_turned_layer(DATA / "writers/hf-fbgemm-llama4", tmp_path / "turned")
    halves = {"int4": 3, "int4, zero points": 7, "int8": 4, "nvfp4 and int4": 4, "turned": 0}
    check(folders, halves, {"tp_size": 2}, tmp_path / "out", compiled="nvfp4 and int4")


@pytest.mark.long
@pytest.mark.parametrize("config", [{"tp_size": 2}, {"tp_size": 2, "ep_size": 2}], ids=["tp", "ep"])
def test_experts(config: dict[str, int], tmp_path: Path) -> None:
    pattern = r"layers\.0\.mlp\.experts\."
    folders = {
        "int4 experts": mix(MOE, tmp_path / "int4", {"W4A16": r"re:.*layers\.1\.mlp\.experts\..*_proj$"}).folder,
        "some int4": mix(MOE, tmp_path / "some", {"W4A16": r"re:.*layers\.1\.mlp\.experts\.[12]\..*_proj$"}).folder,
        "some bf16": plainly(MOE, tmp_path / "bf16", pattern + r"1\..*_proj\.weight$"),
        "bf16 gates": plainly(MOE, tmp_path / "gates", pattern + r".*\.gate_proj\.weight$"),
    }
    halves = {"int4 experts": 2, "some int4": 2, "some bf16": 2, "bf16 gates": 1}
    check(folders, halves, config, tmp_path / "out", compiled="some int4")


@pytest.mark.long
def test_turned_experts_of_their_ranks(tmp_path: Path) -> None:
    """Of gpt-oss, whose gates and ups lie in turn."""
    folders = {"gptoss": DATA / "writers/modelopt-fp8-gptoss"}
    check(folders, {"gptoss": 0}, {"tp_size": 2, "ep_size": 2}, tmp_path / "out")
