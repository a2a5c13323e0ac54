"""Checkpoints with one thing changed: an error of ours that names it, or the logits that the changed file stands for.

The reference shares nothing with the loader: it multiplies weights by scales as the definition says, stacks experts by
hand and copies the result into a model of random weights.
"""

from __future__ import annotations

import copy
import functools
import json
import re
import struct
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.forge import FORMATS, SCHEMES, Sizes, forge
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import ctfp8_compile as ctfp8
from ctfp8_compile.ops import FP8

FILE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "quantization_config"
EXAMPLES = 30  # of each kind of change
IDS = torch.arange(3, 19)[None]


@functools.cache
def _source(architecture: str, scheme: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and config of a checkpoint whose weights end in partial blocks."""
    with tempfile.TemporaryDirectory() as folder:
        sizes = Sizes(hidden=160, intermediate=224, expert=96) if scheme == "MXFP8" else Sizes(144, 136, 80)
        made = forge(architecture, scheme, Path(folder), sizes=sizes).folder
        return load_file(made / FILE), json.loads((made / "config.json").read_text())


@dataclass
class Draft:
    """A checkpoint being changed. `after` are changes of the files themselves, once they are written."""

    folder: Path
    tensors: dict[str, Tensor]
    config: dict[str, Any]
    draw: Callable[..., Any]
    after: Callable[[Path], None] = lambda folder: None

    @property
    def quantization(self) -> dict[str, Any]:
        return self.config[CONFIG]

    @property
    def group(self) -> dict[str, Any]:
        return self.quantization["config_groups"]["group_0"]

    def pick(self, having: Callable[[str, Tensor], bool] = lambda name, tensor: True) -> str:
        return self.draw(st.sampled_from([name for name, t in self.tensors.items() if having(name, t)]))

    def one_of(self, *values: Any) -> Any:
        return self.draw(st.sampled_from(values))

    def write(self) -> None:
        if self.tensors:
            save_file(
                {k: v.contiguous().clone() for k, v in self.tensors.items()}, self.folder / FILE, {"format": "pt"}
            )
        (self.folder / "config.json").write_text(json.dumps(self.config))
        self.after(self.folder)


# --- what is changed: each returns what an error may name ----------------------------------------------------------


def _is_fp8(name: str, tensor: Tensor) -> bool:
    return tensor.dtype == FP8


def _is_scale(name: str, tensor: Tensor) -> bool:
    return name.endswith(("_scale", "_scale_inv"))


def drop(d: Draft) -> list[str]:
    del d.tensors[name := d.pick()]
    return [name]


def drop_several(d: Draft) -> list[str]:
    """A weight with its scales, an expert, a layer."""
    prefix = d.pick(_is_fp8).rpartition(".")[0]
    prefix = prefix.rsplit(".", d.one_of(0, 1, 2))[0] + "."
    names = [name for name in d.tensors if name.startswith(prefix)]
    for name in names:
        del d.tensors[name]
    return names


def rename(d: Draft) -> list[str]:
    name = d.pick()
    d.tensors[d.one_of(name + "x", "model." + name, name.replace("0", "7"), name.replace("_proj", ""))] = d.tensors.pop(
        name
    )
    return [name, *d.tensors]


def swap(d: Draft) -> list[str]:
    first = d.pick()
    second = d.pick(lambda n, t: t.shape == d.tensors[first].shape and t.dtype == d.tensors[first].dtype)
    d.tensors[first], d.tensors[second] = d.tensors[second], d.tensors[first]
    return [first, second]


def add(d: Draft) -> list[str]:
    near = d.pick().rpartition(".")[0]
    leaf = d.one_of("weight_g_idx", "weight_zero_point", "weight_scale", "input_scale", "weight_packed", "bias", "more")
    d.tensors[name := f"{near}.{leaf}"] = d.one_of(
        torch.ones(1), torch.zeros(4, dtype=torch.int64), torch.ones(144, 144).to(FP8), torch.full((144, 1), 0.5)
    )
    return [name]


def duplicate(d: Draft) -> list[str]:
    name, again = d.pick(), d.one_of(True, False)

    def second_shard(folder: Path) -> None:
        save_file({name: d.tensors[name].clone()}, folder / "second.safetensors", {"format": "pt"})
        shards = dict.fromkeys(d.tensors, "first.safetensors") | ({name: "second.safetensors"} if again else {})
        (folder / FILE).rename(folder / "first.safetensors")
        shards |= {"other": "second.safetensors"} if not again else {}
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": shards}))

    d.after = second_shard
    return [name, "other"]


def retype(d: Draft) -> list[str]:
    name = d.pick()
    to = d.one_of(torch.float8_e5m2, torch.bfloat16, torch.float32, torch.float16, torch.int8, torch.uint8, FP8)
    d.tensors[name] = d.tensors[name].float().to(to)
    return [name]


def reinterpret(d: Draft) -> list[str]:
    """The same bytes under another dtype."""
    name = d.pick()
    d.tensors[name] = d.tensors[name].contiguous().view(d.one_of(torch.int8, torch.uint8, torch.float8_e5m2, FP8))
    return [name]


def reshape(d: Draft) -> list[str]:
    name = d.pick()
    edits: list[Callable[[Tensor], Tensor]] = [
        lambda t: t.t() if t.dim() == 2 else t[None],
        lambda t: t.reshape(-1),
        lambda t: t[None],
        lambda t: t.reshape(-1)[: t.numel() // 2],
        lambda t: t[:-1] if t.dim() else t[None, None],
        lambda t: torch.cat([t.float(), t.float()]).to(t.dtype) if t.dim() else t,
        lambda t: t[..., : t.shape[-1] // 2] if t.dim() else t,
        lambda t: t.reshape(-1, 2, t.shape[-1]) if t.dim() == 2 and t.shape[0] % 2 == 0 else t[None],
    ]
    d.tensors[name] = d.one_of(*edits)(d.tensors[name])
    return [name]


def reshape_scale(d: Draft) -> list[str]:
    name = d.pick(_is_scale)
    scale = d.tensors[name]
    d.tensors[name] = d.one_of(
        scale.t() if scale.dim() == 2 else scale[None], scale.reshape(-1), scale[..., :1], scale[:1]
    )
    return [name]


def bad_scale(d: Draft) -> list[str]:
    name = d.pick(_is_scale)
    value = d.one_of(float("nan"), float("inf"), float("-inf"), 0.0, -0.5)
    if d.tensors[name].dtype == torch.uint8:
        value = 255
    flat = d.tensors[name].clone().reshape(-1)
    flat[d.draw(st.integers(0, flat.numel() - 1))] = value
    d.tensors[name] = flat.view(d.tensors[name].shape)
    return [name]


def other_scale(d: Draft) -> list[str]:
    """Scales that are possible, in another dtype too: nothing is wrong with them."""
    name = d.pick(_is_scale)
    factor, dtype = d.one_of(0.25, 1.3, 3.0), d.one_of(torch.float32, torch.bfloat16, torch.float16)
    d.tensors[name] = (d.tensors[name].float() * factor).to(dtype)
    return [name]


def nan_value(d: Draft) -> list[str]:
    name = d.pick(_is_fp8)
    fp8 = d.tensors[name].clone().view(torch.uint8)
    fp8.view(-1)[d.draw(st.integers(0, fp8.numel() - 1))] = d.one_of(0x7F, 0xFF)
    d.tensors[name] = fp8.view(FP8)
    return [name]


def other_value(d: Draft) -> list[str]:
    name = d.pick(_is_fp8)
    fp8 = d.tensors[name].clone().view(torch.uint8)
    fp8.view(-1)[d.draw(st.integers(0, fp8.numel() - 1))] ^= d.one_of(1, 8, 64, 128)
    d.tensors[name] = fp8.view(FP8)
    return [name]


def truncate(d: Draft) -> list[str]:
    keep = d.draw(st.floats(0, 1, exclude_max=True))
    d.after = lambda folder: _edit_bytes(folder / FILE, lambda data: data[: int(keep * len(data))])
    return [FILE]


def extend(d: Draft) -> list[str]:
    tail = d.draw(st.binary(min_size=1, max_size=9))
    d.after = lambda folder: _edit_bytes(folder / FILE, lambda data: data + tail)
    return [FILE]


def flip_header(d: Draft) -> list[str]:
    """One byte of the length or of the JSON that follows it."""
    at, flip = d.draw(st.floats(0, 1, exclude_max=True)), d.draw(st.integers(1, 255))
    in_length = d.one_of(False, False, False, True)

    def change(data: bytearray) -> bytearray:
        size = struct.unpack("<Q", data[:8])[0]
        data[int(at * 8) if in_length else 8 + int(at * size)] ^= flip
        return data

    d.after = lambda folder: _edit_bytes(folder / FILE, change)
    return [FILE, *d.tensors, *(name.rpartition(".")[0] for name in d.tensors)]


def _edit_bytes(file: Path, edit: Callable[[bytearray], bytes]) -> None:
    file.write_bytes(edit(bytearray(file.read_bytes())))


def edit_index(d: Draft) -> list[str]:
    name = d.pick()
    weight_map: dict[str, Any] = dict.fromkeys(d.tensors, FILE)
    index: Any = {"metadata": {}, "weight_map": weight_map}
    shard = d.one_of(
        "gone.safetensors", "../" + FILE, "/tmp/" + FILE, "", ".", "config.json", None, 3, {}, "x/../" + FILE
    )
    text = d.one_of("shard", "extra", "none", "empty", "list", "garbage")
    if text == "shard":
        weight_map[name] = shard
    elif text == "extra":
        weight_map[name + "x"] = FILE
    elif text == "empty":
        weight_map.clear()
    elif text != "garbage":
        index = {"none": None, "list": [weight_map]}[text]
    d.after = lambda folder: (folder / INDEX).write_text("{" if text == "garbage" else json.dumps(index)) and None
    return [INDEX, name, "config.json"]


def edit_scheme(d: Draft) -> list[str]:
    key, values = d.one_of(
        ("strategy", ["tensor", "channel", "block", "group", "token", "tensor_group", "unknown", None]),
        ("block_structure", [[64, 64], [128, 64], [0, 128], [128], "128x128", [-1, -1], None, [144, 144]]),
        ("group_size", [32, 128, -1, 0]),
        ("num_bits", [4, 16, "8", 0, None]),
        ("type", ["int", "float", "unknown"]),
        ("symmetric", [False, None]),
        ("actorder", ["group", "weight", "unknown"]),
        ("scale_dtype", ["torch.uint8", "unknown"]),
    )
    d.group["weights"][key] = d.one_of(*values)
    return [CONFIG, *d.tensors]


def edit_activations(d: Draft) -> list[str]:
    if d.group["input_activations"] is None:
        d.group["input_activations"] = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
    else:
        key = d.one_of("strategy", "dynamic", "num_bits", "type", "symmetric", "group_size")
        d.group["input_activations"][key] = d.one_of("tensor", "token", "group", True, False, 4, 128, "int", None)
    return [CONFIG, *d.tensors]


def edit_coverage(d: Draft) -> list[str]:
    module = d.pick(_is_fp8).removesuffix(".weight")
    if d.one_of(True, False):
        d.quantization["ignore"] = d.one_of([module], ["re:.*proj"], ["Linear"], [], None, ["unknown"], "Linear", [3])
    else:
        d.group["targets"] = d.one_of([module], ["re:.*mlp.*"], [], ["Conv2d"], ["re:("], "Linear", None, ["re:.*"])
    return [CONFIG, *d.tensors]


def edit_config(d: Draft) -> list[str]:
    key, values = d.one_of(
        ("quant_method", ["fp8", "gptq", "bitsandbytes", "", None, 3, "ctfp8"]),
        ("format", ["pack-quantized", "unknown", "dense", None, 3]),
        ("config_groups", [{}, None, [], {"FP8": ["Linear"]}, {"group_0": {}}, {"group_0": None}, {"X": ["Linear"]}]),
        ("quantization_status", ["unknown", "frozen"]),
        ("kv_cache_scheme", [{"num_bits": 8, "type": "float"}, "unknown", {"x": 1}]),
        ("transform_config", [{"config_groups": {"R1": {}}}, {}, "unknown"]),
        ("sparsity_config", [{"format": "sparse-24-bitmask"}, {}, {"format": "dense"}, 3]),
    )
    d.quantization[key] = d.one_of(*values)
    return [CONFIG, *d.tensors]


def other_config(d: Draft) -> list[str]:
    edit = d.one_of("none", "null", "list", "text", "garbage", "gone", "array")
    if edit in ("none", "null"):
        d.config.pop(CONFIG)
        d.config |= {CONFIG: None} if edit == "null" else {}
    elif edit in ("list", "text"):
        d.config[CONFIG] = {"list": [], "text": "fp8"}[edit]
    else:
        texts = {"garbage": "{", "array": "[]", "gone": ""}
        d.after = lambda folder: (folder / "config.json").write_text(texts[edit]) and None
    return ["config.json", CONFIG, str(d.draw(st.integers(0, 9)))][:2]


def junk_in_config(d: Draft) -> list[str]:
    """Anything anywhere in quantization_config."""
    at: Any = d.quantization
    while True:
        key = d.draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
        if not at[key] or not isinstance(at[key], (dict, list)) or d.draw(st.integers(0, 3)) == 0:
            break
        at = at[key]
    at[key] = d.one_of(None, 0, -1, 7, 1e9, True, "junk", "", [], {}, [1], {"a": 1}, ["re:["])
    return [CONFIG, *d.tensors]


def edit_model(d: Draft) -> list[str]:
    key = d.one_of("num_hidden_layers", "intermediate_size", "vocab_size", "moe_intermediate_size", "num_experts")
    d.config[key] = d.one_of(1, 2, 3, 4, 8, 64, 80, 136, 144, 256)
    return [*d.tensors, "model.layers.", "lm_head"]


def edit_fp8(d: Draft) -> list[str]:
    """Fields of an `fp8` checkpoint's config."""
    key, values = d.one_of(
        (
            "weight_block_size",
            [[64, 64], [128, 64], [1, 128], [0, 128], [128], "128x128", None, [144, 144], [True, 128]],
        ),
        ("activation_scheme", ["static", "dynamic", "unknown", None]),
        ("scale_fmt", ["ue8m0", "float", "unknown", None]),
        ("fmt", ["e4m3", "e5m2", None, 3]),
        ("modules_to_not_convert", [[], None, "lm_head", ["model.layers.0"], [3], ["("], ["mlp"]]),
        ("modules_to_convert", [[], ["lm_head"], ["model.layers.0.mlp"], 3]),
        ("ignored_layers", [["model.layers.0.mlp"], {}, 3]),
        ("expert_dtype", ["fp8", "fp4", None]),
        ("quant_method", ["modelopt", "fbgemm_fp8", "gptq", None, 3]),
    )
    d.quantization[key] = d.one_of(*values)
    return [CONFIG, *d.tensors]


CHANGES = (
    drop, drop_several, rename, swap, add, duplicate, retype, reinterpret, reshape, reshape_scale, bad_scale, other_scale,
    nan_value, other_value, truncate, extend, flip_header, edit_index, edit_scheme, edit_activations, edit_coverage,
    edit_config, other_config, junk_in_config, edit_model,
)  # fmt: skip
#: Of tensors alone, which every format has; and of its own config.
FORMAT_CHANGES = (
    drop, drop_several, rename, swap, add, retype, reinterpret, reshape, reshape_scale, bad_scale, other_scale, nan_value,
    other_value, edit_fp8,
)  # fmt: skip
#: Changes that no file may survive.
FATAL = {bad_scale, nan_value, truncate, extend}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_error_or_right_logits(change: Callable[[Draft], list[str]]) -> None:
    _check(change, SCHEMES)


@pytest.mark.long
@pytest.mark.parametrize("change", FORMAT_CHANGES, ids=lambda change: change.__name__)
def test_error_or_right_logits_of_other_format(change: Callable[[Draft], list[str]]) -> None:
    _check(change, ("fp8",) if change is edit_fp8 else FORMATS)


def _check(change: Callable[[Draft], list[str]], schemes: Sequence[str]) -> None:
    tried = []

    @settings(
        max_examples=EXAMPLES, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(st.sampled_from(["llama", "qwen3_moe"]), st.sampled_from(schemes), st.data())
    def check(architecture: str, scheme: str, data: st.DataObject) -> None:
        tensors, config = _source(architecture, scheme)
        with tempfile.TemporaryDirectory() as folder:
            draft = Draft(Path(folder), dict(tensors), copy.deepcopy(config), data.draw)
            names = change(draft)
            draft.write()
            tried.append(change)
            refused: ctfp8.Ctfp8Error | None = None
            try:
                # a config that contradicts its file is read as the file says, and refused if that is asked for
                model = ctfp8.from_pretrained(folder, strict=True)
            except ctfp8.Ctfp8Error as error:
                refused = error
            if refused:
                assert _names(str(refused), names), f"names none of what was changed: {refused}"
                return
            assert change not in FATAL
            want = _reference(draft.folder, config[CONFIG])  # without a config the shapes of scales say the same
            with torch.no_grad():
                got = model(IDS, use_cache=False).logits
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)

    check()
    assert len(tried) >= EXAMPLES


def test_unchanged_checkpoints_load() -> None:
    """Else every error above could be for another reason."""
    for architecture in ("llama", "qwen3_moe"):
        for scheme in (*SCHEMES, *FORMATS):
            tensors, config = _source(architecture, scheme)
            with tempfile.TemporaryDirectory() as folder:
                Draft(Path(folder), dict(tensors), config, None).write()
                with torch.no_grad():
                    got = ctfp8.from_pretrained(folder)(IDS, use_cache=False).logits
                assert torch.equal(got, _reference(Path(folder)))


def _names(message: str, names: list[str]) -> bool:
    """Whether a message names a tensor or file, or the parameter that a tensor is merged into."""
    merged = [re.sub(r"experts\.\d+\..*", "experts", name) for name in names]
    scaled = [re.sub(r"_scale(_inv)?$", "", name) for name in names]  # a scale that says another scheme is its weight's
    absent = [re.sub(r"input_scale$", "weight: no input_scale", name) for name in names]
    return any(name in message for name in (*names, *merged, *scaled, *absent))


# --- the reference -------------------------------------------------------------------------------------------------


@torch.no_grad()
def _reference(folder: Path, usual: dict[str, Any] | None = None) -> Tensor:
    """Logits of what the folder's files say. Raises where they say nothing."""
    raw = json.loads((folder / "config.json").read_text())
    quantization = raw.pop(CONFIG, None) or usual
    if quantization["quant_method"] == "fp8":
        block = quantization["weight_block_size"]
        weights = {"strategy": "tensor"} if block is None else {"strategy": "block", "block_structure": block}
        suffix = "_scale_inv"
    else:
        weights, suffix = next(iter(quantization["config_groups"].values()))["weights"], "_scale"
    file: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        file |= load_file(path)

    def value(name: str) -> Tensor:
        if name not in file:  # transformers takes names with and without the prefix of the base model
            name = "model." + name
        if file[name].dtype == FP8:
            return _dequantized(file[name], file[name + suffix], weights)
        assert name + suffix not in file
        assert file[name].is_floating_point()
        return file[name]

    with tempfile.TemporaryDirectory() as plain:
        (Path(plain) / "config.json").write_text(json.dumps(raw))
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(plain), dtype=torch.bfloat16).eval()
    for name, parameter in model.state_dict().items():
        new = _experts(name, value, len(parameter)) if ".experts." in name else value(name)
        assert new.shape == parameter.shape, name
        parameter.copy_(new)
    return model(IDS, use_cache=False).logits


