"""`ctfp8.compile(model)`: a model's forward compiled in place, in as few graphs as prompts of all sizes allow."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import inspect
import logging
import re
import threading
import warnings
from collections import Counter
from collections.abc import Callable
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import nn

from ..compat import (
    AT_RECOMPILE_LIMIT,
    RECOMPILE_LOGGER,
    CallbackTrigger,
    FailOnRecompileLimitHit,
    callback_handler,
    dynamo_config,
    guard_failures,
    valid_vec_isa_list,
)
from ..counted import counted
from ..errors import Ctfp8Error, UsageError
from ..kept import folder
from ..ops import FP8
from ..paused_gc import paused_gc
from ..registry import backend
from .progress import Progress, stage

log = logging.getLogger("ctfp8_compile")
Model = TypeVar("Model", bound=nn.Module)


@paused_gc()
def compile(model: Model, **torch_compile_arguments: Any) -> Model:
    """Compiles a model's `forward` in place: `generate`, pipelines and plain calls then run compiled.

    Sizes are dynamic from the first call on, so that prompts of all lengths and batches of all sizes share four graphs: one for
    prompts and one for single tokens, each for one sequence and for several. A second call replaces what the first did.

    Args:
        model: with FP8 weights, in eval mode: a transformers model, one with PEFT adapters, any module, a loaded artifact.
        **torch_compile_arguments: as for `torch.compile`: `fullgraph`, `mode`, `options`, `dynamic`, `backend`, …. `mode` and
            `options` may both be given, which `torch.compile` refuses; an option wins over what the mode sets.

    Returns:
        `model`.

    Raises:
        UsageError: the model has no FP8 weight, or is in training mode. When the compiled model runs: no graph fits a call,
            `fullgraph` was given, and the limit of compilations is reached (without `fullgraph`, that warns).
    """
    arguments = {"backend": "ctfp8", "dynamic": True, **torch_compile_arguments}
    if arguments["backend"] == "ctfp8" and not any(_fp8(model)):
        raise UsageError(
            f"{type(model).__name__} holds no FP8 weight, so there is nothing for ctfp8 to compile. Load the checkpoint with "
            "ctfp8.from_pretrained, a plain nn.Module with ctfp8.load_state_dict, or compile it with torch.compile."
        )
    if model.training:
        raise UsageError("this model is in training mode, and ctfp8 compiles for inference. Call model.eval() first.")
    # an adapter's wrapper calls the model, which is also what generates
    inner: Any = getattr(model, "get_base_model", lambda: model)()
    plain = inner.forward
    while hasattr(plain, "_torchdynamo_orig_callable"):
        plain = plain._torchdynamo_orig_callable
    inner.forward = Compiled(plain, arguments)
    return model


class Compiled:
    """A compiled function that shows its compilations, and says in our words what torch says at their limit."""

    def __init__(self, function: Callable[..., Any], arguments: dict[str, Any]):
        functools.update_wrapper(self, function)
        self.__code__ = type(self).__call__.__code__  # which torch.export asks every forward for
        self._torchdynamo_orig_callable, self.arguments = function, arguments
        # torch counts compilations by function; the forward of most transformers models is one and the same wrapper
        apart = {"isolate_recompiles": True} if _ISOLATES else {}
        self._run = torch.compile(function, **{**apart, **_for_torch(arguments)})
        if _started not in callback_handler.start_callbacks:  # torch's reset drops them
            callback_handler.register_start_callback(_started)
            callback_handler.register_end_callback(_ended)
        self._one_at_a_time = threading.RLock()  # dynamo's guards fail at times where threads evaluate them together
        self._keeper: Any = None  # asked for at the first call: it takes Inductor along
        self._asked_to_keep = arguments["backend"] == "ctfp8" and folder.place() is not None and folder.limit() > 0
        self._graphs = 0
        self._at_limit: str | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # in a larger graph, or an export
            return self._torchdynamo_orig_callable(*args, **kwargs)
        outer, _running.now = getattr(_running, "now", None), self
        try:
            with self._one_at_a_time:
                return self._call(args, kwargs)
        except FailOnRecompileLimitHit as error:
            raise UsageError(self._at_limit or str(error)) from None
        except Exception as error:
            if isinstance(ours := getattr(error, "inner_exception", None), Ctfp8Error):
                raise ours from None  # what our backend said, without torch's frames around it
            raise
        finally:
            _running.now = outer

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """By what an earlier process compiled, if it fits; else as `torch.compile` does, and what that compiles is kept."""
        if self._asked_to_keep:
            self._asked_to_keep = False
            self._keeper = _keeper(self._torchdynamo_orig_callable, self.arguments, weights_of(self._model()))
        if self._keeper is None:
            return self._run(*args, **kwargs)
        if (kept := self._keeper.fitting(args, kwargs)) is not None:
            return kept(*self._keeper.given(args), **kwargs)
        result = self._run(*args, **kwargs)
        self._keeper.save()
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Compiled:
        return Compiled(copy.deepcopy(self._torchdynamo_orig_callable, memo), self.arguments)

    def _model(self) -> nn.Module | None:
        return getattr(self._torchdynamo_orig_callable, "__self__", None)

    def compiling(self) -> contextlib.ExitStack:
        """A compilation of this function begins; closed when it ends."""
        self._graphs += 1
        progress = Progress(
            f"compiling {weights_of(self._model())}{f', graph {self._graphs}' if self._graphs > 1 else ''}"
        )
        during = contextlib.ExitStack()
        during.callback(progress.stop)
        stage("tracing")
        during.enter_context(paused_gc())
        if self._keeper is not None:
            during.enter_context(self._keeper.recording())
        if self.arguments["backend"] == "ctfp8" and not _asked.is_set():
            _asked.set()  # it tries each in a process of its own; a second, for which it would wait when tracing is done
            threading.Thread(target=valid_vec_isa_list, daemon=True).start()
        # sizes are dynamic, an epsilon or a scaling is not: each would be an input of the graph, checked at every call
        during.enter_context(dynamo_config.patch(specialize_float=True))
        return during

    def reached(self, limit: int, function: str, last_reason: str) -> None:
        """torch compiles no more: `function` is what it names, `last_reason` why the newest graph does not fit."""
        failed = [why for code, reasons in guard_failures.items() if _named(code) == function for why in reasons]
        self._at_limit = _why(limit, failed[-limit:] or [last_reason])
        if not self.arguments.get("fullgraph"):
            warnings.warn(
                f"{self._at_limit} From now on, what fits none of them runs uncompiled, and slowly.", stacklevel=2
            )


def _keeper(*arguments: Any) -> Any:
    """Of a release of torch that has not what keeping needs, nothing is kept."""
    try:
        return importlib.import_module(".kept", __package__).keeper(*arguments)
    except UsageError as why:
        log.info("compiled graphs are not kept: %s", why)
        return None


def _why(limit: int, failed: list[str]) -> str:
    guards = [re.sub(r"^\d+/\d+: ", "", why).partition("\n")[0].partition("  #")[0].strip() for why in failed]
    alike = [re.sub(r"\d+", "#", guard) for guard in guards]
    most, count = Counter(alike).most_common(1)[0]
    guard = guards[alike.index(most)]
    if re.search("cache|past_key_values", guard):
        cure = "Generate with a cache of a fixed size: ctfp8.static_cache(model, …)."
    elif "size mismatch" in guard or "size()" in guard:
        cure = "Leave dynamic=True, which is the default of ctfp8.compile, or pad inputs to fewer sizes."
    else:
        cure = f"Vary it less, or allow more graphs: torch.compiler.config.recompile_limit = {2 * limit}."
    return (
        f"this model was compiled {counted(limit, 'time')}, which is torch's limit, and none of its graphs fits this "
        f"call: {count} of "
        f"{len(guards)} because of {guard}. {cure}"
    )


_ISOLATES = "isolate_recompiles" in inspect.signature(torch.compile).parameters  # from torch 2.13 on
_running = threading.local()  # now: the `Compiled` that this thread is in
_asked = threading.Event()  # Inductor, which vector instructions work
_compiling: list[contextlib.ExitStack] = []


def _started(event: Any) -> None:
    now = getattr(_running, "now", None)
    if now is not None and event.callback_trigger is CallbackTrigger.DYNAMO:
        _compiling.append(now.compiling())


def _ended(event: Any) -> None:
    if _compiling:
        _compiling.pop().close()


def _speaks(record: logging.LogRecord) -> bool:
    """Filter of torch's warning at the limit: of our models, we say it."""
    now = getattr(_running, "now", None)
    if now is None or not str(record.msg).startswith(AT_RECOMPILE_LIMIT) or not isinstance(record.args, tuple):
        return True
    _, limit, function, reason, *_ = record.args
    now.reached(limit, str(function), str(reason))
    return False


