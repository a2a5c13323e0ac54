"""Bad files: one exception of ours that names the tensor and the cure, never a random initialisation."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conftest import DATA, logits
from safetensors.torch import load_file, save_file

import ctfp8_compile as ctfp8
from ctfp8_compile.checkpoint.files import has_nan
from ctfp8_compile.ops import FP8

Q = "model.layers.0.self_attn.q_proj.weight"
GATE = "model.layers.0.mlp.experts.1.gate_proj.weight"


def _refused(tmp_path, name, edit, match, error=ctfp8.CheckpointError):
    folder = tmp_path / "bad"
    shutil.copytree(DATA / name, folder)
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    edit(tensors, config)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(error, match=match):
        ctfp8.from_pretrained(folder)


def _group(config):
    return config["quantization_config"]["config_groups"]["group_0"]


def _weights(config):
    return _group(config)["weights"]


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda t, c: (t.pop(Q), t.pop(Q + "_scale")), "the model needs model.layers.0.self_attn.q_proj.weight"),
        (lambda t, c: t.pop(Q), r"q_proj.weight_scale .*q_proj.weight, which it belongs to, is not in the checkpoint"),
        (lambda t, c: t.pop(Q + "_scale"), "q_proj.weight_scale or .* is not in the checkpoint"),
        (lambda t, c: t.pop("model.norm.weight"), "the model needs model.norm.weight"),
        (
            lambda t, c: t.update({Q + "_scale": t[Q + "_scale"][:64].clone()}),
            r"q_proj.weight_scale .*\[64, 1\].*expected shape",
        ),
        (lambda t, c: t.update({Q + "_scale": t[Q + "_scale"].to(torch.int32)}), "a scale must be float32"),
        (lambda t, c: t[Q + "_scale"][5].fill_(float("nan")), r"q_proj.weight_scale .*scale nan at index \[5, 0\]"),
        (lambda t, c: t[Q + "_scale"][0].fill_(float("inf")), "scale inf"),
        (lambda t, c: t[Q + "_scale"][0].zero_(), "scale 0.0"),
        (lambda t, c: t[Q + "_scale"][0].neg_(), "scale -"),
        (lambda t, c: t[Q].view(torch.uint8)[3, 5].fill_(0xFF), "q_proj.weight: holds NaN values"),
        (lambda t, c: t.update({Q: t[Q].float().to(torch.float8_e5m2)}), "q_proj.weight .*F8_E5M2.*only float8_e4m3fn"),
        (lambda t, c: t.update({Q: t[Q][:, :64].contiguous()}), r"q_proj.weight .*declares .*\[128, 128\]"),
        (
            lambda t, c: t.update({Q: t[Q].bfloat16()}),
            "q_proj.weight .*its numbers are FP8 values, which .*q_proj.weight_scale was not multiplied into",
        ),
        (
            lambda t, c: t.update({Q + "_g_idx": torch.zeros(128, dtype=torch.int32)}),
            "q_proj.weight_g_idx .*columns of .* in another order",
        ),
        (lambda t, c: t.update({"model.norm.weight": torch.ones(128).int()}), "norm.weight .*not a floating-point"),
        (lambda t, c: t.update({"lm_head.weight": t["lm_head.weight"][:9].clone()}), r"lm_head.weight: \[9, 128\] in"),
        (lambda t, c: _weights(c).update(strategy="diagonal"), "group_0.weights.strategy: .*'diagonal' is not a valid"),
        (
            lambda t, c: _group(c).update(output_activations=_weights(c)),
            "down_proj .group .group_0.*output_activations",
        ),
        (lambda t, c: _group(c).update(targets=["re:("]), "'re:.' is not a regular expression"),
        (lambda t, c: c["quantization_config"].update(config_groups={}), "has no config_groups"),
        (lambda t, c: c["quantization_config"].update(format="unknown"), "'unknown' is not a valid CompressionFormat"),
        (
            lambda t, c: c["quantization_config"].update(transform_config={"config_groups": {"R1": {}}}),
            "transform_config: group 'R1' is of type None; known are hadamard",
        ),
        (
            lambda t, c: c["quantization_config"].update(sparsity_config={"format": "sparse-24-bitmask"}),
            "sparsity_config.*wrong results",
        ),
    ],
)
def test_dense(tmp_path, edit, match):
    _refused(tmp_path, "llama/FP8_DYNAMIC", edit, match, ctfp8.Ctfp8Error)


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda t, c: t.pop(GATE), "experts"),
        (lambda t, c: t.pop(GATE + "_scale"), "experts.1.gate_proj.weight_scale or .* is not in the checkpoint"),
        (
            lambda t, c: t.update({GATE: t[GATE].to(torch.bfloat16)}),
            "experts.1.gate_proj.weight .*its numbers are FP8 val",
        ),
        (
            lambda t, c: t.update({GATE: t[GATE][:, :64].contiguous()}),
            r"experts.1.gate_proj.weight \[\d+, 64\]: .*of 128 columns",
        ),
    ],
)
def test_experts(tmp_path, edit, match):
    _refused(tmp_path, "qwen3moe/FP8_DYNAMIC", edit, match, ctfp8.Ctfp8Error)


def test_plain_experts_of_an_odd_shape(tmp_path):
    """Experts that were never quantized are merged by transformers, which must not have the last word."""

    def edit(tensors, config):
        for name in [n for n in tensors if ".experts." in n]:
            tensor = tensors.pop(name)
            if not name.endswith("_scale"):
                tensors[name] = tensor.to(torch.bfloat16)
        tensors[GATE] = tensors[GATE][:, :64].contiguous()
        config["quantization_config"]["ignore"].append("re:.*experts")

    _refused(
        tmp_path,
        "qwen3moe/FP8_DYNAMIC",
        edit,
        "layers.0.mlp.experts.gate_up_proj: .*experts.1.gate_proj.weight .*cannot be merged",
    )


def test_mixtral_without_any_expert(tmp_path):
    def edit(tensors, config):
        for name in [n for n in tensors if ".experts." in n]:
            del tensors[name]

    _refused(tmp_path, "mixtral/FP8_DYNAMIC", edit, "the model needs model.layers.0.mlp.experts")


def test_no_quantization_config(tmp_path):
    def edit(tensors, config):
        del config["quantization_config"]
        for name in [name for name in tensors if tensors[name].dtype == FP8]:
            tensors[name] = tensors[name].bfloat16()
            del tensors[name + "_scale"]

    _refused(
        tmp_path,
        "llama/FP8_DYNAMIC",
        edit,
        "has no quantization_config, .*no FP8 weight in its files has a scale",
        ctfp8.SchemeError,
    )


def test_another_method(tmp_path):
    def edit(tensors, config):
        config["quantization_config"] = {"quant_method": "gptq", "bits": 4}

    _refused(tmp_path, "llama/FP8_DYNAMIC", edit, "quant_method='gptq'", ctfp8.SchemeError)


def test_a_layer_in_another_format_is_named(tmp_path):
    def edit(tensors, config):
        del tensors[Q], tensors[Q + "_scale"]
        tensors[Q + "_packed"] = torch.zeros(128, 16, dtype=torch.int32)

    _refused(
        tmp_path, "llama/FP8_DYNAMIC", edit, "q_proj.weight_packed .*quantized in another format", ctfp8.SchemeError
    )


def test_scales_of_a_quantized_kv_cache_are_kept_but_not_used(tmp_path):
    folder = tmp_path / "in"
    shutil.copytree(DATA / "llama/FP8", folder)
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    own = {f"model.layers.{i}.self_attn.{k}_scale": torch.full((1,), 0.1 + i) for i in range(2) for k in "kv"}
    save_file(tensors | own, folder / "model.safetensors", {"format": "pt"})
    cache = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    config["quantization_config"]["kv_cache_scheme"] = cache
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match=r"quantized KV cache .4 scales .*layers.0.self_attn.k_scale") as caught:
        model = ctfp8.from_pretrained(folder)
    assert len([w for w in caught if "KV cache" in str(w.message)]) == 1
    assert torch.equal(logits(model), logits(ctfp8.from_pretrained(DATA / "llama/FP8")))
    ctfp8.save_pretrained(model, tmp_path / "out")
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert saved.keys() == tensors.keys() | own.keys()
    assert all(torch.equal(saved[name], scale) for name, scale in own.items())
    kept = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]
    assert {key: kept[key] for key in cache} == cache


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (None, "no config.json"),
        ("{", "config.json is not valid JSON"),
        ("[]", "config.json is not an object"),
        ('{"model_type": "llama", "quantization_config": []}', "quantization_config in config.json is not an object"),
    ],
)
def test_config_file(tmp_path, text, match):
    folder = tmp_path / "bad"
    shutil.copytree(DATA / "llama/FP8_DYNAMIC", folder)
    (folder / "config.json").unlink() if text is None else (folder / "config.json").write_text(text)
    with pytest.raises(ctfp8.Ctfp8Error, match=match):
        ctfp8.from_pretrained(folder)


@pytest.mark.parametrize("keep", [0, 7, 100, 5000, -1])
def test_truncated_file(tmp_path, keep):
    shutil.copytree(DATA / "llama/FP8_DYNAMIC", tmp_path / "bad")
    file = tmp_path / "bad" / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:keep])
    with pytest.raises(ctfp8.CheckpointError, match="model.safetensors: not a readable safetensors file"):
        ctfp8.from_pretrained(tmp_path / "bad")


@pytest.mark.parametrize(
    ("shard", "match"),
    [
        ("gone.safetensors", "names the shard gone.safetensors, which is missing"),
        ("../llama/model.safetensors", "leaves the checkpoint's folder"),
        ("/etc/model.safetensors", "leaves the checkpoint's folder"),
    ],
)
def test_index_that_points_elsewhere(tmp_path, shard, match):
    folder = tmp_path / "bad"
    shutil.copytree(DATA / "llama/FP8_DYNAMIC", folder)
    names = load_file(folder / "model.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model.safetensors") | {Q: shard}}
    save_file({n: t for n, t in names.items() if n != Q}, folder / "model.safetensors", {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ctfp8.CheckpointError, match=match):
        ctfp8.from_pretrained(folder)


def test_empty_folder(tmp_path):
    with pytest.raises(ctfp8.CheckpointError, match="neither model.safetensors nor"):
        ctfp8.from_pretrained(tmp_path)


@pytest.mark.parametrize("offset", range(9))
@pytest.mark.parametrize("byte", [0x7F, 0xFF])
def test_nan_values_are_found_at_any_alignment(offset, byte):
    data = torch.arange(5000, dtype=torch.int64).to(torch.uint8)
    data[(data & 0x7F) == 0x7F] = 0x7E
    weight = data[offset:4900].view(FP8)
    assert not has_nan(weight)
    for at in (0, 17, weight.numel() - 1):
        changed = data.clone()
        changed[offset + at] = byte
        assert has_nan(changed[offset:4900].view(FP8))
