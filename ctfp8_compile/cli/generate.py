"""`ctfp8 generate`: continues a text, shows it while it goes, says how fast."""

from __future__ import annotations

import json
from typing import Any

import torch

from ..counted import counted
from .steps import Text
from .terminal import err


def generate(text: Text, max_new_tokens: int, temperature: float, seed: int, as_json: bool) -> None:
    """Prints the continuation of a prompt."""
    torch.manual_seed(seed)
    shown = text.prompt
    if not as_json:
        print(shown, end="", flush=True)
    tokens: list[int] = []

    def take(token: int) -> bool:
        nonlocal shown
        if token in text.ends:
            return False
        tokens.append(token)
        so_far = text.prompt + text.decode(tokens)
        if not as_json and not so_far.endswith("\N{REPLACEMENT CHARACTER}"):
            print(so_far[len(shown) :], end="", flush=True)
            shown = so_far
        return True

    text.steps.each(text.ids, max_new_tokens, temperature, take)
    drafts = getattr(text.steps, "tally", None)
    prefill, per_second, length = text.steps.prefill_seconds, text.steps.tokens_per_second, text.ids.shape[1]
    if as_json:
        speed = {"prompt_tokens": length, "prefill_seconds": prefill, "new_tokens": len(tokens)}
        speed |= {} if drafts is None else _counted(drafts)
        print(json.dumps({"text": text.prompt + text.decode(tokens), **speed, "tokens_per_second": per_second}))
        return
    print()
    said = (
        "" if drafts is None else f", {drafts.tokens_per_step:.2f} a step, {drafts.acceptance:.0%} of drafts accepted"
    )
    err().print(f"prompt: {counted(length, 'token')} in {prefill * 1e3:.0f} ms; then {per_second:.1f} tokens/s{said}")


def _counted(drafts: Any) -> dict[str, float]:
    return {"acceptance": drafts.acceptance, "tokens_per_step": drafts.tokens_per_step}
