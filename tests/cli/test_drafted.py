"""`ctfp8 generate` and `ctfp8 bench` with drafts: the text is the same, and how many drafts were right is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from support.mtp import make_mtp, needs_mtp
from test_cli import DATA, SHIPPED, ctfp8_command

import ctfp8_compile as ctfp8
from ctfp8_compile.cli.drafted import Drafted, Drafts

PROMPT = ("--prompt", "Return a list of the names. Return a list of ", "--max-new-tokens", 20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with an MTP layer, and the shipped tokenizer of bytes."""
    made = make_mtp("glm4_moe", "FP8_DYNAMIC", tmp_path_factory.mktemp("glm"))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SHIPPED / "llama" / file, made.folder / file)
    return made.folder


@pytest.mark.parametrize(
    "option",
    [pytest.param(("--mtp",), marks=needs_mtp), ("--assistant", "{folder}"), ("--prompt-lookup", 3)],
    ids=["MTP", "assistant", "look-up"],
)
def test_generate(option: tuple[str, ...], folder: Path) -> None:
    more = [str(part).format(folder=folder) for part in option]
    plain = json.loads(ctfp8_command("generate", folder, *PROMPT, "--eager", "--json").stdout)
    drafted = json.loads(ctfp8_command("generate", folder, *PROMPT, "--eager", "--json", *more).stdout)
    assert drafted["text"] == plain["text"]
    assert drafted["new_tokens"] == plain["new_tokens"]
    assert "acceptance" not in plain
    assert 0 <= drafted["acceptance"] <= 1
    assert drafted["tokens_per_step"] >= 1
    if option[0] == "--assistant":  # itself
        assert drafted["acceptance"] == 1
    shown = ctfp8_command("generate", folder, *PROMPT, "--eager", *more)
    assert shown.stdout.rstrip("\n") == plain["text"].rstrip("\n")
    assert "of drafts accepted" in shown.stderr


def test_ends_and_sampling() -> None:
    """A text ends where the model ends it, in the middle of a step, too; sampling repeats with its seed."""
    model = ctfp8.from_pretrained(SHIPPED / "llama", dtype=torch.float32)
    ids = torch.tensor([list(b"Return a list of ")])
    plain = model.generate(ids, max_new_tokens=30, do_sample=False, eos_token_id=None)[0, ids.shape[1] :].tolist()
    drafted = Drafted(model, Drafts(prompt_lookup=4), 128, None)
    drafted.ends = frozenset([plain[12]])
    found: list[int] = []
    drafted.each(ids, 30, 0.0, lambda token: bool(found.append(token)) or True)
    assert found == plain[: plain.index(plain[12]) + 1]
    arguments = ("generate", SHIPPED / "llama", "--prompt", "def ", "--max-new-tokens", 20, "--temperature", 1, "--eager",
                 "--prompt-lookup", 2, "--seed", 3)  # fmt: skip
    assert ctfp8_command(*arguments).stdout == ctfp8_command(*arguments).stdout


@pytest.mark.nightly
@pytest.mark.long(minutes=2)
@needs_mtp
def test_bench(folder: Path) -> None:
    arguments = ("bench", folder, "--mtp", "--new-tokens", 8, "--rounds", 1, "--prompt", "Return a list of ")
    speeds = json.loads(ctfp8_command(*arguments, "--json").stdout)
    assert list(speeds) == ["ctfp8", "ctfp8, MTP", "bf16 eager"]
    assert speeds["ctfp8"]["acceptance"] is None
    assert 0 <= speeds["ctfp8, MTP"]["acceptance"] <= 1
    assert speeds["ctfp8, MTP"]["tokens_per_step"] >= 1
    assert all(speed["tokens_per_second"] > 0 for speed in speeds.values())
    table = ctfp8_command(*arguments).stdout
    assert "tokens a step" in table
    assert "accepted" in table


ERRORS = {
    "two of them": (
        ["generate", "{shipped}/llama", "--prompt", "x", "--mtp", "--prompt-lookup", "2"],
        "exclude each other",
    ),
    "no MTP layers": (
        ["generate", "{shipped}/llama", "--prompt", "x", "--mtp", "--eager"],
        "no file of this model holds a layer",
    ),
    "another vocabulary": (
        ["generate", "{shipped}/llama", "--prompt", "x", "--eager", "--assistant", "{folder}"],
        "has a vocabulary of 128 tokens, the model one of 256",
    ),
    "an artifact": (["generate", "x.pt2", "--prompt", "x", "--mtp"], "a .pt2 generates token by token"),
    "a context": (
        ["bench", "{data}/llama/FP8", "--context", "8", "--prompt-lookup", "2"],
        "drafts are measured without",
    ),
    "ranks": (
        ["generate", "{shipped}/llama", "--prompt", "x", "--tp", "--assistant", "{folder}"],
        "--assistant runs in one process",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case: str, folder: Path) -> None:
    arguments, message = ERRORS[case]
    result = ctfp8_command(*(a.format(data=DATA, shipped=SHIPPED, folder=folder) for a in arguments), code=1)
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.output
