"""Checkpoints in every format of FP8: the same logits as in compressed-tensors' words, and saved as they were read."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import CHECKPOINTS, DATA, FP8_PARAMETERS, IDS, assert_same_bits, logits, quantize, relative_error
from support.formats import FORMATS, respell
from support.fresh import run_fresh
from torch import nn
from transformers import AutoModelForCausalLM, FineGrainedFP8Config
from transformers.quantizers.quantizers_utils import should_convert_module

import ctfp8_compile as ctfp8
from ctfp8_compile.checkpoint.contents import look
from ctfp8_compile.checkpoint.files import encode_scale
from ctfp8_compile.checkpoint.scheme import Schemes
from ctfp8_compile.model.parametrization import quantized_parameters
from ctfp8_compile.ops import FP8

NAMES = [*CHECKPOINTS, "llama/MXFP8", "qwen3moe/MXFP8"]
CASES = [(name, format) for name in NAMES for format in FORMATS[name.split("/")[1]]]


@pytest.mark.parametrize(("name", "format"), CASES)
def test_a_renamed_checkpoint_gives_the_same_logits_and_is_saved_as_it_was(name, format, load, tmp_path):
    folder = respell(DATA / name, tmp_path / "in", format)
    model = ctfp8.from_pretrained(folder)
    assert len(list(quantized_parameters(model))) == FP8_PARAMETERS[name.split("/")[0]]
    assert torch.equal(logits(model), logits(load(name)))
    ctfp8.save_pretrained(model, tmp_path / "out")
    assert_same_bits(folder, tmp_path / "out")
    for file in ("config.json", "hf_quant_config.json"):
        if (folder / file).exists():
            was, now = (json.loads((at / file).read_text()) for at in (folder, tmp_path / "out"))
            quantization = "quantization_config" if file == "config.json" else "quantization"
            assert was.get(quantization) == now.get(quantization)


@pytest.mark.parametrize("name", ["llama/FP8_BLOCK", "qwen3moe/FP8_BLOCK"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.float8_e8m0fnu])
def test_power_of_two_scales_in_any_dtype(name, dtype, tmp_path):
    """`scale_fmt: "ue8m0"`: the same powers of two as numbers or as bytes."""

    def round_up(state, config):
        for key in [k for k in state if k.endswith("weight_scale_inv")]:
            state[key] = torch.exp2(torch.log2(state[key].float()).ceil())

    def store(state, config):
        round_up(state, config)
        config["scale_fmt"] = "ue8m0"
        for key in [k for k in state if k.endswith("weight_scale_inv")]:
            state[key] = encode_scale(state[key], dtype)

    plain = ctfp8.from_pretrained(respell(DATA / name, tmp_path / "plain", "fp8", round_up))
    folder = respell(DATA / name, tmp_path / "ue8m0", "fp8", store)
    model = ctfp8.from_pretrained(folder)
    assert torch.equal(logits(model), logits(plain))
    ctfp8.save_pretrained(model, tmp_path / "out")
    assert_same_bits(folder, tmp_path / "out")


@pytest.mark.quick("modelopt-side-file")
@pytest.mark.parametrize("format", ["fp8", "fp8-static", "fbgemm_fp8", "modelopt-side-file"])
def test_every_way_in_and_out(format, load, tmp_path):
    """What takes a compressed-tensors checkpoint takes these: explain, export and load, inspect, a plain model."""
    scheme = next(s for s, formats in FORMATS.items() if format in formats)
    folder = respell(DATA / "llama" / scheme, tmp_path / "in", format)
    model, twin = ctfp8.from_pretrained(folder), load(f"llama/{scheme}")
    args = (IDS,), {"use_cache": False}
    for target in ("cpu", "cuda:sm90"):
        ours, theirs = (ctfp8.explain(m, *args, target=target) for m in (model, twin))
        assert [(e.name, e.kernel) for e in ours.rewritten] == [(e.name, e.kernel) for e in theirs.rewritten]
        assert [(e.name, e.reason) for e in ours.kept] == [(e.name, e.reason) for e in theirs.kept]
    if format == "fp8":
        for name, each in (("ours", model), ("theirs", twin)):
            ctfp8.export(each, *args, path=tmp_path / f"{name}.pt2")
        got, want = run_fresh([tmp_path / "ours.pt2", tmp_path / "theirs.pt2"], IDS, tmp_path)
        assert torch.equal(got, want)
        assert relative_error(got, logits(twin)) < 0.02
    found = look(folder)
    assert found.format == format.partition("-")[0]
    assert str(twin.model.layers[0].mlp.up_proj.parametrizations.weight[0].info.scheme).split(",")[0] in found.schemes
    plain = ctfp8.from_pretrained(folder, dequantize=True)
    assert torch.equal(logits(plain), logits(twin))
    plain.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())


@pytest.mark.ci("llama/FP8_BLOCK", "llama/MXFP8", "qwen3moe/FP8_DYNAMIC", "mixtral/FP8")
@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_artifacts_in_a_fresh_process_and_plain_models(name, load, tmp_path):
    """Of every format, bit for bit those of the file it was renamed from."""
    args, formats = ((IDS,), {"use_cache": False}), FORMATS[name.split("/")[1]]
    exact = load(name, dtype=torch.float32)  # a router's choice is not to hang on how bfloat16 rounds
    ctfp8.export(exact, *args, path=tmp_path / "original.pt2")
    for format in formats:
        folder = respell(DATA / name, tmp_path / "in" / format, format)
        ctfp8.export(ctfp8.from_pretrained(folder, dtype=torch.float32), *args, path=tmp_path / f"{format}.pt2")
        assert torch.equal(logits(ctfp8.from_pretrained(folder, dequantize=True)), logits(load(name))), format
    original, *renamed = run_fresh([tmp_path / f"{which}.pt2" for which in ("original", *formats)], IDS, tmp_path)
    assert relative_error(original, logits(exact)) < 1e-5
    for format, got in zip(formats, renamed, strict=True):
        assert torch.equal(got, original), format


@pytest.mark.parametrize("format", ["fp8-autofp8", "modelopt"])
def test_scales_of_a_quantized_cache_are_set_aside_and_kept(format, load, tmp_path):
    names = {"fp8-autofp8": ["kv_scale", "k_proj.output_scale"], "modelopt": ["k_proj.k_scale", "v_proj.v_scale"]}
    own = {f"model.layers.{i}.self_attn.{n}": torch.tensor(0.1 + i) for i in range(2) for n in names[format]}

    def calibrate(state, config):
        state.update(own)
        config.update({"kv_cache_quant_algo": "FP8"} if format == "modelopt" else {})

    folder = respell(DATA / "llama/FP8", tmp_path / "in", format, calibrate)
    with pytest.warns(UserWarning, match="quantized KV cache .4 scales"):
        model = ctfp8.from_pretrained(folder)
    assert torch.equal(logits(model), logits(load("llama/FP8")))
    ctfp8.save_pretrained(model, tmp_path / "out")
    assert_same_bits(folder, tmp_path / "out")


def test_wildcards_that_match_nothing_exclude_nothing(load, tmp_path):
    """The headers say what is FP8: a list that forgets `lm_head` changes nothing."""
    folder = respell(DATA / "llama/FP8", tmp_path / "in", "modelopt", lambda s, c: c.update(ignore=["*absent*"]))
    assert torch.equal(logits(ctfp8.from_pretrained(folder)), logits(load("llama/FP8")))


@pytest.mark.parametrize(
    ("block", "fmt"), [((64, 64), "float"), ((1, 64), "float"), ((1, 32), "ue8m0"), ((128, 128), "ue8m0")]
)
def test_activations_are_quantized_in_groups_of_128_beside_128_x_128_blocks_and_nowhere_else(block, fmt):
    """Stock quantizes them in groups as wide as the block; kernels for others than 128 there are none."""
    rows, cols = 256, 512
    scale = torch.exp2(torch.randint(-9, -5, (-(-rows // block[0]), cols // block[1])).float())
    fp8 = (torch.randn(rows, cols) * 50).to(FP8)
    stored = scale if fmt == "float" else encode_scale(scale, torch.uint8)
    config = {"quant_method": "fp8", "weight_block_size": list(block), "scale_fmt": fmt, "activation_scheme": "dynamic"}
    module = nn.Sequential(nn.Linear(cols, rows, bias=False, dtype=torch.bfloat16))
    ctfp8.load_state_dict(module, {"0.weight": fp8, "0.weight_scale_inv": stored}, config)
    want = fp8.float() * scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    assert torch.equal(module[0].weight, want.bfloat16())
    program = ctfp8.lower(module, (torch.randn(32, cols, dtype=torch.bfloat16),), target="cuda:sm90")
    values = [n.meta["val"] for n in program.graph.nodes if n.op == "call_function"]
    assert any(isinstance(v, torch.Tensor) and v.dtype == FP8 for v in values) == (block == (128, 128))


def test_any_module_takes_a_state_dict_of_any_format():
    weight, scale = quantize(torch.randn(64, 48), "block", (32, 32))
    config = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    module = ctfp8.load_state_dict(nn.Linear(48, 64, bias=False), {"weight": weight, "weight_scale_inv": scale}, config)
    assert torch.equal(
        module.weight, (weight.float() * scale.repeat_interleave(32, 0)[:64].repeat_interleave(32, 1)[:, :48])
    )


def test_the_bound_of_fbgemm_is_honoured_where_activations_are_quantized(tmp_path):
    def bound(state, config):
        config["activation_scale_ub"] = 0.5

    folder = respell(DATA / "llama/FP8_DYNAMIC", tmp_path / "in", "fbgemm_fp8", bound)
    model = ctfp8.from_pretrained(folder)
    program = ctfp8.lower(model, (IDS,), {"use_cache": False}, target="cuda:sm90")
    clamped = [n for n in program.graph.nodes if n.target is torch.ops.aten.clamp_max.default and n.args[1] == 0.5]
    assert len(clamped) == 8  # one for each quantized activation: q, k, v and gate, up share theirs
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    fp8, scale = torch.ops.ctfp8.quantize_per_token(x, 0.5)
    want = x.float().abs().amax(1, keepdim=True).clamp(max=0.5) / 448
    assert torch.equal(scale, want)
    assert torch.equal(fp8.float(), (x.float() / want).clamp(-448, 448).to(torch.float8_e4m3fn).float())


Q = "model.layers.0.self_attn.q_proj"


def _set(**fields):
    def change(state, config):
        config.get("quantization", config).update(fields)

    return change


def _drop(field):
    return lambda state, config: config.pop(field)


def _tensor(name, make):
    def change(state, config):
        state[name] = make(state[name])

    return change


def _e5m2(state, config):
    state[f"{Q}.weight"] = state[f"{Q}.weight"].float().to(torch.float8_e5m2)


def _twice(state, config):
    state[f"{Q}.weight_scale"] = state[f"{Q}.weight_scale_inv"].clone()


@pytest.mark.parametrize(
    ("name", "format", "change", "sentence"),
    [
        ("llama/FP8_BLOCK", "fp8", _set(weight_block_size=[128]), r"weight_block_size=\[128\] is not two positive sizes"),
        ("llama/FP8_BLOCK", "fp8", _set(activation_scheme="sometimes"), "activation_scheme='sometimes'"),
        ("llama/FP8_BLOCK", "fp8", _set(scale_fmt="e4m3"), "scale_fmt='e4m3'"),
        ("llama/FP8_BLOCK", "fp8", _set(fmt="e5m2"), "fmt='e5m2' is not supported"),
        ("llama/FP8_BLOCK", "fp8", _set(expert_dtype="fp4"), "expert_dtype='fp4'"),
        ("llama/FP8_BLOCK", "fp8", _set(modules_to_not_convert="lm_head"), "not a list of module names"),
        ("llama/FP8_BLOCK", "fp8", _set(modules_to_not_convert=["(q_proj"]), "is not a regular expression"),
        ("llama/FP8_BLOCK", "fp8", _e5m2, f"{Q}.weight .*F8_E5M2.*only float8_e4m3fn is read as a weight"),
        ("llama/FP8_BLOCK", "fp8", _twice, "both give .*q_proj.weight_scale"),
        ("llama/FP8_BLOCK", "fp8", _tensor(f"{Q}.weight_scale_inv", torch.reciprocal), "look like the reciprocals"),
        ("llama/FP8_BLOCK", "fp8", _tensor(f"{Q}.weight_scale_inv", lambda t: t * float("nan")), "scale nan"),
        ("llama/FP8_BLOCK", "fp8", _tensor(f"{Q}.weight", lambda t: t.float().bfloat16()), "its numbers are FP8 values, which .* was not multiplied into"),
        ("llama/FP8_BLOCK", "fp8", _tensor(f"{Q}.weight", lambda t: t.view(torch.int8)), f"{Q}.weight .*in another format than FP8"),
        ("llama/FP8_BLOCK", "fp8", _tensor(f"{Q}.weight_scale_inv", lambda t: -t), "scales must be finite and positive"),
        ("llama/FP8_BLOCK", "fp8", lambda s, c: s.pop(f"{Q}.weight_scale_inv"), f"{Q}.weight .*FP8 weight without a scale"),
        ("llama/FP8_BLOCK", "fp8", lambda s, c: s.pop(f"{Q}.weight"), f"{Q}.weight"),
        ("llama/FP8_BLOCK", "fp8", lambda s, c: s[f"{Q}.weight"].view(torch.uint8)[2, 2].fill_(0x7F), "holds NaN values"),
        ("llama/FP8_BLOCK", "fp8", _set(weight_block_size=[128, 0]), r"weight_block_size=\[128, 0\] is not two positive sizes"),
        ("llama/FP8_BLOCK", "fp8", _set(weight_block_size="128x128"), "weight_block_size='128x128' is not two"),
        ("llama/MXFP8", "fp8-mx", lambda s, c: s[f"{Q}.weight_scale_inv"][3].fill_(255), "weight_scale_inv .*scale nan"),
        ("llama/MXFP8", "fp8-mx", _tensor(f"{Q}.weight_scale_inv", lambda t: torch.rand(t.shape)), "no powers of two, but"),
        ("llama/MXFP8", "fp8-mx", lambda s, c: s[f"{Q}.weight_scale_inv"].copy_(254 - s[f"{Q}.weight_scale_inv"]), "reciprocals"),
        ("llama/FP8", "fp8-static", _tensor(f"{Q}.activation_scale", torch.neg), "scales must be finite and positive"),
        ("llama/FP8", "modelopt", _set(quant_algo="NVFP4"), "quant_algo='NVFP4' is not supported; known are 'FP8'"),
        ("llama/FP8", "modelopt-side-file", _set(quant_algo=None), "quant_algo=None"),
        ("llama/FP8", "modelopt-side-file", _set(exclude_modules="lm_head"), "exclude_modules is not a list of module names"),
        ("llama/FP8", "modelopt", _tensor(f"{Q}.weight_scale", lambda t: 1 / t), "look like the reciprocals"),
        ("llama/FP8_DYNAMIC", "fbgemm_fp8", _set(activation_scale_ub="1200"), "activation_scale_ub='1200'"),
        ("llama/FP8_DYNAMIC", "fbgemm_fp8", _set(activation_scale_ub=float("nan")), "activation_scale_ub=nan"),
        ("llama/FP8_DYNAMIC", "fbgemm_fp8", _tensor(f"{Q}.weight_scale", lambda t: t * float("inf")), "scale inf"),
        ("llama/FP8_DYNAMIC", "fbgemm_fp8", _set(activation_scale_ub=-1), "activation_scale_ub=-1"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_said(name, format, change, sentence, tmp_path):
    folder = respell(DATA / name, tmp_path / "in", format, change)
    with pytest.raises((ctfp8.CheckpointError, ctfp8.SchemeError), match=sentence):
        ctfp8.from_pretrained(folder)


def test_a_side_file_that_is_not_modelopts(tmp_path):
    folder = respell(DATA / "llama/FP8", tmp_path / "in", "modelopt-side-file")
    whole = (folder / "hf_quant_config.json").read_text()
    for content, sentence in (
        ("{", "not valid JSON"), ("[]", "no object 'quantization'"), (whole[: len(whole) // 2], "not valid JSON"),
        ("", "not valid JSON"), ('{"quantization": []}', "no object 'quantization'"),
    ):  # fmt: skip
        (folder / "hf_quant_config.json").write_text(content)
        with pytest.raises(ctfp8.SchemeError, match=sentence):
            ctfp8.from_pretrained(folder)


def test_prepare_names_the_door_for_other_format(tmp_path):
    folder = respell(DATA / "llama/FP8_BLOCK", tmp_path / "in", "fp8")
    stock = AutoModelForCausalLM.from_pretrained(folder)  # dequantized here; on a GPU its modules are others
    with pytest.raises(ctfp8.UsageError, match="not loaded from a quantized checkpoint"):
        ctfp8.prepare(stock)
    stock.config.quantization_config = FineGrainedFP8Config()
    with pytest.raises(ctfp8.UsageError, match="Load this one with ctfp8.from_pretrained"):
        ctfp8.prepare(stock)


def test_modules_are_left_alone_as_transformers_and_modelopt_read_the_lists():
    fp8 = {"quant_method": "fp8", "modules_to_not_convert": ["model.layers.1", "lm_head", "mlp.gate"]}
    names = ["model.layers.1.mlp.up_proj", "model.layers.11.mlp.up_proj", "lm_head", "model.layers.2.mlp.gate",
             "model.layers.2.mlp.gate_proj", "model.mlp.gate.extra"]  # fmt: skip
    stock = [not should_convert_module(name, fp8["modules_to_not_convert"]) for name in names]
    assert [Schemes(fp8).ignores(name) for name in names] == stock == [True, False, True, True, False, False]
    modelopt = {
        "quant_method": "modelopt",
        "quant_algo": "FP8",
        "exclude_modules": ["*.gate", "model.layers.1*", "head"],
    }
    schemes = Schemes(modelopt)
    assert [schemes.ignores(n) for n in ("a.gate", "a.gate_proj", "model.layers.11.x", "head", "head.x", "a.head")] == [
        True, False, True, True, True, False
    ]  # fmt: skip


def _plain(spelling, strategy):
    """A module of two Linears and its state dict in a spelling, and what their weights are."""
    module = nn.Sequential(nn.Linear(256, 384, bias=False), nn.Linear(384, 64, bias=False))
    state, truth = {}, []
    for name in "01":
        weight = module.get_parameter(f"{name}.weight").detach()
        rows, cols = weight.shape
        if strategy == "mx":
            scale = torch.randint(116, 120, (rows, cols // 32), dtype=torch.uint8)
            fp8 = (torch.randn(rows, cols) * 50).to(torch.float8_e4m3fn)
            wide = torch.exp2(scale.double() - 127).repeat_interleave(32, 1).float()
        else:
            fp8, scale = quantize(weight, strategy)
            wide = scale
            if strategy == "block":
                wide = scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :cols]
        state[f"{name}.weight"], state[f"{name}.{spelling}"] = fp8, scale
        truth.append(fp8.float() * wide)
    return module, state, truth


@pytest.mark.parametrize("spelling", ["weight_scale", "scale_weight", "weight_scale_inv"])
@pytest.mark.parametrize("strategy", ["tensor", "channel", "block", "mx"])
def test_a_plain_state_dict_says_its_scheme_by_the_shapes_of_its_scales(spelling, strategy):
    module, state, truth = _plain(spelling, strategy)
    if spelling == "scale_weight":
        state["scaled_fp8"] = torch.empty(0, dtype=torch.float8_e4m3fn)
    with pytest.warns(UserWarning, match="2 weights, such as 0: strategy .*activation none"):
        ctfp8.load_state_dict(module, state, None)
    assert torch.equal(module[0].weight, truth[0])
    assert torch.equal(module[1].weight, truth[1])


def test_a_plain_state_dict_of_several_schemes_and_with_static_activations():
    module, state, truth = _plain("scale_weight", "tensor")
    _, other, _ = _plain("scale_weight", "channel")
    state |= {key: value for key, value in other.items() if key.startswith("1")}
    state["0.scale_input"] = torch.tensor(0.02)
    with pytest.warns(UserWarning, match="activation tensor; weight 1: strategy channel"):
        ctfp8.load_state_dict(module, state, None)
    schemes = {name: d.info.scheme for name, _, d in quantized_parameters(module)}
    assert (schemes["0.weight"].activation, schemes["1.weight"].strategy) == ("tensor", "channel")
    assert torch.equal(module[0].weight, truth[0])
    state["1.scale_weight"] = torch.rand(3, 7)
    with pytest.raises(ctfp8.SchemeError, match="its shape does not say how"):
        ctfp8.load_state_dict(_plain("scale_weight", "tensor")[0], state, None)
    with pytest.raises(ctfp8.SchemeError, match="no FP8 weight with a scale"):
        ctfp8.load_state_dict(nn.Linear(2, 2), nn.Linear(2, 2).state_dict(), None)
