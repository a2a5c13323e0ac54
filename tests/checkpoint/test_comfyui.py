"""ComfyUI's single files: read by their own arithmetic in float64, kept in FP8, given back bit for bit, compiled to one graph.

`tests/data/comfyui/kitchen.safetensors` was written by comfy-kitchen 0.2.40, whose tensors ComfyUI saves, with the markers
that ComfyUI's `state_dict` puts beside them.
"""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from conftest import DATA, relative_error
from safetensors.torch import load_file, safe_open, save_file
from torch import nn

import ctfp8_compile as ctfp8
from ctfp8_compile.model.parametrization import quantized_parameters
from ctfp8_compile.ops import FP8

KITCHEN = DATA / "comfyui/kitchen.safetensors"
PREFIX = "model.diffusion_model."


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(64, 96), nn.Linear(64, 96), nn.Linear(96, 64)
        self.wide, self.head = nn.Linear(64, 160), nn.Linear(160, 8)

    def forward(self, x):
        y = self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return self.head(torch.tanh(self.wide(y)))


def untiled(scale, rows, cols):
    """Row 32a + b, column c of a tile of 128×4 is at row b, column 4a + c of it: one by one, as cuBLAS documents it."""
    flat, tiles = scale.view(torch.uint8).reshape(-1), scale.shape[1] // 4
    out = torch.empty(rows, cols, dtype=torch.float64)
    for r in range(rows):
        for c in range(cols):
            at = ((r // 128) * tiles + c // 4) * 512 + (r % 32) * 16 + ((r % 128) // 32) * 4 + c % 4
            out[r, c] = 2.0 ** (int(flat[at]) - 127)
    return out


def truth(state, prefix=PREFIX):
    """The values of all tensors of a file in float64."""
    out = {}
    for name, tensor in state.items():
        stem, _, leaf = name.removeprefix(prefix).rpartition(".")
        if leaf not in ("weight", "bias") or not name.startswith(prefix):
            continue
        scale = next(
            (state[n] for n in (f"{prefix}{stem}.weight_scale", f"{prefix}{stem}.scale_weight") if n in state), None
        )
        fp8 = tensor.view(FP8) if tensor.dtype == torch.uint8 else tensor
        value = fp8.double()
        if leaf == "weight" and fp8.dtype == FP8:
            mx = scale.dtype in (torch.uint8, torch.float8_e8m0fnu)
            value = value * (
                untiled(scale, value.shape[0], value.shape[1] // 32).repeat_interleave(32, 1) if mx else scale.double()
            )
        out[f"{stem}.{leaf}"] = value
    return out


def plain(state, module=Block, prefix=PREFIX):
    twin = module().double()
    twin.load_state_dict(truth(state, prefix))
    return twin.eval()


def as_bytes(state, meta):
    for name in [n for n, t in state.items() if t.dtype == FP8]:
        state[name] = state[name].view(torch.uint8)


def e8m0_as_bytes(state, meta):
    for name in [n for n, t in state.items() if t.dtype == torch.float8_e8m0fnu]:
        state[name] = state[name].view(torch.uint8)


def in_header(state, meta, prefix=PREFIX, text=False):
    layers = {}
    for name in [n for n in state if n.endswith(".comfy_quant")]:
        words = json.loads(bytes(state.pop(name).tolist()))
        layers[prefix + name.removesuffix(".comfy_quant").removeprefix(PREFIX)] = words["format"] if text else words
    meta["_quantization_metadata"] = json.dumps({"format_version": "1.0", "layers": layers})


def scaled(state, meta, elements=0):
    """The form of files before `comfy_quant`, without MXFP8."""
    for layer in ("down", "wide"):
        weight = torch.randn(state[f"{PREFIX}{layer}.weight"].shape)
        scale = weight.abs().max() / 448
        state[f"{PREFIX}{layer}.weight"], state[f"{PREFIX}{layer}.weight_scale"] = (weight / scale).to(FP8), scale
    for name in [n for n in state if n.endswith(".comfy_quant")]:
        del state[name]
    for name in [n for n in state if n.endswith(".weight_scale")]:
        state[name.replace("weight_scale", "scale_weight")] = state.pop(name)
        state[name.replace("weight_scale", "scale_input")] = torch.tensor(0.03)
    state[f"{PREFIX}scaled_fp8"] = torch.empty(elements, dtype=FP8)


def static(state, meta):
    for layer in ("up", "gate"):
        state[f"{PREFIX}{layer}.input_scale"] = torch.tensor(0.02)


def with_others(state, meta):
    state["first_stage_model.decoder.weight"] = torch.ones(3, 3)
    state["text_encoders.t5.scaled_fp8"] = torch.empty(0, dtype=FP8)


def attention(state, meta):
    words = json.dumps({"attention": "comfy_kitchen_int8"}).encode()
    state[f"{PREFIX}attn.comfy_attention.config"] = torch.tensor(list(words), dtype=torch.uint8)


def dirty_tiles(state, meta):
    scale = state[f"{PREFIX}down.weight_scale"].view(torch.uint8)
    assert (scale == 0).any()
    state[f"{PREFIX}down.weight_scale"] = torch.where(scale == 0, 7, scale)


def renamed(prefix):
    def change(state, meta):
        for name in list(state):
            state[name.replace(PREFIX, prefix, 1)] = state.pop(name)

    return change


CHANGES = {
    "as written": lambda state, meta: None,
    "fp8 in u8": as_bytes,
    "scales in u8": e8m0_as_bytes,
    "all in u8": lambda state, meta: (as_bytes(state, meta), e8m0_as_bytes(state, meta)),
    "header": in_header,
    "header, u8": lambda state, meta: (as_bytes(state, meta), in_header(state, meta)),
    "header without the prefix": lambda state, meta: in_header(state, meta, ""),
    "header of words": lambda state, meta: in_header(state, meta, text=True),
    "header of another's layers": lambda state, meta: (in_header(state, meta), meta.update(
        _quantization_metadata=meta["_quantization_metadata"].replace('"layers": {', '"layers": {"other.0": {"format": "float8_e4m3fn"}, ')
    )),
    "scaled_fp8": scaled,
    "scaled_fp8, full precision": lambda state, meta: scaled(state, meta, 2),
    "static inputs": static,
    "other modules": with_others,
    "attention": attention,
    "something between tiles": dirty_tiles,
}  # fmt: skip


def made(tmp_path, change, name="in.safetensors"):
    state, meta = load_file(KITCHEN), {"format": "pt"}
    change(state, meta)
    file = tmp_path / name
    save_file({k: v.contiguous() for k, v in state.items()}, file, meta)
    return file, load_file(file)


def loaded(source):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.device("meta"):
            module = Block()
        return ctfp8.load_state_dict(module, source, None)


@pytest.mark.parametrize("kind", CHANGES)
def test_its_values_are_those_of_the_file(kind, tmp_path):
    file, state = made(tmp_path, CHANGES[kind])
    module = loaded(file)
    for name, value in truth(state).items():
        assert torch.equal(module.get_submodule(name.rpartition(".")[0]).weight if name.endswith("weight") else
                           module.get_parameter(name), value.float()), name  # fmt: skip
    assert {name for name, _, _ in quantized_parameters(module)} == {
        f"{n}.weight" for n in ("up", "gate", "down", "wide")
    }
    x = torch.randn(5, 64)
    assert relative_error(module(x), plain(state)(x.double()).float()) < 1e-5


@pytest.mark.parametrize("kind", CHANGES)
def test_the_file_comes_back_bit_for_bit(kind, tmp_path):
    file, state = made(tmp_path, CHANGES[kind])
    module = loaded(file)
    ctfp8.save_state_dict(module, tmp_path / "out.safetensors")
    again = load_file(tmp_path / "out.safetensors")
    assert again.keys() == {name for name in state if name.startswith(PREFIX)}
    for name, tensor in again.items():
        assert (tensor.dtype, tensor.shape) == (state[name].dtype, state[name].shape), name
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), state[name].reshape(-1).view(torch.uint8)), name
    with safe_open(file, "pt") as before, safe_open(tmp_path / "out.safetensors", "pt") as after:
        assert before.metadata() == after.metadata()
    x = torch.randn(2, 64)
    assert torch.equal(loaded(tmp_path / "out.safetensors")(x), module(x))


@pytest.mark.parametrize("kind", ["as written", "all in u8", "header", "static inputs", "scaled_fp8"])
def test_it_is_one_graph(kind, tmp_path, kernel_everywhere):
    file, state = made(tmp_path, CHANGES[kind])
    module = loaded(file)
    x = torch.randn(5, 64)
    got = torch.compile(module, backend="ctfp8", fullgraph=True)(x)
    assert relative_error(got, plain(state)(x.double()).float()) < 1e-4
    report = ctfp8.explain(module, (x,))
    assert len(report.rewritten) == 4
    assert not report.kept


@pytest.mark.parametrize(
    "prefix", ["", "diffusion_model.", "transformer.", "net.", "model.diffusion_model.transformer."]
)
@pytest.mark.parametrize("as_dict", [False, True])
def test_any_prefix(prefix, as_dict, tmp_path):
    file, state = made(tmp_path, renamed(prefix))
    module = loaded(state if as_dict else file)
    x = torch.randn(2, 64)
    assert relative_error(module(x), plain(state, prefix=prefix)(x.double()).float()) < 1e-5
    assert ctfp8.state_dict(module).keys() == state.keys()


def test_what_is_said_of_inputs(tmp_path):
    def schemes(change):
        found = quantized_parameters(loaded(made(tmp_path, change)[0]))
        return {name.partition(".")[0]: dequantize.info.scheme.activation for name, _, dequantize in found}

    assert schemes(lambda s, m: None) == {"up": "none", "gate": "none", "down": "mx", "wide": "none"}
    assert schemes(static) == {"up": "tensor", "gate": "none", "down": "mx", "wide": "none"}
    assert set(schemes(scaled).values()) == {"tensor"}
    assert set(schemes(lambda s, m: scaled(s, m, 2)).values()) == {"none"}


def test_a_file_that_says_it_itself_needs_no_warning(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ctfp8.load_state_dict(Block(), KITCHEN, None)
        ctfp8.load_state_dict(Block(), load_file(KITCHEN))
    file, _ = made(tmp_path, with_others)
    with pytest.warns(UserWarning, match="2 tensors, such as first_stage_model.decoder.weight: not of this module"):
        ctfp8.load_state_dict(Block(), file, None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_tensors_held_in_a_smaller_dtype_come_back_too(dtype, tmp_path):
    def wider(state, meta):
        state[f"{PREFIX}head.weight"] = torch.randn(8, 160, dtype=torch.float32)

    file, state = made(tmp_path, wider)
    module = ctfp8.load_state_dict(Block().to(dtype), file, None)
    for name, tensor in ctfp8.state_dict(module).items():
        assert tensor.dtype == state[name].dtype
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), state[name].reshape(-1).view(torch.uint8)), name


def test_a_convolution_is_not_read_and_the_cure_works():
    module = nn.Sequential(nn.Conv2d(8, 16, 3))
    scale = torch.tensor(0.01)
    state = {"0.weight": (module[0].weight.detach() / scale).to(FP8), "0.weight_scale": scale,
             "0.bias": module[0].bias.detach().clone(), "1.weight": torch.ones(4, 4).to(FP8), "1.weight_scale": scale}  # fmt: skip
    module.append(nn.Linear(4, 4, bias=False))
    with (
        pytest.warns(UserWarning, match="no quantization_config"),
        pytest.raises(ctfp8.CheckpointError, match="0.weight .*more than three dimensions, as convolutions have"),
    ):
        ctfp8.load_state_dict(module, state, None)
    state["0.weight"] = state["0.weight"].float() * state.pop("0.weight_scale")
    with pytest.warns(UserWarning, match="no quantization_config"):
        ctfp8.load_state_dict(module, state, None)
    assert torch.equal(module[0].weight, state["0.weight"])


def quant(layer, **words):
    def change(state, meta):
        state[f"{PREFIX}{layer}.comfy_quant"] = torch.tensor(list(json.dumps(words).encode()), dtype=torch.uint8)

    return change


def put(name, tensor):
    return lambda state, meta: state.update({PREFIX + name: tensor})


def header(text):
    return lambda state, meta: meta.update(_quantization_metadata=text)


def no_words(state, meta):
    as_bytes(state, meta)
    for name in [n for n in state if n.endswith(".comfy_quant")]:
        del state[name]


BAD = [
    (quant("up", format="nvfp4"), "up: .*up.comfy_quant says format='nvfp4', which is not read; known are .*Load the file with ComfyUI"),
    (quant("up", format="float8_e5m2"), "format='float8_e5m2', which is not read"),
    (quant("up", format="int8_tensorwise", convrot=True), "format='int8_tensorwise', which is not read"),
    (quant("up", format="float8_e4m3fn", convrot=True), "convrot=True, so its weight was rotated"),
    (quant("up", format="float8_e4m3fn", params={"convrot": True}), "convrot=True, so its weight was rotated"),
    (quant("up"), "format=None, which is not read"),
    (put("up.comfy_quant", torch.tensor(list(b"{"), dtype=torch.uint8)), "up.comfy_quant is not valid JSON"),
    (put("up.comfy_quant", torch.tensor(list(b"[1]"), dtype=torch.uint8)), "up.comfy_quant is not a JSON object"),
    (header("{"), "_quantization_metadata in the file's header is not valid JSON"),
    (header("{}"), "has no object 'layers'"),
    (header('{"layers": {"x": 3}}'), "says nothing that is known of x: 3"),
    (header(json.dumps({"layers": {f"{PREFIX}absent": {"format": "mxfp8"}}})), "absent.weight: .*is not there"),
    (header(json.dumps({"layers": {f"{PREFIX}up": {"format": "mxfp8"}}})), "says another format than _quantization_metadata"),
    (put("down.weight_scale", torch.zeros(64, 3, dtype=torch.uint8)), "down.weight_scale .*expected \\[128, 4\\], U8 or F8_E8M0"),
    (put("down.weight_scale", torch.ones(128, 4)), "down.weight_scale .*not the scales of mxfp8"),
    (put("up.pre_quant_scale", torch.ones(64)), "up.pre_quant_scale .*changes the values of up"),
    (put("up.weight_scale", torch.tensor(float("nan"))), "up.weight_scale .*scale nan"),
    (put("up.weight_scale", torch.tensor(0.0)), "up.weight_scale .*scale 0.0"),
    (lambda s, m: (scaled(s, m), s.update({f"{PREFIX}scaled_fp8": torch.empty(0, dtype=torch.float8_e5m2)})), "scaled_fp8 .*float8_e5m2"),
    (lambda s, m: s.pop(f"{PREFIX}up.weight_scale"), "up.weight .*FP8 weight without a scale"),
    (lambda s, m: s.pop(f"{PREFIX}head.weight"), "head.weight: the module needs it, the state dict lacks it"),
    (no_words, "down.weight .*nothing says what its bytes stand for.*Give the file's path"),
    (put("more.weight", torch.ones(2, 2)), "more.weight: in the state dict, but the module has no such parameter"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD)
@pytest.mark.filterwarnings("ignore")
def test_what_is_not_read_is_said_before_anything_is_loaded(change, message, tmp_path):
    file, _ = made(tmp_path, change)
    module = Block()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises((ctfp8.CheckpointError, ctfp8.SchemeError), match=f"(?s){message}"):
        ctfp8.load_state_dict(module, file, None)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_bytes_in_a_dict_whose_header_is_lost(tmp_path):
    file, state = made(tmp_path, CHANGES["header, u8"])
    with pytest.raises(
        ctfp8.CheckpointError, match="down.weight .*which the header of a file may have, and a dict .*has not"
    ):
        ctfp8.load_state_dict(Block(), state, None)
    assert loaded(file)(torch.ones(1, 64)).isfinite().all()  # the cure


def test_unknown_words_are_named():
    state = load_file(KITCHEN)
    quant("up", format="float8_e4m3fn", flavour="mint")(state, {})
    with pytest.warns(UserWarning, match="model.diffusion_model.up.weight: flavour: unknown words of its layer"):
        ctfp8.load_state_dict(Block(), state, None)


def test_two_that_say_it(tmp_path):
    config = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    with pytest.raises(ctfp8.SchemeError, match="down.comfy_quant .*so does the quantization_config .*Pass None"):
        ctfp8.load_state_dict(Block(), load_file(KITCHEN), config)


def test_modules_that_were_not_loaded_here_and_files_that_are_in_use(tmp_path):
    with pytest.raises(ctfp8.UsageError, match="not loaded by ctfp8.load_state_dict"):
        ctfp8.state_dict(Block())
    file, _ = made(tmp_path, lambda s, m: None)
    with pytest.raises(ctfp8.UsageError, match="mapped from that file"):
        ctfp8.save_state_dict(loaded(file), file)
    with pytest.raises(ctfp8.CheckpointError, match="no such file"):
        ctfp8.load_state_dict(Block(), tmp_path / "absent.safetensors", None)


def test_a_weight_padded_to_whole_blocks_is_cut_as_the_error_says():
    words = torch.tensor(list(b'{"format": "mxfp8"}'), dtype=torch.uint8)
    padded = torch.zeros(128, 64)
    padded[:100] = torch.arange(6400).reshape(100, 64) / 1000
    state = {
        "weight": padded.to(FP8),
        "weight_scale": torch.full((128, 4), 126, dtype=torch.uint8),
        "comfy_quant": words,
    }
    state = {f"up.{name}": tensor for name, tensor in state.items()}
    module = nn.ModuleDict({"up": nn.Linear(64, 100, bias=False)})
    with pytest.raises(ctfp8.CheckpointError, match=r"up.weight \(.* \[128, 64\] .* declares \[100, 64\]") as error:
        ctfp8.load_state_dict(module, state)
    assert str(error.value).endswith("cut it: weight[:100].")
    state["up.weight"] = state["up.weight"][:100]
    ctfp8.load_state_dict(module, state)
    want = padded[:100].to(FP8).float() / 2
    assert torch.equal(module["up"].weight, want)
