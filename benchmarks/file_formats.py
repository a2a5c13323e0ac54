"""How each writer of FP8 files (docs/formats.md) spells a linear and its config, for files of random weights."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

State = dict[str, Tensor]


@dataclass(frozen=True)
class Spelling:
    """One format.

    Attributes:
        config: the quantization config, given the number of layers.
        beside: what a file has beside a weight, given the weight's module, rows, columns.
        weight: how the weight's own name ends.
        stacked: scales of a layer's experts lie in one tensor.
    """

    config: Callable[[int], dict[str, Any]]
    beside: Callable[[str, int, int], State]
    weight: str = ".weight"
    stacked: bool = False


def _random(shape: tuple[int, ...], seed: str) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(len(seed))) * 1e-4 + 1e-5


def _scales(
    leaf: str, kind: str, dtype: torch.dtype = torch.float32, static: str = ""
) -> Callable[[str, int, int], State]:
    """Tensors beside a weight: its scale under `leaf`, of a kind, and a static one of inputs under `static`."""

    def beside(module: str, rows: int, cols: int) -> State:
        shapes = {
            "tensor": (), "one": (1,), "row": (rows, 1), "rows": (rows,), "block": (math.ceil(rows / 128), math.ceil(cols / 128)),
            "wide": (math.ceil(rows / 128), 1, math.ceil(cols / 128), 1), "all": (1, 1), "mx": (rows, cols // 32),
        }  # fmt: skip
        if kind == "mx":
            generator = torch.Generator().manual_seed(len(module))
            out = {f"{module}{leaf}": torch.randint(112, 115, shapes[kind], dtype=torch.uint8, generator=generator)}
        else:
            out = {f"{module}{leaf}": _random(shapes[kind], module).to(dtype)}
        return out | ({f"{module}{static}": torch.tensor(0.01)} if static else {})

    return beside


def _inverse(module: str, rows: int, cols: int) -> State:
    return {f"{module}.weight_scale_inv": 1 / _random((rows,), module)}


def _comfyui(module: str, rows: int, cols: int) -> State:
    marker = json.dumps({"format": "float8_e4m3fn"}).encode()
    return {
        f"{module}.weight_scale": _random((), module),
        f"{module}.comfy_quant": torch.tensor(list(marker), dtype=torch.uint8),
    }


def _plain(layers: int) -> list[str]:
    return ["lm_head", *(f"model.layers.{i}.mlp.gate" for i in range(layers))]


def _compressed_tensors(form: str, weights: dict[str, Any], inputs: dict[str, Any]) -> Callable[[int], dict[str, Any]]:
    fp8 = {"num_bits": 8, "type": "float", "symmetric": True}
    scheme = {"format": form, "targets": ["Linear"], "weights": fp8 | weights, "input_activations": fp8 | inputs}
    return lambda layers: {
        "quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed",
        "config_groups": {"group_0": scheme}, "ignore": ["lm_head", "re:.*mlp.gate$"], "kv_cache_scheme": None,
        "global_compression_ratio": None, "sparsity_config": {}, "transform_config": {}, "version": "0.19.0",
    }  # fmt: skip


def _fp8(**words: Any) -> Callable[[int], dict[str, Any]]:
    common = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    return lambda layers: {**common, "modules_to_not_convert": _plain(layers), **words}


def _modelopt(algorithm: str) -> Callable[[int], dict[str, Any]]:
    return lambda layers: {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": _plain(layers)}


def _auto_round(**words: Any) -> Callable[[int], dict[str, Any]]:
    return lambda layers: {
        "quant_method": "auto-round", "bits": 8, "act_bits": 8, "data_type": "fp", "block_name_to_quantize": "model.layers",
        "extra_config": {name: {"bits": 16} for name in _plain(layers)}, **words,
    }  # fmt: skip


def _quark(weight: str, inputs: dict[str, Any]) -> Callable[[int], dict[str, Any]]:
    words = {"weight": {"dtype": "fp8_e4m3", "qscheme": weight}, "input_tensors": {"dtype": "fp8_e4m3", **inputs}}
    return lambda layers: {"quant_method": "quark", "global_quant_config": words, "exclude": _plain(layers)}


def _torchao(layers: int) -> dict[str, Any]:
    data = {"granularity": [{"_type": "PerRow"}, {"_type": "PerRow"}]}
    default = {"_type": "Float8DynamicActivationFloat8WeightConfig", "_data": data}
    return {
        "quant_method": "torchao",
        "quant_type": {"default": default},
        "modules_to_not_convert": _plain(layers),
    }


_MX = {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
_BLOCK = {"strategy": "block", "block_structure": [128, 128]}
_TOKEN = {"strategy": "token", "dynamic": True}
_GROUP = {"strategy": "group", "group_size": 128, "dynamic": True}
_STATIC = {"qscheme": "per_tensor", "is_dynamic": False}
_SQUARE = [128, 128]

#: By name, as `--format` takes it: compressed-tensors' by llm-compressor's schemes, others by their `quant_method`.
FORMATS: dict[str, Spelling] = {
    "FP8_DYNAMIC": Spelling(_compressed_tensors("float-quantized", {"strategy": "channel"}, _TOKEN),
                            _scales(".weight_scale", "row", torch.bfloat16)),
    "FP8": Spelling(_compressed_tensors("float-quantized", {"strategy": "tensor"}, {"strategy": "tensor"}),
                    _scales(".weight_scale", "one", torch.bfloat16, ".input_scale")),
    "FP8_BLOCK": Spelling(_compressed_tensors("float-quantized", _BLOCK, _GROUP),
                          _scales(".weight_scale", "block", torch.bfloat16)),
    "MXFP8": Spelling(_compressed_tensors("mxfp8-quantized", _MX, {**_MX, "dynamic": True}), _scales(".weight_scale", "mx")),
    "auto-round": Spelling(_auto_round(weight_block_size=_SQUARE), _scales(".weight_scale_inv", "block")),
    "auto-round-static": Spelling(_auto_round(group_size=-1, act_dynamic=False),
                                  _scales(".weight_scale", "rows", static=".input_scale")),
    "gptqmodel": Spelling(_fp8(weight_scale_method="row", weight_scale_semantics="inverse"), _inverse),
    "fp8": Spelling(_fp8(fmt="e4m3", weight_block_size=_SQUARE), _scales(".weight_scale_inv", "block")),
    "fp8-mistral": Spelling(_fp8(activation_scheme="static"), _scales(".qscale_weight", "tensor", static=".qscale_act")),
    "fp8-stacked": Spelling(_fp8(weight_block_size=_SQUARE), _scales(".weight_scale_inv", "block"), stacked=True),
    "fbgemm_fp8": Spelling(lambda layers: {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0,
                                           "modules_to_not_convert": _plain(layers)}, _scales(".weight_scale", "row")),
    "mxfp8": Spelling(lambda layers: {"quant_method": "mxfp8", "modules_to_not_convert": _plain(layers)},
                      _scales(".weight_scale_inv", "mx")),
    "modelopt": Spelling(_modelopt("FP8"), _scales(".weight_scale", "tensor", static=".input_scale")),
    "modelopt-channel": Spelling(_modelopt("FP8_PER_CHANNEL_PER_TOKEN"), _scales(".weight_scale", "rows")),
    "modelopt-block": Spelling(_modelopt("FP8_PB_WO"), _scales(".weight_scale", "wide")),
    "modelopt-mxfp8": Spelling(_modelopt("MXFP8"), _scales(".weight_scale", "mx")),
    "quark": Spelling(_quark("per_tensor", _STATIC), _scales(".weight_scale", "tensor", static=".input_scale")),
    "quark-ptpc": Spelling(_quark("per_channel", {"qscheme": "per_channel", "is_dynamic": True}),
                           _scales(".weight_scale", "rows", torch.bfloat16)),
    "torchao": Spelling(_torchao, _scales("._weight_scale", "row"), "._weight_qdata"),
    "comfyui": Spelling(lambda layers: {}, _comfyui),
}  # fmt: skip


def stacked(state: State) -> State:
    """The scales of a layer's experts, gate and up one after the other, in one tensor, as transformers' `fp8` writes them."""
    out: State = {}
    found: dict[tuple[str, str], dict[int, Tensor]] = {}
    for name, tensor in state.items():
        experts, dot, rest = name.partition(".experts.")
        if dot and name.endswith(".weight_scale_inv"):
            number, leaf, _ = rest.split(".")
            found.setdefault((f"{experts}.experts", leaf), {})[int(number)] = tensor
        else:
            out[name] = tensor
    for experts in {key[0] for key in found}:
        parts = {
            leaf: torch.stack([by[n] for n in sorted(by)]) for (where, leaf), by in found.items() if where == experts
        }
        out[f"{experts}.gate_up_proj_scale_inv"] = torch.cat([parts["gate_proj"], parts["up_proj"]], 1)
        out[f"{experts}.down_proj_scale_inv"] = parts["down_proj"]
    return out
