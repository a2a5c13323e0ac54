"""Generation with a static cache, timed: what `ctfp8 generate` shows and `ctfp8 bench` compares."""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..hf.compat import cache_argument
from ..hf.fp8_cache import CacheDtype
from ..hf.static_cache import static_cache
from ..inductor.recipe import Compiled


class Decoder:
    """A causal language model with a cache for one text, and its forward pass, compiled.

    Args:
        max_length: tokens that the cache has room for.
        backend: of torch.compile; None runs eagerly.
        dynamic: whether one compilation serves prompts of all lengths.
        dtype: of the cache.

    Attributes:
        prefill_seconds: what the last text's prompt took.
        step_seconds: what each token after it took.
    """

    def __init__(
        self,
        model: Any,
        max_length: int,
        backend: str | None = "ctfp8",
        dynamic: bool = True,
        dtype: CacheDtype = "auto",
    ):
        name = cache_argument(model)
        self.cache = static_cache(model, 1, max_length, dtype)
        self.prefill_seconds = 0.0
        self.step_seconds: list[float] = []
        self._extra: dict[str, Any] = {name: self.cache}
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            self._extra["logits_to_keep"] = 1
        self._device = model.device
        compiled = {"backend": backend, "dynamic": dynamic}
        self._forward = model.forward if backend is None else Compiled(model.forward, compiled)

    @property
    def tokens_per_second(self) -> float:
        """From the median of the steps after the prompt; 0 before there was one."""
        return 1 / statistics.median(self.step_seconds) if self.step_seconds else 0.0

    def warm_up(self, ids: Tensor) -> None:
        """Compiles for the prompt and for the tokens after it."""
        list(self.tokens(ids, 3))

    @torch.no_grad()
    def tokens(self, ids: Tensor, number: int, temperature: float = 0.0) -> Iterator[int]:
        """Continues a text.

        Args:
            ids: the prompt, `[1, tokens]`.
            number: of tokens to make.
            temperature: 0 takes the likeliest token; else torch's global generator draws one.
        """
        self.cache.reset()
        self.step_seconds = []
        length = ids.shape[1]
        ids, position = ids.to(self._device), torch.arange(length, device=self._device)[None]
        for step in range(number):
            start = time.perf_counter()
            out = self._forward(ids, position_ids=position, **self._extra)
            logits = out.logits[0, -1].float()
            token = torch.multinomial((logits / temperature).softmax(-1), 1) if temperature else logits.argmax()[None]
            yielded = int(token)  # waits for the device
            if step:
                self.step_seconds.append(time.perf_counter() - start)
            else:
                self.prefill_seconds = time.perf_counter() - start
            yield yielded
            ids, position = token[None], torch.full((1, 1), length + step, device=self._device)
