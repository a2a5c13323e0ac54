"""The forge is right: its files are llm-compressor's to the byte where there are real ones to compare with, and its
references compute what the files say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import compress_module
from compressed_tensors.quantization import preset_name_to_scheme
from safetensors import safe_open
from safetensors.torch import load_file
from support.forge import ARCHITECTURES, SCHEMES, Forged, Sizes, _quantize, forge
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CompressedTensorsConfig

DATA = Path(__file__).parents[1] / "data"
REAL = {"llama": "llama", "mixtral": "mixtral", "qwen3_moe": "qwen3moe"}
EVERY = [(architecture, scheme) for architecture, spec in ARCHITECTURES.items() for scheme in spec.schemes]
#: Whole blocks say little that partial ones do not.
WHOLE_OR_ODD = [(*case, True) for case in EVERY] + [(*case, False) for case in EVERY if case[1] == "FP8_BLOCK"]
MOES = [architecture for architecture, spec in ARCHITECTURES.items() if spec.experts]

#: What transformers 5.23 does with these checkpoints when asked to dequantize them (measured; the other architectures load
#: exactly). None of these raises: the experts named in the file are reported as unexpected, the model's as missing.
STOCK_WRONG = {
    "mixtral": "experts at random: it knows w1, w2, w3 only",
    "minimax_m2": "experts at random: it knows w1, w2, w3 only",
    "phimoe": "experts at random: it knows w1, w2, w3 only",
    "lfm2_moe": "experts at random: it knows w1, w2, w3 only",
    "granitemoe": "experts at random: it knows input_linear and output_linear only",
    "gpt_oss": "experts and their biases at random: it knows fused tensors only",
    "qwen3_vl_moe": "experts at random: it knows fused tensors only",
    "granitemoe_3d": "experts without their scales, and nothing is reported missing",
}
#: Here it raises: it multiplies a per-expert weight with its block scales as they are, which broadcasts only while an
#: expert is a single block. Llama 4 is spared, whose experts it makes Linears.
STOCK_RAISES = {(architecture, "FP8_BLOCK") for architecture in MOES if architecture not in STOCK_WRONG} - {
    ("llama4", "FP8_BLOCK")
}


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: x for file in folder.glob("*.safetensors") for name, x in load_file(file).items()}


def layout(folder: Path) -> dict[str, tuple[str, list[int]]]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as handle:
            for name in handle.keys():  # noqa: SIM118
                found[name] = (handle.get_slice(name).get_dtype(), handle.get_slice(name).get_shape())
    return found


def quantization_config(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    config.pop("version")
    return _filled(config)


def _filled(config: Any) -> Any:
    """Without the empty fields: compressed-tensors 0.20 leaves out some that 0.19, which wrote the real files, kept."""
    if isinstance(config, dict):
        return {key: _filled(value) for key, value in config.items() if value not in (None, {}, [])}
    return config


def dequantized(weight: Tensor, scale: Tensor) -> Tensor:
    """Not compressed-tensors' arithmetic but the definition, an element at a time."""
    if scale.dim() < 2:
        return (weight.double() * scale.double()).to(torch.bfloat16)
    rows, columns = (_block_of_each(weight.shape[d], scale.shape[d]) for d in (-2, -1))
    return (weight.double() * scale.double()[..., rows, :][..., columns]).to(torch.bfloat16)


def _block_of_each(size: int, scales: int) -> Tensor:
    if scales == size:
        return torch.arange(size)
    return torch.arange(size) // 128 if scales > 1 else torch.zeros(size, dtype=torch.long)


@pytest.mark.parametrize("scheme", ["FP8_DYNAMIC", "FP8", "FP8_BLOCK"])
@pytest.mark.parametrize("architecture", REAL)
def test_files_are_written_as_llm_compressors(architecture: str, scheme: str, tmp_path: Path) -> None:
    real = DATA / REAL[architecture] / scheme
    forge(architecture, scheme, tmp_path, sizes=Sizes(hidden=128, intermediate=256, expert=128))
    assert layout(tmp_path) == layout(real)
    assert quantization_config(tmp_path) == quantization_config(real)


@pytest.mark.parametrize("scheme", ["FP8_DYNAMIC", "FP8", "FP8_BLOCK"])
def test_arithmetic_is_llm_compressors(scheme: str) -> None:
    dense, real = tensors(DATA / "llama" / "dense"), tensors(DATA / "llama" / scheme)
    names = [name for name, x in real.items() if x.dtype == torch.float8_e4m3fn]
    assert len(names) == 14
    for name in names:
        linear = nn.Linear(*reversed(dense[name].shape), bias=False)
        linear.weight = nn.Parameter(dense[name], requires_grad=False)
        _quantize(linear, preset_name_to_scheme(scheme, ["Linear"]), torch.bfloat16, input_key=name)
        compress_module(linear)
        assert torch.equal(linear.weight.view(torch.uint8), real[name].view(torch.uint8)), name
        assert torch.equal(linear.weight_scale, real[name + "_scale"]), name


