"""transformers' continuous batching on our graphs: a step of `generate_batch`, or of its server, is one graph.

transformers' paged cache is a Python object that torch.compile does not look into, so that each layer would be two graphs. What
a step needs of it is one tensor of pages and the places of tokens in it, and one operator (`ctfp8::paged_attention`) that
writes and reads them. So nothing in the graph depends on which requests run, or on how many: it is compiled for sizes that are
any, once for several tokens and once for one.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..compat import symbols_config
from ..errors import UsageError
from ..inductor.recipe import Compiled
from ..ops import paged as paged  # the operator
from .compat import ALL_ATTENTION_FUNCTIONS

NAME = "ctfp8_paged"
#: The argument, passed through the model to each attention, by which that knows the pages.
_PAGES = "ctfp8_pages"


def watch(model: Any) -> None:
    """Has a model of ours step through transformers' continuous batching in graphs, once it is compiled."""
    if hasattr(type(model), "init_continuous_batching"):
        model.init_continuous_batching = types.MethodType(_preparing(type(model).init_continuous_batching), model)


@functools.cache
def _preparing(init: Any) -> Any:
    @functools.wraps(init)
    def init_continuous_batching(self: Any, *args: Any, **kwargs: Any) -> Any:
        manager = init(self, *args, **kwargs)
        if why_not(self, manager) is None:
            own = self.config._attn_implementation
            self.set_attn_implementation(NAME)
            manager._original_attn_impl = manager._original_attn_impl or own  # set again when it stops
            if not isinstance(self.forward, PagedForward):
                self.forward = PagedForward(self.forward)
        return manager

    return init_continuous_batching


def why_not(model: Any, manager: Any) -> str | None:
    """Why a model's steps stay transformers' own; None where they are ours."""
    config = model.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if model.config._attn_implementation not in ("sdpa", NAME):
        return f"its attention is {model.config._attn_implementation}"
    if kinds != {"full_attention"} or getattr(config, "sliding_window", None):
        return "some of its layers attend to a window, or have states"
    if getattr(config, "attn_logit_softcapping", None) or any(hasattr(m, "sinks") for m in model.modules()):
        return "its attention has sinks, or caps its logits"
    if "logits_to_keep" not in _parameters(type(model).forward):
        return "its forward computes the logits of all tokens"
    settings = manager.continuous_batching_config
    if manager.distributed_helper.tp_size > 1 or settings.max_blocks_per_request or any(settings.cuda_graph_booleans):
        return "it is spread over processes, or has CUDA graphs"
    if settings.varlen_compile_config is not None or settings.use_async_batching:
        return "transformers was told how to compile it"
    return None


def _parameters(function: Any) -> Any:
    return inspect.signature(function).parameters


class _Step(Compiled):
    """A step, compiled so that no two sizes that are the same by chance are taken to be one."""

    def compiling(self) -> contextlib.ExitStack:
        during = super().compiling()
        during.enter_context(symbols_config.patch(use_duck_shape=False))
        return during


class PagedForward:
    """A model's forward that does a step of continuous batching with tensors only; other calls pass through."""

    def __init__(self, forward: Any):
        functools.update_wrapper(self, forward)
        self.inner = forward
        plain = forward
        while hasattr(plain, "_torchdynamo_orig_callable"):
            plain = plain._torchdynamo_orig_callable
        self._torchdynamo_orig_callable = plain
        self._step: Callable[..., Any] = plain
        if isinstance(forward, Compiled):
            self._step = _Step(plain, {**forward.arguments, "dynamic": True})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("cache")
        if "write_index" not in kwargs or cache is None:
            return self.inner(*args, **kwargs)
        (allocator,) = cache.cache_allocators.values()
        (read,), (write,), (key_starts,) = kwargs["read_index"], kwargs["write_index"], kwargs["cu_seq_lens_k"].values()
        if not read.numel():  # all tokens there are were just written
            read = write.clone()  # a tensor of its own, as ever: dynamo looks for those that are one
        pages = (allocator.cache_tensor, write, read, kwargs["cu_seq_lens_q"], key_starts, allocator.tokens_per_page)
        return self._step(
            input_ids=kwargs["input_ids"], position_ids=kwargs["position_ids"], use_cache=False,
            logits_to_keep=kwargs["logits_indices"], **{_PAGES: pages},
        )  # fmt: skip


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    if (given := kwargs.get(_PAGES)) is None:
        raise UsageError(
            "this model is batching requests (generate_batch, ctfp8 serve) and cannot be called beside them. Call it when they "
            "have ended, or load it twice."
        )
    *tensors, page = given
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return torch.ops.ctfp8.paged_attention(query, key, value, *tensors, page, module.layer_idx, scale), None


ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)
