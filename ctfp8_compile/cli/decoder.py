"""A transformers model with a static cache, and its forward pass, compiled."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from ..counted import counted
from ..errors import UsageError
from ..hf.compat import cache_argument
from ..hf.fp8_cache import CacheDtype
from ..hf.static_cache import static_cache
from ..inductor.recipe import Compiled
from .drafted import NO_DRAFTS, Drafted, Drafts
from .loading import load, load_tokenizer
from .steps import Steps, Text, ends_of
from .terminal import err


class Decoder(Steps):
    """A causal language model with a cache for one text, and its forward pass, compiled.

    Args:
        max_length: tokens that the cache has room for.
        backend: of torch.compile; None runs eagerly.
        dynamic: whether one compilation serves prompts of all lengths.
        dtype: of the cache.
    """

    def __init__(
        self,
        model: Any,
        max_length: int,
        backend: str | None = "ctfp8",
        dynamic: bool = True,
        dtype: CacheDtype = "auto",
    ):
        super().__init__()
        name = cache_argument(model)
        self.cache = static_cache(model, 1, max_length, dtype)
        self._extra: dict[str, Any] = {name: self.cache}
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            self._extra["logits_to_keep"] = 1
        self._device = model.device
        # a token's kernels take less time than their launches; prompts have too many sizes to record a graph of each
        graphs = {"triton.cudagraphs": True, "triton.cudagraph_skip_dynamic_graphs": True}
        compiled = {"backend": backend, "dynamic": dynamic, "options": graphs if self._device.type == "cuda" else None}
        self._forward = model.forward if backend is None else Compiled(model.forward, compiled)

    def begin(self) -> None:
        self.cache.reset()

    def logits(self, ids: Tensor, position: int) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        positions = torch.arange(position, position + ids.shape[1], device=self._device)[None]
        return self._forward(ids.to(self._device), position_ids=positions, **self._extra).logits[0, -1]

    def warm_up(self, ids: Tensor) -> None:
        """Compiles for the prompt and for the tokens after it; the second time, CUDA graphs are recorded."""
        for _ in range(2 if self._device.type == "cuda" else 1):
            list(self.tokens(ids, 3))


def of_checkpoint(
    checkpoint: str, tokenizer: str | None, prompt: str, max_new_tokens: int, eager: bool, debug: bool, tp: bool,
    device: torch.device, drafts: Drafts = NO_DRAFTS,
) -> Text:  # fmt: skip
    """A prompt for the model of a checkpoint, compiled if it is to be, with what drafts for it.

    Raises:
        UsageError: the prompt has no tokens.
    """
    tokens = load_tokenizer(tokenizer or checkpoint)
    ids = tokens(prompt, return_tensors="pt").input_ids
    if not ids.numel():
        raise UsageError(
            "the prompt is empty, and this tokenizer begins no text by itself. Give --prompt at least a character."
        )
    model = load(checkpoint, debug, tp, device)
    length = ids.shape[1] + max_new_tokens
    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if positions is not None and length > positions:
        err().print(
            f"warning: {counted(ids.shape[1], 'token')} of prompt and {counted(max_new_tokens, 'new one')} are more "
            f"than the {counted(positions, 'position')} "
            "this model was made for; text beyond them may make no sense."
        )
    room = 1 << (length - 1).bit_length()  # so that Inductor's cache of compiled code serves many lengths
    backend, ends = None if eager else "ctfp8", ends_of(model.generation_config.eos_token_id)
    decoder: Decoder | Drafted = (
        Drafted(model, drafts, room + drafts.most(model), backend, debug=debug)
        if drafts
        else Decoder(model, room, backend)
    )
    if isinstance(decoder, Drafted):
        decoder.ends = ends
    if not eager:
        decoder.warm_up(ids)
    return Text(prompt, decoder, ids, tokens.decode, ends)
