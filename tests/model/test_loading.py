"""Loading real llm-compressor checkpoints: everything stays FP8, is bit-exact, and saves back to the same bits."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize as ct_dequantize
from conftest import CHECKPOINTS, DATA, FP8_PARAMETERS, IDS, fp8_config, logits, quantize, relative_error
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

import ctfp8_compile as ctfp8
from ctfp8_compile.model.freeze import dequantize_
from ctfp8_compile.model.parametrization import quantized_parameters, stored_weight
from ctfp8_compile.ops import FP8


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_quantized_weight_stays_fp8(name, load):
    model = load(name)
    found = list(quantized_parameters(model))
    assert len(found) == FP8_PARAMETERS[name.split("/")[0]]
    for path, owner, dequantize in found:
        weight = stored_weight(owner, path.rpartition(".")[2])
        assert weight.dtype == FP8
        assert dequantize.weight_scale.dtype == torch.float32
    in_file = sum(t.numel() for t in load_file(DATA / name / "model.safetensors").values() if t.dtype == FP8)
    assert in_file == sum(p.numel() for p in model.parameters() if p.dtype == FP8)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_close_to_the_dense_twin(name, load):
    dense = AutoModelForCausalLM.from_pretrained(DATA / name.split("/")[0] / "dense").eval()
    assert relative_error(logits(load(name)), logits(dense)) < 0.1


@pytest.mark.parametrize("name", [c for c in CHECKPOINTS if not c.startswith("mixtral")])
def test_same_logits_as_transformers_dequantized(name, load):
    """transformers initialises Mixtral's experts at random from these files, so it is no witness there."""
    stock = AutoModelForCausalLM.from_pretrained(
        DATA / name, quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    assert torch.equal(logits(load(name)), logits(stock.eval()))


@pytest.mark.parametrize("name", ["mixtral/FP8_DYNAMIC", "mixtral/FP8", "mixtral/FP8_BLOCK"])
def test_mixtral_experts_against_the_file(name, load):
    file = load_file(DATA / name / "model.safetensors")
    args = QuantizationArgs(num_bits=8, type="float", symmetric=True,
                            strategy={"FP8_DYNAMIC": "channel", "FP8": "tensor", "FP8_BLOCK": "block"}[name.split("/")[1]],
                            block_structure=[128, 128] if name.endswith("BLOCK") else None)  # fmt: skip
    for layer in range(2):
        experts = load(name).model.layers[layer].mlp.experts
        prefix = f"model.layers.{layer}.block_sparse_moe.experts"

        def dense(e, which, prefix=prefix):
            weight, scale = (file[f"{prefix}.{e}.{which}_proj.{leaf}"] for leaf in ("weight", "weight_scale"))
            return ct_dequantize(weight.float(), scale.float(), args=args, dtype=torch.float32).to(torch.bfloat16)

        for e in range(4):
            assert torch.equal(experts.gate_up_proj[e], torch.cat([dense(e, "gate"), dense(e, "up")]))
            assert torch.equal(experts.down_proj[e], dense(e, "down"))


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_saving_gives_the_source_back(name, load, tmp_path):
    ctfp8.save_pretrained(load(name), tmp_path)
    before, after = load_file(DATA / name / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert (tensor.dtype, tensor.shape) == (after[key].dtype, after[key].shape), key
        assert torch.equal(tensor.view(torch.uint8), after[key].view(torch.uint8)), key
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    assert torch.equal(logits(ctfp8.from_pretrained(tmp_path)), logits(load(name)))


def test_transformers_loads_what_we_save(load, tmp_path):
    load("llama/FP8_DYNAMIC").save_pretrained(tmp_path)
    quantization = CompressedTensorsConfig(dequantize=True)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantization).eval()
    assert torch.equal(logits(stock), logits(load("llama/FP8_DYNAMIC")))


@pytest.mark.parametrize("name", ["llama/FP8_BLOCK", "qwen3moe/FP8"])
def test_dequantize_gives_a_plain_model(name, load, tmp_path):
    model = ctfp8.from_pretrained(DATA / name, dequantize=True)
    assert torch.equal(logits(model), logits(load(name)))
    assert not any(p.dtype == FP8 for p in model.parameters())
    model.train().requires_grad_(True).to(torch.float32)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def test_sharded_checkpoint(load, tmp_path):
    ctfp8.save_pretrained(load("qwen3moe/FP8_DYNAMIC"), tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(logits(ctfp8.from_pretrained(tmp_path)), logits(load("qwen3moe/FP8_DYNAMIC")))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_dtype_is_what_weights_dequantize_to(dtype, load):
    model = ctfp8.from_pretrained(DATA / "llama/FP8_DYNAMIC", dtype=dtype)
    assert model.model.layers[0].mlp.up_proj.weight.dtype == dtype
    assert relative_error(logits(model), logits(load("llama/FP8_DYNAMIC"))) < 0.02


def test_device_map(load):
    model = ctfp8.from_pretrained(DATA / "mixtral/FP8_DYNAMIC", device_map={"": "cpu"})
    assert torch.equal(logits(model), logits(load("mixtral/FP8_DYNAMIC")))


def test_tied_weights(tmp_path):
    """A tied model's file has one bf16 embedding and no head; both stay one tensor."""
    folder = _edited("llama/FP8_DYNAMIC", tmp_path, drop=["lm_head.weight"], config={"tie_word_embeddings": True})
    model = ctfp8.from_pretrained(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ctfp8.save_pretrained(model, tmp_path / "out")
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")


def test_fp8_head_of_a_tied_model_is_its_own_weight(tmp_path):
    """llm-compressor quantizes a tied head separately: the file's FP8 copy is what the head must use."""
    dense = load_file(DATA / "llama/dense" / "model.safetensors")["model.embed_tokens.weight"]
    weight, scale = quantize(dense.float())
    quantization = fp8_config()
    folder = _edited(
        "llama/FP8_DYNAMIC", tmp_path, config={"tie_word_embeddings": True, "quantization_config": quantization},
        add={"lm_head.weight": weight, "lm_head.weight_scale": scale},
    )  # fmt: skip
    model = ctfp8.from_pretrained(folder)
    assert "lm_head.weight" in {name for name, _, _ in quantized_parameters(model)}
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16


def test_mixed_groups(tmp_path):
    """Two groups of FP8: attention per channel, MLP per tensor with another activation scheme."""
    dense = load_file(DATA / "llama/dense" / "model.safetensors")
    config = fp8_config()
    second = copy.deepcopy(config["config_groups"]["group_0"])
    second["targets"], second["weights"]["strategy"], second["input_activations"] = ["re:.*mlp.*"], "tensor", None
    config |= {"config_groups": {**config["config_groups"], "group_1": second}, "ignore": ["lm_head"]}
    state = {}
    for name, tensor in dense.items():
        state[name] = tensor
        if name.endswith("_proj.weight"):
            state[name], state[name + "_scale"] = quantize(tensor.float(), "tensor" if ".mlp." in name else "channel")
    folder = _edited("llama/FP8_DYNAMIC", tmp_path, state=state, config={"quantization_config": config})
    model = ctfp8.from_pretrained(folder)
    schemes = {name.split(".")[3]: d.info.scheme for name, _, d in quantized_parameters(model)}
    assert (schemes["self_attn"].strategy, schemes["mlp"].strategy) == ("channel", "tensor")
    assert (schemes["self_attn"].activation, schemes["mlp"].activation) == ("token", "none")
    twin = AutoModelForCausalLM.from_pretrained(DATA / "llama" / "dense").eval()
    assert relative_error(logits(model), logits(twin)) < 0.1


class _Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(40, 24)
        self.down = nn.Linear(24, 40, bias=False)
        self.register_buffer("shift", torch.zeros(40))

    def forward(self, x):
        return self.down(self.up(x).relu()) + self.shift


def _own_state():
    torch.manual_seed(0)
    state = dict(_Own().state_dict())
    for name in ("up.weight", "down.weight"):
        state[name], state[name + "_scale"] = quantize(state[name])
    return state


def test_load_state_dict_into_a_plain_module():
    state = _own_state()
    with torch.device("meta"):
        module = _Own()
    ctfp8.load_state_dict(module, state, fp8_config())
    assert {name for name, _, _ in quantized_parameters(module)} == {"up.weight", "down.weight"}
    x = torch.randn(3, 40)
    up, down = ((state[n].float() * state[n + "_scale"]) for n in ("up.weight", "down.weight"))
    want = (x @ up.t() + state["up.bias"]).relu() @ down.t() + state["shift"]
    assert relative_error(module(x), want) < 1e-6


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (lambda s: s.pop("up.weight_scale"), "up.weight_scale or .* is not in the checkpoint"),
        (lambda s: s.pop("up.bias"), "up.bias: the module needs it"),
        (lambda s: s.update(extra=torch.zeros(1)), "extra: in the state dict"),
        (lambda s: s.update({"up.weight": s["up.weight"][:, :20].contiguous()}), r"up.weight .* declares \[24, 40\]"),
        (lambda s: s["up.weight_scale"].fill_(float("nan")), "scale nan"),
        (lambda s: s["down.weight"].view(torch.uint8)[3, 5].fill_(0x7F), "down.weight: holds NaN values"),
    ],
)
def test_load_state_dict_refuses_bad_input(edit, sentence):
    state = _own_state()
    edit(state)
    with pytest.raises(ctfp8.CheckpointError, match=sentence):
        ctfp8.load_state_dict(_Own(), state, fp8_config())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("name", ["", "up", "down", "shift"])
def test_load_state_dict_into_a_module_of_float8(name, dtype):
    """It would be computed in that, or take other weights without a scale. The module is left as it was."""
    module = _Own()
    if name == "shift":
        module.shift = nn.Parameter(module.shift.detach().to(dtype), requires_grad=False)
    else:
        module.get_submodule(name).to(dtype)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    words = (
        rf"^[\w.]+: the module declares it as {str(dtype).removeprefix('torch.')}, which nothing is computed in\. Build"
    )
    with pytest.raises(ctfp8.UsageError, match=words):
        ctfp8.load_state_dict(module, _own_state(), fp8_config())
    assert all(torch.equal(t.view(torch.uint8), before[n].view(torch.uint8)) for n, t in module.state_dict().items())
    ctfp8.load_state_dict(module.float(), _own_state(), fp8_config())


def test_prepare_a_model_that_transformers_loaded(load):
    for name in ("llama/FP8_DYNAMIC", "llama/FP8", "qwen3/FP8_BLOCK"):
        model = ctfp8.prepare(AutoModelForCausalLM.from_pretrained(DATA / name))
        assert len(list(quantized_parameters(model))) == 14
        assert torch.equal(logits(model), logits(load(name)))


def test_prepare_refuses_what_is_already_dequantized():
    with pytest.raises(ctfp8.UsageError, match="experts while loading"):
        ctfp8.prepare(AutoModelForCausalLM.from_pretrained(DATA / "qwen3moe/FP8_DYNAMIC"))
    ran = AutoModelForCausalLM.from_pretrained(DATA / "llama/FP8_DYNAMIC")
    ran(IDS)
    with pytest.raises(ctfp8.UsageError, match="on the first forward pass"):
        ctfp8.prepare(ran)
    with pytest.raises(ctfp8.UsageError, match="not loaded from a quantized checkpoint"):
        ctfp8.prepare(AutoModelForCausalLM.from_pretrained(DATA / "llama/dense"))


@pytest.mark.parametrize(
    "cast", [lambda m: m.half(), lambda m: m.to(torch.float16), lambda m: m.bfloat16(), lambda m: m.float()]
)
def test_casts_are_refused_before_anything_is_cast(cast):
    model = ctfp8.from_pretrained(DATA / "llama/FP8_DYNAMIC")
    before = logits(model)
    with pytest.raises(ctfp8.UsageError, match="changing its dtype"):
        cast(model)
    assert torch.equal(logits(model.to("cpu")), before)


def test_training_and_pickling_are_refused(tmp_path):
    model = ctfp8.from_pretrained(DATA / "llama/FP8_DYNAMIC")
    for use in (lambda: model.train(), lambda: model.requires_grad_(True)):
        with pytest.raises(ctfp8.UsageError, match="for inference"):
            use()
    with pytest.raises(ctfp8.UsageError, match="save_pretrained"):
        torch.save(model, tmp_path / "model.pt")
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))