logging.getLogger(RECOMPILE_LOGGER).addFilter(_speaks)


def _fp8(model: nn.Module) -> list[str]:
    return [name for name, tensor in chain(model.named_parameters(), model.named_buffers()) if tensor.dtype == FP8]


def weights_of(model: nn.Module | None) -> str:
    """`35 FP8 weights in 5 layers for cpu`."""
    names = [] if model is None else _fp8(model)
    if model is None or not names:
        return "a model"
    layers = {found[0] for name in names if (found := re.match(r".*?\.\d+\.", name))}
    where = f" in {len(layers)} layers" if len(layers) > 1 else ""
    device = next(chain(model.parameters(), model.buffers())).device.type
    return f"{counted(len(names), 'FP8 weight')}{where} for {device}"


def _for_torch(arguments: dict[str, Any]) -> dict[str, Any]:
    """With the mode bound to the backend where options are given, too: `torch.compile` takes only one of them, Inductor both."""
    if arguments["backend"] != "ctfp8" or None in (arguments.get("mode"), arguments.get("options")):
        return arguments
    return {**arguments, "mode": None, "backend": functools.partial(backend, mode=arguments["mode"])}


def _named(code: Any) -> str:
    """A function as torch's warning names it."""
    return f"'{code.co_name}' ({code.co_filename}:{code.co_firstlineno})"
