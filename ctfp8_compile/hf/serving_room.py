"""How many requests a server runs at a time, how long they may be, and the cache that they have room in."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

from transformers import ContinuousBatchingConfig, GenerationConfig

from .serving_checks import Refused

#: Tokens that a request without a limit is given at most, as in transformers' server.
DEFAULT_NEW_TOKENS = 1024
#: Characters of a text that are tokenized while other requests wait: a millisecond or two.
_SHORT = 1 << 14


@dataclasses.dataclass(frozen=True)
class Room:
    """What requests have room for.

    Attributes:
        batch: requests that run at a time.
        context: tokens of a request, prompt and answer.
        page: tokens of a page of the key-value cache.
        step: tokens of one pass of the model, at most: longer prompts are read in parts.
    """

    batch: int
    context: int
    page: int = 64
    step: int = 512

    def config(self) -> ContinuousBatchingConfig:
        """For transformers' engine: a cache in which every request that runs has its whole context."""
        return ContinuousBatchingConfig(
            page_size=self.page, num_blocks=self.batch * -(-self.context // self.page),
            max_batch_tokens=max(self.step, self.batch), max_requests_per_batch=self.batch,
            max_blocks_per_request=0, safety_margin=0.0, use_async_batching=False, use_cuda_graph=False,
            auto_switch_to_flash=False,  # it would fetch kernels, which is code
        )  # fmt: skip

    def limit(self, prompt: int, settings: GenerationConfig) -> int:
        """The tokens that an answer may have; written into `settings`, by which the server tells why an answer ended.

        Raises:
            Refused: the prompt, or what is asked for, is longer than the context.
        """
        if prompt == 0:
            raise Refused("The prompt is empty, and this tokenizer begins no text by itself. Give it a character.")
        left = self.context - prompt
        if left < 1 or (settings.max_new_tokens or 1) > left:
            asked = "" if left < 1 else f", and {settings.max_new_tokens} new ones are asked for"
            raise self._too_long(prompt, asked)
        settings.max_new_tokens = settings.max_new_tokens or min(DEFAULT_NEW_TOKENS, left)
        return int(settings.max_new_tokens)

    async def check(self, text: str, tokenizer: Any) -> None:
        """Tokenizes a long text beside what is served, which would else wait for it.

        Raises:
            Refused: it is longer than the context.
        """
        if len(text) > _SHORT:
            # a fast tokenizer's own `encode` sets truncation on what other threads use; others have no backend
            backend = getattr(tokenizer, "backend_tokenizer", None)
            found: Any = await asyncio.to_thread((tokenizer if backend is None else backend).encode, text)
            ids = found if backend is None else found.ids
            if len(ids) >= self.context:
                raise self._too_long(len(ids))

    def _too_long(self, prompt: int, more: str = "") -> Refused:
        return Refused(
            f"The prompt has {prompt} tokens{more}: more than this server's {self.context} a request.",
            code="context_length_exceeded",
        )
