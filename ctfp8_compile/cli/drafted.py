"""Generation in which something drafts tokens and the model checks them: MTP layers, a smaller model, or the text itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.generation import BaseStreamer

from ..errors import UsageError
from ..hf import mtp
from ..hf.compat import cache_argument
from ..hf.drafts import tally
from ..hf.fp8_cache import CacheDtype, dynamic_cache
from ..hf.static_cache import static_cache
from ..inductor.recipe import compile
from .loading import load
from .steps import Steps


@dataclass(frozen=True)
class Drafts:
    """What drafts.

    Attributes:
        assistant: the folder of a model, or a hub id.
        prompt_lookup: how many tokens are taken from where the text had the last ones before; 0 for none.
    """

    mtp: bool = False
    assistant: str | None = None
    prompt_lookup: int = 0

    def __bool__(self) -> bool:
        return self.mtp or self.assistant is not None or self.prompt_lookup > 0

    def __str__(self) -> str:
        return "MTP" if self.mtp else f"look-up of {self.prompt_lookup}" if self.assistant is None else "assistant"

    def most(self, model: Any) -> int:
        """Tokens that a cache must have room for beside those of a text: a draft may go beyond its end."""
        layers = getattr(model.config.get_text_config(decoder=True), "num_mtp_layers", None) or 0
        return layers if self.mtp else max(self.prompt_lookup, 32)

    def check(self, tp: bool = False) -> None:
        """Raises where options exclude each other, before anything is loaded.

        Raises:
            UsageError: more than one of them, or one that several processes cannot run.
        """
        if self.mtp + (self.assistant is not None) + (self.prompt_lookup > 0) > 1:
            raise UsageError("--mtp, --assistant and --prompt-lookup exclude each other. Give one of them.")
        if self.assistant is not None and tp:
            raise UsageError("--assistant runs in one process. Leave out --tp, or draft with --mtp or --prompt-lookup.")

    def arguments(self, model: Any, backend: str | None, device: torch.device, debug: bool) -> dict[str, Any]:
        """Of `generate`, what says so. An assistant is loaded, and compiled as the model is."""
        if self.mtp:
            mtp.check(model)
            return {"use_mtp": True}
        if self.assistant is None:
            return {"prompt_lookup_num_tokens": self.prompt_lookup}
        assistant = _assistant(self.assistant, device, debug)
        ours, theirs = (m.config.get_text_config(decoder=True).vocab_size for m in (model, assistant))
        if ours != theirs:
            raise UsageError(
                f"{self.assistant} has a vocabulary of {theirs} tokens, the model one of {ours}: its tokens are others. Take an "
                "assistant of the same family, with the same tokenizer."
            )
        return {"assistant_model": assistant if backend is None else compile(assistant, backend=backend)}


NO_DRAFTS = Drafts()


def _assistant(checkpoint: str, device: torch.device, debug: bool) -> Any:
    """FP8 as a model of ours is, or what transformers loads."""
    if getattr(transformers.AutoConfig.from_pretrained(checkpoint), "quantization_config", None) is not None:
        return load(checkpoint, debug, device=device)
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto")
    return model.to(device).eval()


class Drafted(Steps):
    """A model's `generate` with drafts, compiled, and with a cache of its own.

    Attributes:
        tally: of the last text, how many tokens were drafted, and how many of them were right.
    """

    def __init__(
        self,
        model: Any,
        drafts: Drafts,
        max_length: int,
        backend: str | None = "ctfp8",
        dtype: CacheDtype = "auto",
        debug: bool = False,
    ):
        super().__init__()
        self.model, self.max_length, self.dtype = model, max_length, dtype
        self.tally: Any = None
        self.more = drafts.arguments(model, backend, model.device, debug)
        if backend is not None:
            compile(model, backend=backend)
        self.cache: Any = None
        self.ends: frozenset[int] = frozenset()

    def begin(self) -> None:
        if self.cache is None:
            self.cache = static_cache(self.model, 1, self.max_length, self.dtype)
        if self.cache.is_croppable or not any(getattr(layer, "is_sliding", False) for layer in self.cache.layers):
            self.cache.reset()
        else:  # a window of a fixed size forgets
            self.cache = dynamic_cache(self.model, self.dtype)

    def logits(self, ids: Tensor, position: int) -> Tensor:
        raise NotImplementedError("`generate` asks the model")

    @property
    def tokens_per_second(self) -> float:
        """Of all steps after the prompt: they make different numbers of tokens."""
        return self.tally.tokens / sum(self.step_seconds) if self.tally is not None and self.step_seconds else 0.0

    def each(self, ids: Tensor, number: int, temperature: float, take: Callable[[int], bool]) -> None:
        self.begin()
        drawn = (
            {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
            if temperature
            else {"do_sample": False}
        )
        stream = _Timed(take)
        with tally(self.model) as self.tally:
            self.model.generate(
                ids.to(self.model.device), max_new_tokens=number, streamer=stream, eos_token_id=sorted(self.ends) or None,
                **drawn, **{cache_argument(self.model): self.cache}, **self.more,
            )  # fmt: skip
        self.prefill_seconds, *self.step_seconds = stream.seconds

    def warm_up(self, ids: Tensor) -> None:
        """Compiles what a text of any length needs."""
        ends, self.ends = self.ends, frozenset()
        self.each(ids, min(12, self.max_length - ids.shape[1]), 0.0, lambda token: True)
        self.ends = ends


class _Timed(BaseStreamer):
    """Hands on the tokens of each step; the first call is the prompt's."""

    def __init__(self, take: Callable[[int], bool]):
        self.take, self.seconds = take, []  # type: ignore[var-annotated]
        self.last: float | None = None

    def put(self, value: Tensor) -> None:
        now = time.perf_counter()
        if self.last is not None:
            self.seconds.append(now - self.last)
            for token in value.reshape(-1).tolist():
                self.take(token)
        self.last = time.perf_counter()

    def end(self) -> None:
        pass
