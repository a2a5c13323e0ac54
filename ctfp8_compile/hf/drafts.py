"""Generation with drafts: of a compiled model the MTP layers are compiled, too, and what cannot work is said first.

transformers makes a candidate generator for each call of `generate`. Of a compiled model it gets MTP layers whose step is one
graph, and a cache of a fixed size for them, both kept from call to call.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, StaticCache

from ..errors import UsageError
from ..inductor.recipe import Compiled
from ..model.beside import Beside, put_beside
from . import compat, mtp
from .static_cache import layers_of, static_cache


def watch(model: Any) -> None:
    """Has a model of ours look at what it is asked to draft with before it generates."""
    if not hasattr(type(model), "_get_candidate_generator"):
        return
    if mtp.has_layers(model):
        put_beside(model, types.MethodType(_traced, model))
    for name, make in (("_validate_generation_mode", _checking), ("_get_candidate_generator", _drafting)):
        setattr(model, name, types.MethodType(make(getattr(type(model), name)), model))


@functools.cache
def _checking(validate: Any) -> Any:
    @functools.wraps(validate)
    def check(self: Any, mode: Any, config: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(config, "use_mtp", False):
            mtp.check(self)
            if getattr(self, "_is_stateful", False):
                raise UsageError(
                    f"{type(self).__name__} keeps states of linear attention, from which rejected drafts cannot be taken back: "
                    "transformers drafts for no such model. Generate without use_mtp."
                )
        return validate(self, mode, config, *args, **kwargs)

    return check


@functools.cache
def _drafting(make: Any) -> Any:
    @functools.wraps(make)
    def candidate_generator(self: Any, *args: Any, **kwargs: Any) -> Any:
        cache = next((v for v in (kwargs.get("model_kwargs") or {}).values() if isinstance(v, Cache)), None)
        _check_windows(cache)
        generator = make(self, *args, **kwargs)
        if isinstance(self.forward, Compiled) and compat.CUTS_DRAFTS and not generator.requires_model_outputs:
            _fill(generator, (kwargs.get("generation_config") or args[0]).max_length, cache)
        if getattr(generator, "mtp_model", None) is not None and isinstance(self.forward, Compiled):
            # what records hidden states is installed under a lock, which cannot be traced
            compat.install_output_recorders(self)
            config = kwargs.get("generation_config") or args[0]
            generator.mtp_model, own = compiled(self, max(config.max_length, getattr(cache, "limit", 0)))
            generator.mtp_cache = own or generator.mtp_cache
        assistant = getattr(generator, "assistant_model", None)
        if assistant is not None and isinstance(assistant.forward, Compiled):
            config = kwargs.get("generation_config") or args[0]
            if (fixed := _of_assistant(assistant, config.max_length)) is not None:
                generator.assistant_kwargs["cache"] = fixed
        return generator

    return candidate_generator


def _check_windows(cache: Any) -> None:
    """Refuses a static cache that has forgotten what a rejected draft replaced."""
    layers = getattr(cache, "layers", ())
    windows = [n for n in layers if isinstance(n, compat.StaticSlidingWindowLayer) and not n.is_croppable]
    if windows:
        window = windows[0].max_cache_len
        raise UsageError(
            f"{len(windows)} of {len(layers)} layers of the static cache keep a window of {window} tokens, and what a rejected "
            "draft overwrites there cannot be taken back. Generate with a cache that grows (leave cache= out, or "
            f"ctfp8.dynamic_cache(model)), with a static one of max_length={window}, or without a draft."
        )


def _fill(generator: Any, max_length: int, cache: Any) -> None:
    """Has a prompt, and the last token of a text, be checked with a draft of one token, if there is no other.

    They would be kinds of calls that are met late: the graph of a prompt gives the logits of one token or of several, and a text
    may end in a plain step that no step before it was.
    """
    layers = getattr(cache, "layers", ())
    room = min((layer.max_cache_len for layer in layers if isinstance(layer, compat.StaticLayer)), default=None)
    candidates, first = generator.get_candidates, True

    def filled(input_ids: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        nonlocal first
        found, logits = candidates(input_ids, **kwargs)
        length, odd, first = input_ids.shape[1], first or input_ids.shape[1] + 1 >= max_length, False
        generator.filled = odd and found.shape[1] == length and (room is None or length < room)
        if generator.filled:
            found = torch.cat([input_ids, input_ids[:, -1:]], 1)
        return found, logits

    generator.get_candidates = filled


@dataclass
class Tally:
    """What drafts came to, of the steps after the one that read the prompt.

    Attributes:
        steps: passes of the model, each of which makes a token.
        drafted, accepted: tokens that it was given to check, and those that it would have made itself.
    """

    steps: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def tokens(self) -> int:
        return self.steps + self.accepted

    @property
    def acceptance(self) -> float:
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_step(self) -> float:
        return self.tokens / self.steps if self.steps else 0.0


@contextlib.contextmanager
def tally(model: Any) -> Iterator[Tally]:
    """Counts the drafts of the texts that a model generates meanwhile."""
    counts, made = Tally(), model._get_candidate_generator

    def candidate_generator(self: Any, *args: Any, **kwargs: Any) -> Any:
        generator, read = made(*args, **kwargs), False
        update = generator.update_candidate_strategy

        def counted(input_ids: Tensor, scores: Tensor, matches: Any) -> Any:
            nonlocal read
            if read:
                counts.steps += 1
                counts.drafted += scores.shape[1] - 1 - getattr(generator, "filled", False)
                counts.accepted += int(matches)
            read = True
            return update(input_ids, scores, matches)

        generator.update_candidate_strategy = counted
        return generator

    own = vars(model).get("_get_candidate_generator")
    model._get_candidate_generator = types.MethodType(candidate_generator, model)
    try:
        yield counts
    finally:
        del model._get_candidate_generator
        if own is not None:
            model._get_candidate_generator = own


#: Tokens that the cache of MTP layers has room for at least: of one layer or a few, it is small, and one size is one compilation.
_ROOM = 1024


def compiled(main: Any, max_length: int) -> tuple[CompiledDraft, StaticMtpCache | None]:
    """The MTP layers of a compiled model, compiled as it is, and an empty cache for texts of `max_length` tokens.

    There is none where several layers draft and one keeps a window: of it tokens are taken back after each rejection.
    """
    source = mtp.check(main)
    layers = mtp.mtp_layers(main)
    if source.compiled is None or source.compiled[0].step.layers is not layers:
        source.compiled = (CompiledDraft(layers, main.forward.arguments), None)
    draft, cache = source.compiled
    device = layers.layers[0].enorm.weight.device
    if cache is None or cache.limit < max_length or cache.layers[0].device != device:
        cache = StaticMtpCache(layers.config, max(_ROOM, 1 << (max_length - 1).bit_length()))
        draft.begin(cache)
        source.compiled = (draft, cache)
    cache.reset()
    cache.activate_past_recording()
    return draft, cache if len(layers.layers) == 1 or cache.is_croppable else None


def _traced(main: Any) -> list[Beside]:
    """Each MTP layer and what to trace it with: 16 tokens, no cache."""
    layers = mtp.mtp_layers(main)
    step, device = Step(layers).eval(), layers.layers[0].enorm.weight.device
    hidden = torch.zeros(1, 16, layers.config.hidden_size, dtype=layers.config.dtype, device=device)
    positions = torch.arange(16, device=device)[None]
    depths = range(len(layers.layers))
    return [Beside(step, (k, hidden, positions, None, positions), "layers.layers.", "mtp.layers.") for k in depths]


def _of_assistant(assistant: Any, max_length: int) -> Any:
    """An empty static cache for a compiled assistant, kept from call to call; None where tokens cannot be taken back from one."""
    cache = vars(assistant).get("_ctfp8_draft_cache")
    if cache is None or cache.limit < max_length or cache.layers[0].device != assistant.device:
        cache = static_cache(assistant, 1, max(_ROOM, 1 << (max_length - 1).bit_length()))
        vars(assistant)["_ctfp8_draft_cache"] = cache
    cache.reset()
    return cache if cache.is_croppable else None


class StaticMtpCache(StaticCache):
    """The cache of MTP layers, of a fixed size: the tokens of layer k lie k + 1 positions behind those that it has seen."""

    def __init__(self, config: Any, limit: int):
        super(StaticCache, self).__init__(layers_of(config, limit))
        self.limit = limit

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        return super().get_query_offset(layer_idx) + layer_idx + 1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        length, offset = super().get_mask_sizes(query_length, layer_idx)
        return length, offset + layer_idx + 1


class Step(nn.Module):
    """One MTP layer, and the logits of its last token."""

    def __init__(self, layers: Any):
        super().__init__()
        self.layers = layers

    def forward(
        self, depth: int, hidden_states: Tensor, position_ids: Tensor, cache: Any, input_ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        hidden_states = self.layers.forward_layer(depth, hidden_states, position_ids, cache, input_ids=input_ids)
        return hidden_states, self.layers._project_to_logits(hidden_states[:, -1:])


class CompiledDraft:
    """What a candidate generator calls instead of a `MtpModel`: a token of each layer, each layer's step one graph."""

    def __init__(self, layers: Any, arguments: dict[str, Any]):
        self.step = Step(layers).eval()
        self.run = Compiled(self.step.forward, arguments)

    @torch.no_grad()
    def begin(self, cache: StaticMtpCache) -> None:
        """Makes the cache's tensors, as the layers need them: what begins inside a graph is compiled twice."""
        layers = self.step.layers
        hidden = torch.zeros(
            1, 1, layers.config.hidden_size, dtype=layers.config.dtype, device=layers.layers[0].enorm.weight.device
        )
        token = torch.zeros(1, 1, dtype=torch.long, device=hidden.device)
        for depth in range(len(layers.layers)):
            self.step.forward(depth, hidden, token, cache, token)
        cache.reset()

    @torch.no_grad()
    def __call__(
        self,
        input_ids: Tensor,
        last_hidden_states: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        mtp_cache: Any,
        do_sample: bool = False,
        logits_processor: Any = None,
        full_input_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor, None]:
        """As `MtpModel.forward`: `[1, layers]` tokens and `[1, layers, vocabulary]` logits. No padding: texts come one by one."""
        tokens, all_logits = [], []
        # a part of a tensor has strides, and a base, that a graph made for another part does not fit
        last_hidden_states = last_hidden_states.clone(memory_format=torch.contiguous_format)
        for depth in range(len(self.step.layers.layers)):
            last_hidden_states, logits = self.run(depth, last_hidden_states, position_ids, mtp_cache, input_ids)
            logits = logits[:, -1].to(input_ids.device)
            if logits_processor is not None and full_input_ids is not None:
                logits = logits_processor(full_input_ids, logits.float())
            if do_sample:
                token = torch.multinomial(logits.softmax(-1, dtype=torch.float32), num_samples=1)
            else:
                token = logits.argmax(-1, keepdim=True)
            tokens.append(token)
            all_logits.append(logits[:, None])
            input_ids = torch.cat([input_ids[:, 1:], token], -1)
            position_ids = torch.cat([position_ids[:, 1:], position_ids[:, -1:] + 1], -1)
            if full_input_ids is not None:
                full_input_ids = torch.cat([full_input_ids, token], -1)
        return torch.cat(tokens, 1), torch.cat(all_logits, 1), None
