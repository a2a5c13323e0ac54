"""`ctfp8 generate`: continues a text, shows it while it goes, says how fast."""

from __future__ import annotations

import json
from typing import Any

from transformers import set_seed

from ..errors import UsageError
from .decoder import Decoder
from .terminal import err


def generate(
    model: Any,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    eager: bool,
    as_json: bool,
) -> None:
    """Prints the continuation of a prompt.

    Raises:
        UsageError: the prompt has no tokens.
    """
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    if not ids.numel():
        raise UsageError(
            "the prompt is empty, and this tokenizer begins no text by itself. Give --prompt at least a character."
        )
    console, length = err(), ids.shape[1] + max_new_tokens
    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if positions is not None and length > positions:
        console.print(
            f"warning: {ids.shape[1]} tokens of prompt and {max_new_tokens} new ones are more than the {positions} positions "
            "this model was made for; text beyond them may make no sense."
        )
    room = 1 << (length - 1).bit_length()  # so that Inductor's cache of compiled code serves many lengths
    decoder = Decoder(model, room, None if eager else "ctfp8")
    if not eager:
        decoder.warm_up(ids)
    set_seed(seed)
    ends = model.generation_config.eos_token_id
    shown = prompt
    if not as_json:
        print(prompt, end="", flush=True)
    tokens: list[int] = []
    for token in decoder.tokens(ids, max_new_tokens, temperature):
        if token == ends or (isinstance(ends, list) and token in ends):
            break
        tokens.append(token)
        text = prompt + tokenizer.decode(tokens)
        if not as_json and not text.endswith("\N{REPLACEMENT CHARACTER}"):
            print(text[len(shown) :], end="", flush=True)
            shown = text
    speed = {"prompt_tokens": ids.shape[1], "prefill_seconds": decoder.prefill_seconds, "new_tokens": len(tokens),
             "tokens_per_second": decoder.tokens_per_second}  # fmt: skip
    if as_json:
        print(json.dumps({"text": prompt + tokenizer.decode(tokens), **speed}))
        return
    print()
    console.print(
        f"prompt: {ids.shape[1]} tokens in {decoder.prefill_seconds * 1e3:.0f} ms; then {decoder.tokens_per_second:.1f} tokens/s"
    )
