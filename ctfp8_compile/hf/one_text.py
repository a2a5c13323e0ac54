"""A static cache holds one text: what would mix two, or run over its end inside generated code, is refused in a sentence."""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StaticCache

from ..counted import agreeing, counted
from ..errors import UsageError


class OneText(StaticCache):
    """Knows, without asking its device, how many tokens of a text it holds, and which; compiled code does not look at that.

    Attributes:
        rows, limit: sequences, and tokens of each, that it has room for.
        filled, last_position: how many it holds, and where the last of them is.
        seen: their ids, in parts; None where they are not known, as of embeddings that were passed in.
    """

    rows: int
    limit: int
    filled: int
    last_position: int
    seen: list[Tensor] | None

    def empty(self) -> None:
        self.filled, self.last_position, self.seen = 0, -1, []

    def reset(self) -> None:
        super().reset()
        self.empty()

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last tokens, as decoding with an assistant or by looking up the prompt does with those it rejects."""
        super().crop(tokens_to_remove)
        if removed := min(abs(tokens_to_remove), self.filled):
            self.filled -= removed
            self.last_position -= removed
            self.seen = self.seen and [torch.cat(self.seen, 1)[:, :-removed]]

    def reorder_cache(self, beam_idx: Any) -> None:
        super().reorder_cache(beam_idx)
        self.seen = None

    def take(self, rows: int, tokens: Tensor, positions: Tensor | None) -> None:
        """Notes tokens that a forward pass is about to add.

        Raises:
            UsageError: they are of another text, of other sequences, or too many.
        """
        new = tokens.shape[1]
        if rows != self.rows:
            raise UsageError(
                f"the static cache is for {counted(self.rows, 'sequence')}, and the input has {rows} (with beams, or "
                "several answers to a "
                "prompt, the number of them all). Make one for them: ctfp8.static_cache(model, batch_size=…)."
            )
        if new > 1 and positions is not None and positions.dim() == 2:
            first, last = int(positions[:, 0].max()), int(positions.max())
            if self.filled and first <= self.last_position:
                raise self._another_text()
            self.last_position = last
        else:
            self.last_position += new
        if self.filled + new > self.limit:
            raise UsageError(
                f"the static cache has room for {counted(self.limit, 'token')}; it holds {self.filled}, and {new} "
                f"more {agreeing(new, 'was', 'were')} given. Make a "
                "larger one: ctfp8.static_cache(model, max_length=…)."
            )
        self.filled += new
        if tokens.dim() != 2:
            self.seen = None
        elif self.seen is not None:
            self.seen.append(tokens)

    def continue_with(self, ids: Tensor, new: int) -> None:
        """Checks that a text, of whose tokens only the last `new` are to be computed, begins with what the cache holds.

        Raises:
            UsageError: it is another one, or has no token more.
        """
        if not self.filled:
            return
        begun = ids[:, : ids.shape[1] - new] if new > 0 else ids
        known = None if self.seen is None or not self.seen else torch.cat(self.seen, 1)
        alike = known is None or known.shape[1] != begun.shape[1] or torch.equal(known, begun.to(known.device))
        if new <= 0 or not alike:
            raise self._another_text()

    def _another_text(self) -> UsageError:
        return UsageError(
            f"the static cache still holds {counted(self.filled, 'token')} of another text. Call cache.reset() before "
            "the next one."
        )


def watch(model: Any) -> None:
    """Has a model tell caches of ours what it is about to do with them."""
    if not isinstance(model, nn.Module) or any(hook is _before for hook in model._forward_pre_hooks.values()):
        return
    model.register_forward_pre_hook(_before, with_kwargs=True)
    if hasattr(model, "prepare_inputs_for_generation"):
        check = _preparing(type(model).prepare_inputs_for_generation)  # type: ignore[attr-defined]
        model.prepare_inputs_for_generation = types.MethodType(check, model)  # type: ignore[assignment]


def _before(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook."""
    cache = next((value for value in kwargs.values() if isinstance(value, OneText)), None)
    tokens = next((t for t in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args) if t is not None), None)
    if cache is not None and tokens is not None and not torch.compiler.is_compiling():
        cache.take(tokens.shape[0], tokens, kwargs.get("position_ids"))


@functools.cache
def _preparing(prepare: Any) -> Any:
    """A class's `prepare_inputs_for_generation`, which `generate` asks for its parameters by name, with the check before it."""

    @functools.wraps(prepare)
    def check(self: Any, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, OneText)), None)
        new = kwargs.get("next_sequence_length")
        ids = isinstance(input_ids, Tensor) and input_ids.dim() == 2 and kwargs.get("inputs_embeds") is None
        if cache is not None and ids and new is not None and kwargs.get("is_first_iteration"):
            cache.continue_with(input_ids, int(new))  # `generate` cuts off what is cached: only here the text is whole
        return prepare(self, input_ids, *args, **kwargs)

    return check
