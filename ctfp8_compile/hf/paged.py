"""transformers' continuous batching on our graphs: a step of `generate_batch`, or of its server, is one graph.

transformers' paged cache is a Python object that torch.compile does not look into, so that each layer would be two graphs. What
a step needs of it is one tensor of pages and the places of tokens in it, and one operator (`ctfp8::paged_attention`) writes and
reads them. Nothing in the graph depends on which requests run, or on how many. So there are three, for any sizes: of one new
token, of several of one request, of several requests.
"""

from __future__ import annotations

import contextlib
import functools
import types
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..compat import symbols_config
from ..errors import UsageError
from ..inductor.recipe import Compiled
from ..ops import paged as paged  # the operator
from . import paged_cache
from .compat import ALL_ATTENTION_FUNCTIONS

#: transformers' name for attention to pages as it is done here, while a model is batched.
NAME = "ctfp8_paged"
#: The argument, passed through the model to each attention, by which that knows the pages.
_PAGES = "ctfp8_pages"
_KEPT = "_ctfp8_steps"
_MANAGER = "_ctfp8_manager"
_BUSY = (
    "this model is batching requests (generate_batch, ctfp8 serve) and cannot be called beside them. Call it when they have "
    "ended, or load it twice."
)


def watch(model: Any) -> None:
    """Has a model of ours step through transformers' continuous batching in graphs, once it is compiled."""
    if hasattr(type(model), "init_continuous_batching"):
        model.init_continuous_batching = types.MethodType(_preparing(type(model).init_continuous_batching), model)
        model.register_forward_pre_hook(_before)  # a step calls the forward itself


def _before(model: Any, args: Any) -> None:
    if model.config._attn_implementation == NAME:
        raise UsageError(_BUSY)


def _refuse_if_running(model: Any) -> None:
    manager = model.__dict__.get(_MANAGER, lambda: None)()
    if manager is not None and manager.is_running():
        raise UsageError(_BUSY)


@functools.cache
def _preparing(init: Any) -> Any:
    @functools.wraps(init)
    def init_continuous_batching(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.config._attn_implementation == NAME:  # of a manager that runs, or that failed
            _refuse_if_running(self)
            self.set_attn_implementation("sdpa")
        manager = init(self, *args, **kwargs)
        why = why_not(self, manager)
        fp8 = paged_cache.is_fp8(self, why)
        if why is None and self.config._attn_implementation != NAME:
            manager._original_attn_impl = manager._original_attn_impl or self.config._attn_implementation
            self.set_attn_implementation(NAME)  # until the manager stops
        manager.model = _steps_of(self, why, fp8)
        if fp8:
            manager._create_batch_processor = functools.partial(_made_for_bytes, manager)
        self.__dict__[_MANAGER] = weakref.ref(manager)
        return manager

    return init_continuous_batching


def _made_for_bytes(manager: Any) -> Any:
    """A batch processor whose pages hold FP8 values."""
    steps = manager.model
    manager.model = paged_cache.Bytes(steps.model, steps.layers)
    try:
        return type(manager)._create_batch_processor(manager)
    finally:
        manager.model = steps


def why_not(model: Any, manager: Any) -> str | None:
    """Why a model's steps stay transformers' own; None where they are ours."""
    config = model.config.get_text_config(decoder=True)
    settings = getattr(manager, "continuous_batching_config", None)
    if settings is None or not hasattr(manager, "distributed_helper"):
        return "this release of transformers batches in another way"
    if model.config._attn_implementation not in ("sdpa", NAME):
        return f"its attention is {model.config._attn_implementation}, not sdpa"
    if set(getattr(config, "layer_types", None) or ["full_attention"]) != {"full_attention"}:
        return "some of its layers attend to a window, or keep states"
    if getattr(config, "sliding_window", None):
        return "its layers attend to a window"
    if getattr(config, "attn_logit_softcapping", None) or any(hasattr(part, "sinks") for part in model.modules()):
        return "its attention has sinks, or caps its logits"
    if manager.distributed_helper.tp_size > 1 or settings.max_blocks_per_request or any(settings.cuda_graph_booleans):
        return "it is spread over processes, or uses CUDA graphs"
    if settings.varlen_compile_config is not None or settings.use_async_batching:
        return "transformers is to compile it, or to prepare a step while another runs"
    return None


def _steps_of(model: Any, why: str | None, fp8: bool) -> _Steps:
    """Kept with the model, so that what was compiled for one batch serves the next."""
    kept = model.__dict__.get(_KEPT)
    if kept is None or kept.forward is not model.forward or (kept.why, kept.layers is not None) != (why, fp8):
        kept = model.__dict__[_KEPT] = _Steps(model, why, fp8)
    return kept


class _Step(Compiled):
    """A step, compiled so that no two sizes that are the same by chance are taken to be one."""

    def compiling(self) -> contextlib.ExitStack:
        during = super().compiling()
        during.enter_context(symbols_config.patch(use_duck_shape=False))
        return during


class _Steps:
    """What transformers' engine takes for the model: called, it does a step with tensors only; all else is the model's."""

    def __init__(self, model: Any, why: str | None, fp8: bool):
        forward = plain = model.forward
        while hasattr(plain, "_torchdynamo_orig_callable"):
            plain = plain._torchdynamo_orig_callable
        step: Callable[..., Any] = plain
        if isinstance(forward, Compiled) and why is None:
            step = _Step(plain, {**forward.arguments, "dynamic": True})
        elif isinstance(forward, Compiled):
            warnings.warn(f"{type(model).__name__} is batched, but not compiled: {why}.", stacklevel=4)
        layers = paged_cache.layers_of(model) if fp8 else None
        self.__dict__.update(model=model, why=why, forward=forward, step=step, layers=layers)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["model"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.model, name, value)

    def __call__(self, **kwargs: Any) -> Any:
        if self.why is not None:
            return self.step(**kwargs)
        (allocator,) = kwargs["cache"].cache_allocators.values()
        (read,), (write,), (key_starts,) = kwargs["read_index"], kwargs["write_index"], kwargs["cu_seq_lens_k"].values()
        if not read.numel():  # all tokens there are were just written
            read = write.clone()  # a tensor of its own, as ever: dynamo looks for those that are one
        kept = allocator.cache_tensor  # [tokens, 2, heads, columns], of which a page is `tokens_per_page`
        kept = kept.view(-1, 2, allocator.tokens_per_page, *kept.shape[2:])
        pages = (kept, write, read, kwargs["cu_seq_lens_q"], key_starts, self.layers)
        kept_logits = {name: kwargs[name] for name in ("logits_to_keep",) if name in kwargs}
        step = {"input_ids": kwargs["input_ids"], "position_ids": kwargs["position_ids"], "use_cache": False}
        return self.step(**step, **kept_logits, **{_PAGES: pages})


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    *places, layers = kwargs[_PAGES]

    def attend(
        query: Tensor, key: Tensor, value: Tensor, key_scale: Tensor | None, value_scale: Tensor | None
    ) -> Tensor:
        paged = torch.ops.ctfp8.paged_attention
        return paged(query, key, value, *places, module.layer_idx, scale, key_scale, value_scale)

    return paged_cache.attend(attend, (query, key, value), layers, module.layer_idx), None


ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)
