"""How a transformers model is called in another runtime: by the names that optimum, onnxruntime-genai and OpenVINO GenAI use."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ..errors import UsageError
from ..model.call import Call, Called, name_of
from .compat import cache_argument

#: Sizes of the example that a model is traced with: no two are alike, and none is 1, which tracers take for a constant.
_BATCH, _TOKENS, _PAST = 2, 3, 5

#: Dimensions of ids, and of what there is of each, that vary.
_TEXT = {0: "batch_size", 1: "sequence_length"}

#: Layers whose state is keys and values of every token.
_ATTENTIONS = {"full_attention", "sliding_attention", "chunked_attention", "attention", "sparse", "dense", "moe"}

#: Arguments of models that also see or hear.
_SENSES = ("pixel_values", "pixel_values_videos", "input_features", "input_values")


def call_of(model: Any) -> Call:
    """A decoder with its cache as inputs and outputs, or a model that reads a text at once.

    Args:
        model: of transformers, as `in_dtype` gives it; its experts are set to the gathered form, which has no loop.

    Raises:
        UsageError: it is neither; or its layers keep another state than keys and values.
    """
    gather_experts(model)
    parameters = inspect.signature(model.forward).parameters
    name = name_of(model)
    if "input_ids" not in parameters or getattr(model.config, "is_encoder_decoder", False):
        raise UsageError(
            f"{name} is called in a way of its own. Pass the arguments of one call: ctfp8.export(model, args, kwargs, path)."
        )
    if senses := [one for one in parameters if one in _SENSES]:
        raise UsageError(
            f"{name} takes {senses[0]} beside a text, and there is no call of it that runtimes know. Pass the arguments of one: "
            "ctfp8.export(model, args, kwargs, path); or load the part that makes text alone: ctfp8.from_pretrained(path)."
        )
    generates = hasattr(model, "can_generate") and model.can_generate()
    return _decoder(model) if generates else _reader(model, parameters)


def gather_experts(model: Any) -> None:
    """Each token's experts are gathered: the grouped form is an operator, and the plain one a loop, that others have not."""
    if hasattr(model, "set_experts_implementation") and model._can_set_experts_implementation():
        model.set_experts_implementation("batched_mm")


class Decoder(nn.Module):
    """`logits, present… = decoder(input_ids, attention_mask, position_ids, *past)`, keys and values of each layer in turn.

    A model whose forward takes no positions gets none, and there is no such input then.
    """

    def __init__(self, model: Any):
        super().__init__()
        self.model = model
        self.takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        self._argument = cache_argument(model)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        """Logits `[batch, sequence, vocabulary]` of all tokens given, and keys and values of these and of those before.

        Args:
            input_ids: `[batch, sequence]`.
            attention_mask: `[batch, past + sequence]`, 0 for padding.
            rest: positions `[batch, sequence]`; keys and values `[batch, heads, past, width]`, of no tokens at the beginning.
        """
        positions = {"position_ids": rest[0]} if self.takes_positions else {}
        past = rest[len(positions) :]
        cache = DynamicCache([*zip(past[::2], past[1::2], strict=True)])
        out = self.model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=True, **positions, **{self._argument: cache}
        )
        return out.logits, *[states for layer in cache.layers for states in (layer.keys, layer.values)]


def _decoder(model: Any) -> Call:
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "output_router_logits", False):
        config.output_router_logits = False  # what is for training fails where a mask is longer than its text
    kinds = {kind for kind in getattr(config, "layer_types", None) or () if kind not in _ATTENTIONS}
    if kinds:
        raise UsageError(_STATES.format(model=name_of(model), kinds=", ".join(sorted(kinds))))
    ids = torch.arange(_BATCH * _TOKENS, device=model.device).reshape(_BATCH, _TOKENS)
    past = _past(model, ids)
    names = [f"{i}.{what}" for i in range(len(past) // 2) for what in ("key", "value")]
    mask = torch.ones(_BATCH, _PAST + _TOKENS, dtype=torch.int64, device=model.device)
    decoder = Decoder(model)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if decoder.takes_positions:
        inputs["position_ids"] = (mask.cumsum(-1) - 1)[:, _PAST:].contiguous()
    inputs |= {f"past_key_values.{name}": states for name, states in zip(names, past, strict=True)}
    dims: dict[str, dict[int, str]] = {
        "input_ids": _TEXT,
        "position_ids": _TEXT,
        "logits": _TEXT,
        "attention_mask": {0: "batch_size", 1: "total_sequence_length"},
    }
    for name in names:
        dims[f"past_key_values.{name}"] = {0: "batch_size", 2: "past_sequence_length"}
        dims[f"present.{name}"] = {0: "batch_size", 2: "total_sequence_length"}
    return Call(
        decoder,
        inputs,
        dims,
        lambda: ("logits", *(f"present.{name}" for name in names)),
        {f"past_key_values.{name}": f"present.{name}" for name in names},
    )


_STATES = (
    "{model} has layers of type {kinds}, whose state is not keys and values, and there are no names for it that runtimes know. "
    "Export one call without a cache: ctfp8.export(model, (ids,), {{'use_cache': False}}, path)."
)


def _past(model: Any, ids: Tensor) -> list[Tensor]:
    """What each layer would keep of a text of `_PAST` tokens, from what it keeps of one."""
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=ids[:1], use_cache=True, **{cache_argument(model): cache})
    kept = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    if not kept or not all(isinstance(states, Tensor) and states.dim() == 4 for states in kept):
        raise UsageError(_STATES.format(model=name_of(model), kinds=type(model.config).__name__))
    return [states.new_zeros(_BATCH, states.shape[1], _PAST, states.shape[3]) for states in kept]  # type: ignore[union-attr]


def _reader(model: Any, parameters: Any) -> Call:
    ids = torch.arange(1, 1 + _BATCH * _TOKENS, device=model.device).reshape(_BATCH, _TOKENS)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "token_type_ids" in parameters and getattr(model.config, "type_vocab_size", 0) > 1:
        inputs["token_type_ids"] = torch.zeros_like(ids)
    fixed = {"return_dict": True} | ({"use_cache": False} if "use_cache" in parameters else {})
    called = Called(model, tuple(inputs), fixed)
    with torch.no_grad():
        found = called(*inputs.values())
    dims: dict[str, dict[int, str]] = dict.fromkeys(inputs, _TEXT)
    for name, value in zip(called.outputs(), found, strict=True):
        varies = {0: "batch_size"} if value.dim() and value.shape[0] == _BATCH else {}
        dims[name] = varies | ({1: "sequence_length"} if value.dim() > 1 and value.shape[1] == _TOKENS else {})
    return Call(called, inputs, dims, called.outputs)
