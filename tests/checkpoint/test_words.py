"""Quantization configs in other words: nulls, capitals, globs, whole numbers as floats."""

from __future__ import annotations

import pytest
import torch
from conftest import fp8_config, quantize
from torch import nn

import ctfp8_compile as ctfp8


def _check(name: str, config, recwarn) -> None:
    """A weight of 128 x 128 blocks is what its FP8 values and scales say, without a warning."""
    fp8, scale = quantize(torch.randn(160, 256), "block")
    module = ctfp8.load_state_dict(nn.Linear(256, 160, bias=False), {"weight": fp8, name: scale}, config)
    wide = scale.repeat_interleave(128, 0)[:160].repeat_interleave(128, 1)
    assert torch.equal(module.weight, fp8.float() * wide)
    assert not [w for w in recwarn if "files say" in str(w.message)]


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "FP8", "fmt": None, "activation_scheme": None, "weight_block_size": [128.0, 128.0], "scale_fmt": None},
        {"quant_method": "fp8", "fmt": "E4M3", "activation_scheme": "Dynamic", "weight_block_size": (128, 128), "ignored_layers": None},
        {"quant_method": "fp8", "modules_to_not_convert": ["*.mlp.gate", "*lm_head*"], "weight_block_size": [128, 128]},
        {"quant_method": "modelopt", "quant_algo": "fp8_pb_wo", "exclude_modules": None, "kv_cache_quant_algo": None},
    ],
)  # fmt: skip
def test_configs_in_other_words(config, recwarn):
    _check("weight_scale_inv", config, recwarn)


@pytest.mark.parametrize(
    "change",
    [
        {"ignore": None}, {"kv_cache_scheme": None, "format": None}, {"quant_method": "Compressed-Tensors"},
        {"config_groups": {"g": {"targets": ["Linear"], "input_activations": None, "output_activations": None, "weights": {
            "num_bits": 8.0, "type": "FLOAT", "strategy": "Block", "block_structure": [128.0, 128.0], "symmetric": None, "dynamic": None,
            "group_size": None}}}},
    ],
)  # fmt: skip
def test_compressed_tensors_configs_in_other_words(change, recwarn):
    _check("weight_scale", fp8_config("block", None) | change, recwarn)