def test_a_deep_copy_made_plain_leaves_the_model_as_it_was():
    model = ctfp8.from_pretrained(DATA / "llama/FP8_DYNAMIC")
    before = logits(model)
    plain = dequantize_(copy.deepcopy(model))
    assert not [name for name, p in plain.named_parameters() if p.dtype == FP8]
    assert torch.equal(logits(plain), before)
    assert torch.equal(logits(model), before)


def _edited(name, tmp_path, state=None, drop=(), add=None, config=None):
    """A copy of a checkpoint with some tensors and config values changed."""
    folder = tmp_path / "edited"
    folder.mkdir()
    tensors = dict(load_file(DATA / name / "model.safetensors") if state is None else state)
    tensors = {k: v for k, v in tensors.items() if k not in drop} | (add or {})
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    full = json.loads((DATA / name / "config.json").read_text()) | (config or {})
    (folder / "config.json").write_text(json.dumps(full))
    return folder


def test_in_memory_leaves_the_files_before_it_returns(tmp_path):
    shutil.copytree(DATA / "mixtral/FP8_DYNAMIC", tmp_path / "copy")
    model = ctfp8.from_pretrained(tmp_path / "copy", in_memory=True)
    for file in (tmp_path / "copy").glob("*.safetensors"):
        file.write_bytes(b"")  # truncated: to touch a page of it would end the process
    assert torch.equal(logits(model), logits(ctfp8.from_pretrained(DATA / "mixtral/FP8_DYNAMIC")))


@pytest.mark.parametrize("compiled", [False, True])
def test_weights_leave_the_file_when_the_model_first_runs(compiled, tmp_path):
    """A mapped file that is overwritten, or whose pages are dropped, must not matter to a model that runs."""
    shutil.copytree(DATA / "llama/FP8_DYNAMIC", tmp_path / "copy")
    model = ctfp8.from_pretrained(tmp_path / "copy")
    ctfp8.explain(model, (IDS,), {"use_cache": False})
    mapped = [p for p in model.parameters() if not p.untyped_storage().resizable()]
    assert len(mapped) > 14  # neither loading nor tracing has copied them
    run = torch.compile(model, backend="ctfp8") if compiled else model
    before = logits(run)
    for file in (tmp_path / "copy").glob("*.safetensors"):
        file.write_bytes(b"\0" * file.stat().st_size)
    assert torch.equal(logits(run), before)
    assert all(p.untyped_storage().resizable() for p in mapped)