@pytest.mark.parametrize(("architecture", "scheme", "odd"), WHOLE_OR_ODD)
def test_every_architecture_runs(architecture: str, scheme: str, odd: bool, tmp_path: Path) -> None:
    forged = forge(architecture, scheme, tmp_path, odd=odd)
    file = tensors(tmp_path)
    assert forged.fp8_names
    assert set(forged.fp8_names) == {name for name, x in file.items() if x.dtype == torch.float8_e4m3fn}
    for name in forged.fp8_names:
        check_scales(file, name, scheme)
    logits = forged.logits()
    assert logits.isfinite().all()
    assert 0.2 < logits.float().std() < 5
    assert not any(p.requires_grad for p in forged.reference.parameters())


def check_scales(file: dict[str, Tensor], name: str, scheme: str) -> None:
    weight, scale = file[name], file[name + "_scale"]
    *experts, rows, columns = weight.shape
    blocks = [-(-rows // 128), -(-columns // 128)]
    wanted = {"FP8": [1], "FP8_BLOCK": [*experts, *blocks]}.get(scheme, [*experts, rows, 1])
    assert (list(scale.shape), scale.dtype) == (wanted, torch.bfloat16), name
    assert (scale > 0).all(), name
    given = file.get(name.removesuffix("weight") + "input_scale")
    assert (given is not None) == (scheme == "FP8"), name
    if given is not None:
        assert given.shape == (1,), name
        assert 0 < given < 0.25, name


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    "architecture", ["llama", "qwen2", "gemma3", "phi3", "bert", "deepseek_v3", "jamba", "glm4_moe"]
)
def test_reference_holds_the_files_linears(architecture: str, scheme: str, tmp_path: Path) -> None:
    """These architectures' Linears have one name in the file and in the model."""
    forged = forge(architecture, scheme, tmp_path, odd=True)
    file, model = tensors(tmp_path), dict(forged.reference.named_parameters())
    for name, stored in file.items():
        if name in model:
            truth = dequantized(stored, file[name + "_scale"]) if name in forged.fp8_names else stored
            assert torch.equal(model[name].data, truth), name
    shared = [name for name in forged.fp8_names if name in model]
    assert len(shared) + sum(".experts." in name for name in forged.fp8_names) == len(forged.fp8_names)


@pytest.mark.parametrize("scheme", ["FP8_DYNAMIC", "FP8_BLOCK"])
@pytest.mark.parametrize("architecture", MOES)
def test_reference_experts_compute_what_the_file_says(architecture: str, scheme: str, tmp_path: Path) -> None:
    """An expert of the model, against plain linears on the file's tensors: gate is gate, rows are rows."""
    forged = forge(architecture, scheme, tmp_path, odd=True)
    file = {name: x.to(torch.float64) for name, x in dequantized_file(forged).items()}
    modules = [m for m in forged.reference.modules() if isinstance(getattr(m, "down_proj", None), nn.Parameter)]
    prefixes = sorted({p for name in file if (p := expert_prefix(name))})
    assert modules
    assert len(modules) == len(prefixes)
    for module, prefix in zip(modules, prefixes, strict=True):
        module.double()
        for index in range(len(module.down_proj)):
            x = torch.randn(3, width(file, prefix, index), dtype=torch.float64)
            torch.testing.assert_close(run_expert(module, index, x), by_hand(file, prefix, index, x, architecture))


def dequantized_file(forged: Forged) -> dict[str, Tensor]:
    file = tensors(forged.folder)
    return {n: dequantized(x, file[n + "_scale"]) if n in forged.fp8_names else x for n, x in file.items()}


def expert_prefix(name: str) -> str | None:
    found = re.match(r"(.*\.experts)\.\d+\.|(.*)\.input_linear\.", name)
    return found and (found[1] or found[2])


def width(file: dict[str, Tensor], prefix: str, index: int) -> int:
    return expert_tensors(file, prefix, index)["up"].shape[1]


def expert_tensors(file: dict[str, Tensor], prefix: str, index: int) -> dict[str, Tensor]:
    if f"{prefix}.input_linear.weight" in file:
        gate, up = file[f"{prefix}.input_linear.weight"][index].chunk(2)
        return {"gate": gate, "up": up, "down": file[f"{prefix}.output_linear.weight"][index]}
    means = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up", "w2": "down"}
    of = {}
    for own, meaning in means.items():
        for kind, suffix in (("weight", ""), ("bias", "_bias")):
            if (found := file.get(f"{prefix}.{index}.{own}.{kind}")) is not None:
                of[meaning + suffix] = found
    return of


def by_hand(file: dict[str, Tensor], prefix: str, index: int, x: Tensor, architecture: str) -> Tensor:
    of = expert_tensors(file, prefix, index)
    up = F.linear(x, of["up"], of.get("up_bias"))
    if architecture == "nemotron_h":  # no gate, squared ReLU
        return F.linear(F.relu(up).square(), of["down"])
    gate = F.linear(x, of["gate"], of.get("gate_bias"))
    if architecture == "gpt_oss":
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return F.linear((up + 1) * gate * torch.sigmoid(1.702 * gate), of["down"], of["down_bias"])
    return F.linear(F.silu(gate) * up, of["down"])


def run_expert(module: nn.Module, index: int, x: Tensor) -> Tensor:
    if type(module).__name__ == "Llama4TextExperts":  # takes every expert's tokens, one expert after the other
        return module(x.repeat(len(module.down_proj), 1)).unflatten(0, (-1, len(x)))[index]
    module.config._experts_implementation = "eager"
    return module(x, torch.full((len(x), 1), index), torch.ones(len(x), 1, dtype=x.dtype))


@pytest.mark.parametrize("scheme", ["FP8_DYNAMIC", "FP8_BLOCK", "FP8"])
@pytest.mark.parametrize(
    "architecture", [architecture for architecture in ARCHITECTURES if architecture not in STOCK_WRONG]
)
def test_stock_transformers_agrees_where_it_can_load(architecture: str, scheme: str, tmp_path: Path) -> None:
    if (architecture, scheme) in STOCK_RAISES:
        pytest.skip("transformers raises here")
    forged = forge(architecture, scheme, tmp_path)
    how = CompressedTensorsConfig(dequantize=True)
    model = forged.auto_class.from_pretrained(tmp_path, dtype=torch.bfloat16, quantization_config=how)
    # as the reference's: by where a tensor begins, and whether it may need a gradient, torch's sums are rounded on some CPUs
    for parameter in model.requires_grad_(False).parameters():
        parameter.data = parameter.data.clone()
    with torch.no_grad():
        assert torch.equal(model(**forged.inputs).logits, forged.logits())


@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt_oss"])
def test_input_scales_differ_but_not_among_readers_of_one_input(architecture: str, tmp_path: Path) -> None:
    forge(architecture, "FP8", tmp_path)
    given = {name: x.item() for name, x in tensors(tmp_path).items() if name.endswith(".input_scale")}
    scales = {name.removesuffix(".input_scale"): scale for name, scale in given.items()}
    attention = "model.layers.1.self_attn"
    assert scales[f"{attention}.q_proj"] == scales[f"{attention}.k_proj"] == scales[f"{attention}.v_proj"]
    expert = "model.layers.1.mlp.experts"
    assert scales[f"{expert}.0.gate_proj"] == scales[f"{expert}.0.up_proj"]
    assert len({scales[f"{expert}.{i}.{own}"] for i in range(4) for own in ("gate_proj", "down_proj")}) == 8
    assert scales[f"{attention}.q_proj"] != scales["model.layers.0.self_attn.q_proj"]


def test_options(tmp_path: Path) -> None:
    one = forge("llama", "FP8_BLOCK", tmp_path / "one")
    again = forge("llama", "FP8_BLOCK", tmp_path / "again")
    other = forge("llama", "FP8_BLOCK", tmp_path / "other", seed=1)
    assert torch.equal(one.logits(), again.logits())
    assert not torch.equal(one.logits(), other.logits())

    split = forge("llama", "FP8_BLOCK", tmp_path / "split", shards=3)
    files = {file.name for file in split.folder.glob("*.safetensors")}
    index = json.loads((split.folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(files) >= 3
    assert files == set(index.values())
    assert set(split.fp8_names) == set(one.fp8_names)
    assert torch.equal(one.logits(), split.logits())

    exact = forge("llama", "FP8_BLOCK", tmp_path / "float32", scale_dtype=torch.float32, dtype=torch.float32)
    stored = tensors(exact.folder)
    assert {x.dtype for x in stored.values()} == {torch.float32, torch.float8_e4m3fn}
    assert exact.logits().dtype == torch.float32


def test_what_llm_compressor_cannot_write_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="granitemoe_3d"):
        forge("granitemoe_3d", "FP8", tmp_path)
    with pytest.raises(ValueError, match="does not split"):
        forge("granitemoe_3d", "FP8_BLOCK", tmp_path, sizes=Sizes(144, 208, 176))
