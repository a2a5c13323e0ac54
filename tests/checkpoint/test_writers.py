"""Files that real tools wrote (tests/data/writers, cut to a layer): read by each writer's own arithmetic, kept, saved bit for bit.

The reference knows no code of ours: it multiplies, or divides, what the file holds as the writer's own package does.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings

import pytest
import torch
from conftest import DATA, relative_error
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import ctfp8_compile as ctfp8
from ctfp8_compile.ops import FP8

WRITERS = sorted(path.name for path in (DATA / "writers").iterdir())
IDS = torch.arange(1, 25).mul(5).remainder(120).reshape(2, 12)
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def value(name: str, state: dict[str, torch.Tensor], inverse: bool) -> torch.Tensor:
    """One weight as float32: by the scale that the file has for it."""
    weight, stem = state[name], name.removesuffix(".weight").removesuffix("._weight_qdata")
    if weight.dtype == torch.uint8:  # NVFP4
        pairs = torch.stack([E2M1[(weight & 15).long()], E2M1[(weight >> 4).long()]], -1).flatten(-2)
        return pairs * (state[f"{name}_scale"].float() * state[f"{name}_scale_2"]).repeat_interleave(16, 1)
    if weight.dtype != FP8:
        return weight.float()
    names = [
        f"{stem}{end}" for end in (".weight_scale", ".weight_scale_inv", "._weight_scale", "_weight_scale", "_scale")
    ]
    scale = next((state[n].float() for n in names if n in state), None)
    if scale is None:  # of all experts in one tensor
        experts, number, leaf = re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)", stem).groups()
        merged = "down_proj" if leaf == "down_proj" else "gate_up_proj"
        scale = state[f"{experts}.{merged}_scale_inv"][int(number)]
        if merged == "gate_up_proj":
            scale = scale.chunk(2)[leaf == "up_proj"]
    if scale.dim() == 3 and scale.shape[-1] == 1:  # Llama 4's down_proj
        scale = scale.mT
    if scale.dim() == 1 and scale.numel() > 1:
        scale = scale[:, None]
    if scale.dim() == 2 and scale.shape not in ((1, 1), (weight.shape[0], 1)) and weight.dim() == 2:
        scale = scale.repeat_interleave(128, 0)[: weight.shape[0]].repeat_interleave(128, 1)[:, : weight.shape[1]]
    return weight.float() / scale if inverse else weight.float() * scale


def reference(folder) -> torch.Tensor:
    """Logits of transformers' own model over those values, in float32."""
    config = json.loads((folder / "config.json").read_text())
    quantization = config.pop("quantization_config", {})
    inverse = quantization.get("weight_scale_semantics") == "inverse"
    state = load_file(folder / "model.safetensors")
    plain = {}
    for name in state:
        if not re.search(r"(scale(_inv|_2)?|[kv]_bias)$", name):
            plain[name.replace("._weight_qdata", ".weight")] = value(name, state, inverse)
    shutil.rmtree(folder.parent / "plain", ignore_errors=True)
    (folder.parent / "plain").mkdir()
    save_file(
        {k: v.contiguous() for k, v in plain.items()}, folder.parent / "plain/model.safetensors", {"format": "pt"}
    )
    config["dtype"] = "float32"
    (folder.parent / "plain/config.json").write_text(json.dumps(config))
    return run(AutoModelForCausalLM.from_pretrained(folder.parent / "plain"))


def fp8_bytes(folder) -> int:
    """Of weights: scales of NVFP4 are FP8, too."""
    state = load_file(folder / "model.safetensors")
    return sum(t.nbytes for name, t in state.items() if t.dtype == FP8 and not name.endswith("scale"))


def run(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS.remainder(model.config.vocab_size), use_cache=False).logits


@pytest.fixture(params=WRITERS)
def folder(request, tmp_path):
    shutil.copytree(DATA / "writers" / request.param, tmp_path / request.param)
    return tmp_path / request.param


@pytest.mark.filterwarnings("ignore")
def test_a_file_is_read_as_its_writer_reads_it(folder):
    model = ctfp8.from_pretrained(folder, dtype=torch.float32)
    # compressed-tensors makes bfloat16 of NVFP4, whatever the model's dtype
    assert relative_error(run(model), reference(folder)) < (3e-3 if "mixed" in folder.name else 2e-5)
    assert sum(p.numel() for p in model.parameters() if p.dtype == FP8) == fp8_bytes(folder)


