"""Files that mix FP8 with INT8, packed INT4 and NVFP4: the others are what compressed-tensors dequantizes them to."""

from __future__ import annotations

import json
import shutil
import warnings

import pytest
import torch
from conftest import DATA, IDS, assert_same_bits, logits, relative_error
from safetensors.torch import load_file, save_file
from support.forge import forge
from support.fresh import run_fresh
from support.mixed import mix
from torch import nn
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import ctfp8_compile as ctfp8
from ctfp8_compile.checkpoint.contents import look
from ctfp8_compile.cli.app import app
from ctfp8_compile.model.parametrization import quantized_parameters

MLP, DOWN = r"re:.*mlp\.(gate|up|down)_proj$", r"re:.*down_proj$"
EXPERTS, GATES = r"re:.*experts\.\d+\.(gate|up|down)_proj$", r"re:.*experts\.\d+\.(gate|up)_proj$"


def _load(mixed, **kwargs):
    with pytest.warns(UserWarning, match=r"weights, such as .* are not FP8 .*they take [\d,]+ bytes") as caught:
        model = ctfp8.from_pretrained(mixed.folder, **kwargs)
    assert len([w for w in caught if "not FP8" in str(w.message)]) == 1
    return model


def _weight(model, name):
    """A weight of the file in the model; `model` may have merged experts."""
    if ".experts." not in name:
        return model.get_parameter(name)
    stem, index, which, _ = name.rsplit(".", 3)
    stem = stem.replace("block_sparse_moe", "mlp")
    merged = model.get_parameter(f"{stem}.{'down_proj' if which == 'down_proj' else 'gate_up_proj'}")[int(index)]
    half = merged.shape[0] // 2
    return {"gate_proj": merged[:half], "up_proj": merged[half:]}.get(which, merged)


@pytest.mark.parametrize(
    ("name", "presets", "fp8"),
    [
        ("llama/FP8_DYNAMIC", {"W8A8": MLP}, 8),
        ("llama/FP8_BLOCK", {"W4A16": MLP}, 8),
        ("llama/FP8", {"NVFP4": DOWN}, 12),
        ("llama/FP8_DYNAMIC", {"W4A16_ASYM": r"re:.*[qk]_proj$", "W8A8": r"re:.*o_proj$", "MXFP4": DOWN}, 6),
        ("qwen3moe/FP8_BLOCK", {"W4A16": EXPERTS}, 8),
        ("mixtral/FP8_DYNAMIC", {"NVFP4": GATES}, 10),
        ("qwen3moe/FP8", {"W8A8": GATES, "W4A16": DOWN}, 8),
    ],
)
def test_every_value_is_compressed_tensors_and_saving_gives_the_file_back(name, presets, fp8, tmp_path):
    mixed = mix(DATA / name, tmp_path / "in", presets)
    model = _load(mixed)
    assert len(list(quantized_parameters(model))) == fp8
    for weight, truth in mixed.truth.items():
        assert torch.equal(_weight(model, weight), truth.to(torch.bfloat16)), weight
    plain = _load(mixed, dequantize=True)
    assert torch.equal(logits(plain), logits(model))
    ctfp8.save_pretrained(model, tmp_path / "out")
    assert_same_bits(mixed.folder, tmp_path / "out")
    was, now = (
        json.loads((p / "config.json").read_text())["quantization_config"] for p in (mixed.folder, tmp_path / "out")
    )
    assert was == now


def _plain(mixed, folder):
    """The same file with those weights in bfloat16, as compressed-tensors dequantizes them, and no group for them."""
    shutil.copytree(mixed.folder, folder)
    state, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    modules = {name.removesuffix(".weight") for name in mixed.truth}
    state = {k: t for k, t in state.items() if k.rpartition(".")[0] not in modules or k.endswith(".bias")}
    save_file(
        state | {k: t.to(torch.bfloat16) for k, t in mixed.truth.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    config["quantization_config"]["ignore"] += sorted(modules)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_experts_stored_transposed_and_interleaved(tmp_path):
    forged = forge("gpt_oss", "FP8_DYNAMIC", tmp_path / "fp8")
    mixed = mix(forged.folder, tmp_path / "in", {"W4A16": GATES})
    model = _load(mixed)
    plain = ctfp8.from_pretrained(_plain(mixed, tmp_path / "plain"))
    for (name, ours), (_, theirs) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8)), name
    ctfp8.save_pretrained(model, tmp_path / "out")
    assert_same_bits(mixed.folder, tmp_path / "out")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    return mix(DATA / "llama/FP8_DYNAMIC", tmp_path_factory.mktemp("mixed") / "in", {"W4A16": MLP})