def _dequantized(weight: Tensor, scale: Tensor, args: dict[str, Any]) -> Tensor:
    assert bool((scale.float() > 0).all() and scale.float().isfinite().all() and weight.float().isfinite().all())
    scale = torch.exp2(scale.float() - 127) if scale.dtype == torch.uint8 else scale.float()
    if args["strategy"] in ("block", "group"):
        block = args["block_structure"] if args["strategy"] == "block" else (1, args["group_size"])
        # one number for each block, in their order, whatever dimensions of 1 a file gives them
        scale = scale.reshape([-(-n // b) for n, b in zip(weight.shape, block, strict=True)])
        rows, columns = (torch.arange(n) // b for n, b in zip(weight.shape, block, strict=True))
        scale = scale[rows][:, columns]
    elif args["strategy"] == "channel":
        scale = scale.reshape(-1, 1)
        assert len(scale) == len(weight)
    else:
        assert args["strategy"] in ("tensor", None)  # as compressed-tensors reads null
        assert scale.numel() == 1
        scale = scale.reshape(())
    return (weight.float() * scale).bfloat16()


def _experts(name: str, value: Callable[[str], Tensor], count: int) -> Tensor:
    prefix, _, own = name.rpartition(".")
    parts = ("gate", "up") if own == "gate_up_proj" else ("down",)
    each = [[value(f"{prefix}.{e}.{part}_proj.weight") for part in parts] for e in range(count)]
    return torch.stack([torch.cat(expert) for expert in each])