@pytest.mark.quick("modelopt-mixed-llama")
@pytest.mark.filterwarnings("ignore")
def test_it_is_one_graph(folder, kernel_everywhere):
    model = ctfp8.from_pretrained(folder, dtype=torch.float32)
    got = run(torch.compile(model, backend="ctfp8", fullgraph=True))
    assert relative_error(got, run(model)) < 1e-4
    report = ctfp8.explain(model, (IDS.remainder(model.config.vocab_size),), {"use_cache": False})
    assert report.rewritten
    # Llama 4 multiplies all experts at once, which is no linear and no group
    assert [entry.name for entry in report.kept if "feed_forward.experts" not in entry.name] == []


def test_transformers_has_nothing_to_report(folder, caplog):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, info = ctfp8.from_pretrained(folder, output_loading_info=True)
    unexpected = info["unexpected_keys"] if isinstance(info, dict) else info.unexpected_keys
    assert not unexpected
    assert "UNEXPECTED" not in caplog.text


def test_inspect_counts_what_is_loaded(folder):
    from ctfp8_compile.checkpoint.contents import look

    found = look(folder)
    assert found.fp8_bytes == fp8_bytes(folder)
    assert found.format == json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"]
    assert AutoConfig.from_pretrained(folder).architectures[0] == found.model


Change = tuple[str, dict[str, object], str]
BAD: list[Change] = [
    (
        "quark-fp8-llama",
        {"global_quant_config": {"weight": {"dtype": "fp8_e5m2", "qscheme": "per_tensor"}}},
        "dtype='fp8_e5m2'",
    ),
    ("quark-fp8-llama", {"global_quant_config": []}, "no config_groups|not an object"),
    ("quark-fp8-llama", {"exclude": "lm_head"}, "exclude is not a list of module names"),
    ("autoround-FP8_STATIC_auto_round-llama", {"bits": 4}, "bits=4 of an AutoRound file"),
    ("autoround-FP8_STATIC_auto_round-llama", {"data_type": "int"}, "data_type='int'"),
    ("autoround-FP8_STATIC_auto_round-llama", {"fmt": "e5m2"}, "fmt='e5m2' is not supported"),
    (
        "gptqmodel-row-llama",
        {"weight_scale_semantics": "log"},
        "weight_scale_semantics='log' is not supported; known are 'inverse'",
    ),
    ("gptqmodel-row-llama", {"weight_scale_method": "diagonal"}, "weight_scale_method='diagonal' is not supported"),
    (
        "gptqmodel-row-llama",
        {"dynamic": {"+:.*q_proj": {"bits": 4}}},
        "dynamic quantizes '\\+:.\\*q_proj' in another way",
    ),
    ("torchao-PerRow-llama", {"quant_type": {}}, "quant_type has no 'default'"),
    (
        "torchao-PerRow-llama",
        {"quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}}},
        "_type='Int8WeightOnlyConfig'",
    ),
    ("modelopt-mixed-llama", {"quant_algo": "INT9"}, "quant_algo='INT9' is not supported; known are 'FP8'"),
    ("modelopt-mixed-llama", {"quantized_layers": {}, "config_groups": {}}, "no quantized_layers and no config_groups"),
    ("hf-fbgemm-llama4", {"quant_method": "gguf"}, "quant_method='gguf'; only .*vLLM"),
]


@pytest.mark.parametrize(("name", "change", "message"), BAD)
@pytest.mark.filterwarnings("ignore")
def test_words_that_are_not_known(name, change, message, tmp_path):
    shutil.copytree(DATA / "writers" / name, tmp_path / "in")
    file = tmp_path / "in/config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] |= change
    file.write_text(json.dumps(config))
    with pytest.raises(ctfp8.SchemeError, match=message):
        ctfp8.from_pretrained(tmp_path / "in")


def drop(end):
    return lambda state: state.pop(next(name for name in state if name.endswith(end)))


def squeeze(end):
    def change(state):
        name = next(name for name in state if name.endswith(end))
        state[name] = state[name].reshape(-1)[:-1].clone()

    return change


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "torchao-PerRow-llama",
            drop("_weight_scale"),
            "down_proj._weight_qdata .*FP8 weight without a scale; .*weight_scale",
        ),
        ("gptqmodel-row-llama", squeeze("weight_scale_inv"), "weight_scale_inv .*does not fit"),
        ("hf-fg-qwen3moe", drop("gate_up_proj_scale_inv"), "gate_proj.weight .*FP8 weight without a scale"),
        ("hf-fg-qwen3moe", squeeze("gate_up_proj_scale_inv"), "gate_up_proj_scale_inv .*stacked"),
        ("modelopt-mixed-llama", drop("down_proj.weight_scale_2"), "down_proj.weight"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_do_not_fit(name, change, message, tmp_path):
    shutil.copytree(DATA / "writers" / name, tmp_path / "in")
    file = tmp_path / "in/model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file, {"format": "pt"})
    with pytest.raises((ctfp8.CheckpointError, ctfp8.SchemeError), match=message):
        ctfp8.from_pretrained(tmp_path / "in")