def test_all_ways_in(mixed, tmp_path):
    """explain, export and load in a fresh process, inspect, the command line, another dtype."""
    model = _load(mixed)
    eager, args = logits(model), ((IDS,), {"use_cache": False})
    assert len(ctfp8.explain(model, *args, target="cuda:sm90").rewritten) == 8  # FP8 ones; the others are plain weights
    assert len(ctfp8.export(model, *args, path=tmp_path / "m.pt2").rewritten) == 8
    assert relative_error(run_fresh([tmp_path / "m.pt2"], IDS, tmp_path)[0], eager) < 0.01
    found = look(mixed.folder)
    rows = [row for row in found.rows if "another format" in row.what]
    assert {row.what for row in rows} == {"another format, dequantized while loading: 4-bit int, pack-quantized"}
    assert sum(row.count for row in rows) == 6
    with pytest.warns(UserWarning, match="not FP8"):
        plain = ctfp8.from_pretrained(mixed.folder, dequantize=True)
    assert found.bf16_bytes == sum(p.numel() * 2 for p in plain.parameters())
    for command in ("inspect", "explain"):
        result = CliRunner().invoke(app, [command, str(mixed.folder)])
        assert result.exit_code == 0, result.output
        assert "4-bit int, pack-quantized" in result.output
    wide = _load(mixed, dtype=torch.float32)
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(wide.get_parameter(name), mixed.truth[name].float())


