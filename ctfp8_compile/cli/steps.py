"""Generation token by token, timed: what `ctfp8 generate` shows and `ctfp8 bench` compares, whatever runs the model."""

from __future__ import annotations

import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


class Steps(ABC):
    """What continues one text at a time.

    Attributes:
        prefill_seconds: what the last text's prompt took.
        step_seconds: what each token after it took.
    """

    def __init__(self) -> None:
        self.prefill_seconds = 0.0
        self.step_seconds: list[float] = []

    @abstractmethod
    def begin(self) -> None:
        """Forgets the text before."""

    @abstractmethod
    def logits(self, ids: Tensor, position: int) -> Tensor:
        """`[vocabulary]`: those of the last of the tokens `[1, tokens]`, the first of which is at that position."""

    @property
    def tokens_per_second(self) -> float:
        """From the median of the steps after the prompt; 0 before there was one."""
        return 1 / statistics.median(self.step_seconds) if self.step_seconds else 0.0

    def each(self, ids: Tensor, number: int, temperature: float, take: Callable[[int], bool]) -> None:
        """Continues a text as `tokens` does, until `take`, which gets each token, says that it is enough."""
        for token in self.tokens(ids, number, temperature):
            if not take(token):
                break

    @torch.no_grad()
    def tokens(self, ids: Tensor, number: int, temperature: float = 0.0) -> Iterator[int]:
        """Continues a text.

        Args:
            ids: the prompt, `[1, tokens]`.
            number: of tokens to make.
            temperature: 0 takes the likeliest token; else torch's global generator draws one.
        """
        self.begin()
        self.step_seconds = []
        position, length = 0, ids.shape[1]
        for step in range(number):
            start = time.perf_counter()
            logits = self.logits(ids, position).float()
            token = torch.multinomial((logits / temperature).softmax(-1), 1) if temperature else logits.argmax()[None]
            yielded = int(token)  # waits for the device
            if step:
                self.step_seconds.append(time.perf_counter() - start)
            else:
                self.prefill_seconds = time.perf_counter() - start
            yield yielded
            ids, position = token[None], length + step


@dataclass(frozen=True)
class Text:
    """A prompt and what continues it.

    Attributes:
        ids: the prompt's tokens, `[1, tokens]`.
        decode: text of tokens.
        ends: the tokens that end a text.
    """

    prompt: str
    steps: Steps
    ids: Tensor
    decode: Callable[[list[int]], str]
    ends: frozenset[int]


def ends_of(configured: int | list[int] | None) -> frozenset[int]:
    """The tokens that a config's `eos_token_id` names."""
    return frozenset([configured] if isinstance(configured, int) else configured or [])
