"""The transformers class of a checkpoint, where the caller names none or a wrong one."""

from __future__ import annotations

import pytest
import transformers
from support import architectures
from support.forge import forge
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

import ctfp8_compile as ctfp8
from ctfp8_compile.hf.model_class import class_of


@pytest.mark.parametrize(
    ("model_type", "saved_as", "loaded_as"),
    [
        ("llama", "LlamaForCausalLM", "LlamaForCausalLM"),
        ("llama", "LlamaForSequenceClassification", "LlamaForSequenceClassification"),
        ("bert", "BertForMaskedLM", "BertForMaskedLM"),
        ("llava", "LlavaForConditionalGeneration", "LlavaForConditionalGeneration"),
        ("t5", "T5ForConditionalGeneration", "T5ForConditionalGeneration"),
        ("llama4", "Llama4ForConditionalGeneration", "AutoModelForCausalLM"),  # which has one of its text part
        ("llama", None, "AutoModelForCausalLM"),
        ("llama", "AClassOfTheirOwn", "AutoModelForCausalLM"),
        ("mistral", "LlamaForCausalLM", "AutoModelForCausalLM"),  # the config decides, as in transformers
    ],
)
def test_without_a_class(model_type, saved_as, loaded_as):
    config = AutoConfig.for_model(model_type)
    config.architectures = [saved_as] if saved_as else None
    assert class_of("folder", config, None) is getattr(transformers, loaded_as)


def test_code_that_comes_with_the_checkpoint_is_left_to_transformers():
    config = AutoConfig.for_model("llava")
    config.auto_map = {"AutoModelForCausalLM": "modeling.Model"}
    assert class_of("folder", config, None) is AutoModelForCausalLM


@pytest.mark.parametrize(
    ("given", "architectures", "cure"),
    [
        (AutoModelForCausalLM, ["LlavaForConditionalGeneration"], "leave auto_class out, or pass auto_class=transformers.Llava"),
        (AutoModelForCausalLM, None, "pass another auto_class"),
        (None, None, "pass another auto_class"),
    ],
)  # fmt: skip
def test_a_class_that_does_not_know_the_config(given, architectures, cure):
    config = AutoConfig.for_model("llava")
    config.architectures = architectures
    with pytest.raises(ctfp8.UsageError, match=f"AutoModelForCausalLM has no class for LlavaConfig: {cure}"):
        class_of("folder", config, given)


def test_a_vision_language_model_and_an_encoder(tmp_path):
    for name in ("llava", "bert"):
        spec = architectures.ARCHITECTURES[name]
        forged = forge(name, spec.schemes[0], tmp_path / name)
        model = ctfp8.from_pretrained(forged.folder)
        assert type(model).__name__ == type(forged.reference).__name__
    with pytest.raises(
        ctfp8.CheckpointError, match=r"another class than BertLMHeadModel \(config.json names (BertFor\w+)\)"
    ):
        ctfp8.from_pretrained(tmp_path / "bert", AutoModelForCausalLM)
    with pytest.raises(ctfp8.UsageError, match="AutoModelForCausalLM has no class for LlavaConfig"):
        ctfp8.from_pretrained(tmp_path / "llava", AutoModelForCausalLM)
    assert type(ctfp8.from_pretrained(tmp_path / "llava", AutoModelForImageTextToText)).__name__.startswith("Llava")