def test_strict_refuses(mixed):
    with pytest.raises(
        ctfp8.SchemeError, match=r"6 weights, such as .*4-bit int, pack-quantized.*strict=True refuses that"
    ):
        ctfp8.from_pretrained(mixed.folder, strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ctfp8.from_pretrained(DATA / "llama/FP8_DYNAMIC", strict=True)


def test_a_file_without_fp8_weights_is_not_ours(tmp_path):
    mixed = mix(DATA / "llama/FP8_DYNAMIC", tmp_path / "in", {"W4A16": r"re:.*_proj$"})
    with pytest.raises(
        ctfp8.SchemeError, match="there is no FP8 weight beside them.* Load the checkpoint with transformers or vLLM"
    ):
        ctfp8.from_pretrained(mixed.folder)


def test_prepare_names_the_door(mixed):
    with pytest.raises(
        ctfp8.UsageError, match="weight_packed is in another format than FP8, which only loading dequantizes"
    ):
        ctfp8.prepare(AutoModelForCausalLM.from_pretrained(mixed.folder))


def test_a_changed_weight_or_file_is_not_saved_as_if_it_were_not(mixed, tmp_path):
    folder = tmp_path / "in"
    shutil.copytree(mixed.folder, folder)
    with pytest.warns(UserWarning, match="not FP8"):
        model = ctfp8.from_pretrained(folder)
    name = "model.layers.1.mlp.up_proj.weight"
    with torch.no_grad():
        model.get_parameter(name)[3, 5] += 1
    with pytest.raises(ctfp8.UsageError, match=f"{name} was dequantized and has changed since"):
        ctfp8.save_pretrained(model, tmp_path / "out")
    with pytest.warns(UserWarning, match="not FP8"):
        model = ctfp8.from_pretrained(folder, in_memory=True)
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        ctfp8.UsageError, match="saved as in the file, which has changed since .*model.safetensors is gone"
    ):
        model.save_pretrained(tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_any_module_takes_a_state_dict(mixed):
    module = nn.ModuleDict({"up_proj": nn.Linear(128, 256, bias=False), "q_proj": nn.Linear(128, 128, bias=False)})
    module = nn.ModuleDict({"mlp": module}).to(torch.bfloat16)
    state, prefix = load_file(mixed.folder / "model.safetensors"), "model.layers.0."
    own = {k.replace(prefix + "self_attn", "mlp").removeprefix(prefix): t for k, t in state.items()
           if k.startswith((f"{prefix}mlp.up_proj", f"{prefix}self_attn.q_proj"))}  # fmt: skip
    config = json.loads((mixed.folder / "config.json").read_text())["quantization_config"]
    config["config_groups"]["group_1"]["targets"] = ["mlp.up_proj"]
    with pytest.warns(UserWarning, match="weight mlp.up_proj.weight is not FP8"):
        ctfp8.load_state_dict(module, own, config)
    assert torch.equal(module["mlp"]["up_proj"].weight, mixed.truth[f"{prefix}mlp.up_proj.weight"].to(torch.bfloat16))


UP = "model.layers.1.mlp.up_proj"


def _config(**fields):
    return lambda state, config: config["quantization_config"]["config_groups"]["group_1"].update(fields)


def _weights(**fields):
    return lambda state, config: config["quantization_config"]["config_groups"]["group_1"]["weights"].update(fields)


def _tensor(leaf, make):
    def change(state, config):
        state[f"{UP}.{leaf}"] = make(state[f"{UP}.{leaf}"])

    return change


@pytest.mark.parametrize(
    ("preset", "change", "sentence"),
    [
        ("W4A16", lambda s, c: s.pop(f"{UP}.weight_scale"), "up_proj.weight_packed .*pack-quantized, which needs .*weight_scale"),
        ("W4A16", lambda s, c: s.pop(f"{UP}.weight_shape"), "up_proj.weight_packed .*which needs .*weight_shape"),
        ("W4A16", _tensor("weight_shape", lambda t: t.flip(0)), "does not hold a weight of 4 bits of the shape"),
        ("W4A16", _tensor("weight_scale", lambda t: t[:1]), "up_proj.weight_scale .*not a scale of"),
        ("W4A16", _tensor("weight_scale", lambda t: t * float("nan")), "values that are not finite"),
        ("W4A16", _tensor("weight_scale", lambda t: t.to(torch.int8)), "up_proj.weight_scale .*not a scale of"),
        ("W4A16", _tensor("weight_packed", lambda t: t.float()), "up_proj.weight_packed .*not a matrix of packed values"),
        ("W4A16", lambda s, c: s.update({f"{UP}.weight_g_idx": torch.arange(128)}), "weight_g_idx"),
        ("W4A16", lambda s, c: s.update({f"{UP}.weight_zero_point": torch.ones(256, 1)}), "weight_zero_point"),
        ("W4A16", _weights(num_bits=8), "does not hold a weight of 8 bits"),
        ("W4A16", _weights(symmetric=False), "which needs .*weight_zero_point"),
        ("W4A16", _config(format="nvfp4-pack-quantized"), "which needs .*weight_global_scale"),
        ("W4A16", _config(format="no-such-format"), "config_groups.group_1.format: Input should be"),
        ("W4A16", _config(format="sparse-bitmask"), "format='sparse-bitmask', which compressed-tensors cannot dequantize"),
        ("W4A16", _config(format="dense"), "group 'group_1' says dense, which needs .*down_proj.weight."),
        ("W4A16", _config(targets=["nothing"]), "quantized in another format than FP8, but group 'group_0' .8-bit float"),
        ("W8A8", _tensor("weight_scale", lambda t: t.reshape(-1)), "up_proj.weight_scale .*not a scale of"),
        ("W8A8", _tensor("weight", lambda t: t[:, :64].contiguous()), r"up_proj.weight .*declare|up_proj.weight"),
        ("W8A8", _config(format="pack-quantized"), "which has no weight|which needs"),
        ("NVFP4", lambda s, c: s.pop(f"{UP}.weight_global_scale"), "which needs .*weight_global_scale"),
        ("NVFP4", _tensor("weight_scale", lambda t: t.float()), "up_proj.weight_scale .*not a scale of .*F8_E4M3"),
        ("NVFP4", _tensor("weight_global_scale", lambda t: t * 0), "values that are not finite"),
        ("NVFP4", _tensor("weight_global_scale", lambda t: t.repeat(256)), "up_proj.weight_global_scale .*expected shape"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*are not FP8")
def test_what_is_wrong_is_said(preset, change, sentence, tmp_path):
    mixed = mix(DATA / "llama/FP8_DYNAMIC", tmp_path / "in", {preset: MLP}, change)
    with pytest.raises((ctfp8.CheckpointError, ctfp8.SchemeError), match=sentence):
        ctfp8.from_pretrained(mixed.folder)
