"""Configs: compressed-tensors' own classes parse them, and what we do not honour is refused by name."""

from __future__ import annotations

import copy
import json
import time

import pytest
from conftest import CHECKPOINTS, DATA, fp8_config

from ctfp8_compile.checkpoint.scheme import Scheme, Schemes
from ctfp8_compile.errors import SchemeError


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("FP8_DYNAMIC", Scheme("channel", (1, 0), "token")),
        ("FP8", Scheme("tensor", (0, 0), "tensor")),
        ("FP8_BLOCK", Scheme("block", (128, 128), "group")),
    ],
)
def test_real_configs(name, expected):
    config = json.loads((DATA / "mixtral" / name / "config.json").read_text())["quantization_config"]
    schemes = Schemes(config)
    assert schemes.scheme("model.layers.0.block_sparse_moe.experts.3.gate_proj") == expected
    assert schemes.scheme("model.layers.1.block_sparse_moe.gate") is None  # in the ignore list
    assert schemes.scheme("lm_head") is None


def test_every_checkpoint_has_a_scheme_we_know():
    assert len(CHECKPOINTS) == 12


def test_matching_order_exact_then_regex_then_class():
    config = fp8_config()
    other = copy.deepcopy(config["config_groups"]["group_0"])
    other["targets"] = ["re:.*down_proj$"]
    other["weights"]["strategy"] = "tensor"
    config["config_groups"]["group_1"] = other
    config["ignore"] = ["re:.*gate$"]
    schemes = Schemes(config)
    assert schemes.scheme("a.down_proj").strategy == "tensor"
    assert schemes.scheme("a.up_proj").strategy == "channel"
    assert schemes.scheme("a.gate") is None


@pytest.mark.parametrize("expression", ["re:(a+)+$", "re:(.*a){25}", "re:^(([a-z])+.)+[A-Z]([a-z])+$"])
@pytest.mark.parametrize("where", ["ignore", "targets"])
def test_an_expression_that_never_ends_is_refused(expression, where):
    config = fp8_config()
    if where == "ignore":
        config["ignore"] = [expression]
    else:
        config["config_groups"]["group_0"]["targets"] = [expression]
    begin = time.monotonic()
    try:
        Schemes(config).scheme("a" * 60 + "!")
    except SchemeError as error:
        assert "takes longer" in str(error)  # noqa: PT017 - an engine that sees through the expression is right as well
    assert time.monotonic() - begin < 20


def test_presets_and_w8a16():
    assert Schemes({"config_groups": {"FP8_DYNAMIC": ["Linear"]}}).scheme("x") == Scheme("channel", (1, 0), "token")
    assert Schemes(fp8_config(activation=None)).scheme("x").activation == "none"


def test_group_strategy_is_a_block_of_one_row():
    config = fp8_config()
    config["config_groups"]["group_0"]["weights"] |= {"strategy": "group", "group_size": 64}
    config["config_groups"]["group_0"]["input_activations"] = None
    assert Schemes(config).scheme("x").block == (1, 64)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"weights": {"num_bits": 4, "type": "int", "strategy": "channel"}}, "not FP8 \\(4-bit int\\)"),
        ({"weights": {"num_bits": 8, "type": "float", "strategy": "token"}}, "token"),
        ({"input_activations": {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}}, "8-bit int"),
    ],
)
def test_schemes_we_do_not_honour_are_refused(change, sentence):
    config = fp8_config()
    config["config_groups"]["group_0"] |= change
    with pytest.raises(SchemeError, match=sentence):
        Schemes(config).scheme("model.q_proj")


def test_another_method_is_refused():
    with pytest.raises(SchemeError, match="quant_method='gptq'"):
        Schemes({"quant_method": "gptq", "bits": 4})


def test_nonsense_is_refused_in_our_words():
    with pytest.raises(
        SchemeError, match="quantization_config: config_groups.g.weights.num_bits: Input should be a valid integer"
    ):
        Schemes({"config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": "many"}}}})
