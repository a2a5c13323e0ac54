"""A compiled function finds what an earlier process compiled of it: `Keeper`, which `Compiled` asks before it compiles.

A model's key is the folder of its graphs: names, shapes and schemes of its tensors, options, versions, the processor. It narrows
down where to look, no more: whether a graph is right for a call, its guards say (`kept.guards`).
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import logging
import os
import pickle
import platform
import secrets
import sys
import time
import types
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from inspect import Signature
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import lowering
from ..compat import dynamo_config, functorch_config, inductor_config
from ..kept import folder
from ..kept.guards import Unfit, build
from ..kept.portable import Describer, NotPortable
from ..model.parametrization import quantized_parameters
from ..ops import cpu as cpu_kernels
from ..paused_gc import paused_gc
from ..target import Target
from .record import KeptGraph, Record, recording
from .sources import source_hash

log = logging.getLogger("ctfp8_compile")


class Keeper:
    """The kept graphs of one function, a model's `forward`."""

    def __init__(self, function: Callable[..., Any], arguments: dict[str, Any], what: str = ""):
        self.arguments, self.what = arguments, what
        self.owner = getattr(function, "__self__", None)
        self.function: Any = getattr(function, "__func__", function)
        self.signature = Signature.from_callable(self.function, follow_wrapped=False)
        self._graphs: list[tuple[Any, Callable[..., Any]]] = []  # guards, the function compiled
        self._waiting: list[tuple[str, KeptGraph]] | None = None  # read, and not right for any call so far
        self._tried: Counter[str] = Counter()
        self._records: list[Record] = []

    def fitting(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any] | None:
        """What was compiled for such a call; it takes what the function takes."""
        if self._waiting == [] and not self._graphs:
            return None
        try:
            local = self._local(self.given(args), kwargs)
        except TypeError:  # wrong arguments: the function itself says so
            return None
        for guards, compiled in self._graphs:
            if guards.check(local):
                return compiled
        return self._found(local)

    def given(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Arguments as the function takes them that is compiled: a method's owner is one."""
        return args if self.owner is None else (self.owner, *args)

    def _found(self, local: dict[str, Any]) -> Callable[..., Any] | None:
        """From the folder."""
        if self._waiting is None:
            self._waiting = list(self._read())
        for graph, kept in list(self._waiting):
            begin = time.monotonic()
            self._tried[graph] += 1
            if self._tried[graph] == _TRIES:
                self._waiting.remove((graph, kept))
                continue
            try:
                with paused_gc():
                    guards = build(kept.guards, self.function.__code__, local, self.function.__globals__)
                    compiled = kept.revived(self.function)
            except Unfit as why:
                log.debug("kept graph %s: %s", graph, why)
                continue
            except Exception as why:
                log.info("kept graph %s cannot be used: %s %s", graph, type(why).__name__, why)
                continue
            self._waiting.remove((graph, kept))
            self._graphs.append((guards, compiled))
            took = time.monotonic() - begin
            log.info("%s, compiled before, starts in %.1f s: kept graph %s", self.what or self._name(), took, graph)
            return compiled
        return None

    def _read(self) -> Iterator[tuple[str, KeptGraph]]:
        try:
            model = self._key()
        except Exception as why:
            log.info("compiled graphs are not kept: %s", why)
            return
        for graph in folder.names(model):
            if (data := folder.read(model, graph)) is not None:
                try:
                    yield graph, pickle.loads(gzip.GzipFile(fileobj=io.BytesIO(data)).read())
                except Exception as why:  # of a class that is no more, though the key should say so
                    log.info("kept graph %s cannot be read: %s", graph, why)

    def _local(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """What dynamo calls a frame's locals."""
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        names = self.function.__code__.co_freevars
        closed = {name: cell.cell_contents for name, cell in zip(names, self.function.__closure__ or (), strict=True)}
        return {**closed, **bound.arguments}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """While dynamo compiles."""
        record = Record(self.function)
        with recording(record):
            yield
        self._records.append(record)

    def save(self) -> None:
        """Keeps what was compiled during the last call."""
        records, self._records = self._records, []
        for record in records:
            try:
                kept = record.kept()
                model = self._key()
            except Exception as why:  # whatever cannot be kept runs as it was compiled
                log.info("this graph is not kept: %s", why)
                continue
            data = gzip.compress(pickle.dumps(kept), 3)
            facts = {"model": self._name(), "of": self.what, "torch": str(torch.__version__), "made": time.time()}
            graph = f"{int(time.time() * 1e3):x}{secrets.token_hex(4)}"
            if folder.write(model, graph, facts, data):
                log.info("kept for the next process: %s, %.1f MB", graph, len(data) / 1e6)

    def _name(self) -> str:
        return self.function.__qualname__ if self.owner is None else type(self.owner).__name__

    def _key(self) -> str:
        describer = Describer()
        if any(getattr(nn.modules.module, name) for name in _HOOKS_OF_ALL):
            raise NotPortable("hooks of all modules are registered, which dynamo does not guard")
        about = {
            "versions": (_PYTHON, torch.__version__, torch.version.git_version, _installed(), source_hash()),
            "machine": (_processor(), torch.get_num_threads(), cpu_kernels.loaded() and cpu_kernels.isa()),
            "kernels": lowering.fingerprint(Target.detect(torch.device("cpu"))),
            "function": describer.function(self.function, strict=False),
            "arguments": describer.value(self.arguments),
            "settings": tuple(
                _settings(config, describer) for config in (inductor_config, dynamo_config, functorch_config)
            ),
            "tensors": _tensors(self.owner) if isinstance(self.owner, nn.Module) else "",
        }
        return hashlib.sha256(repr(about).encode()).hexdigest()[:32]


def keeper(function: Callable[..., Any], arguments: dict[str, Any], what: str) -> Keeper | None:
    """Who keeps what is compiled of a function; None if nobody: it is no plain function, or of one of several ranks."""
    plain = getattr(function, "__func__", function)
    if not isinstance(plain, types.FunctionType):
        return None
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return None
    return Keeper(function, arguments, what)


#: A kept graph that so many calls did not fit is looked at no more: each look takes as long as a step of a small model.
_TRIES = 16
_HOOKS_OF_ALL = [
    name for name, value in vars(nn.modules.module).items() if name.startswith("_global") and isinstance(value, dict)
]
_PYTHON = f"{sys.version} {sys.implementation.cache_tag}"


@cache
def _installed() -> list[str]:
    """Names and versions of installed packages: whether one is there, code asks while it is traced, and no guard remembers."""
    found = set()
    for folder_of_packages in sys.path:
        with contextlib.suppress(OSError):
            found |= {
                name for name in os.listdir(folder_of_packages or ".") if name.endswith((".dist-info", ".egg-info"))
            }
    return sorted(found)


@cache
def _processor() -> str:
    """Whatever code made for this processor may depend on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        found = sorted({line for line in lines if line.startswith(("flags", "Features", "model name", "CPU part"))})
    except OSError:
        found = [platform.processor()]
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {found}"


def _settings(config: Any, describer: Describer) -> list[str]:
    """Of one of torch's modules of settings."""
    return [f"{name}={describer.value(value)}" for name, value in sorted(config.save_config_portable().items())]


def _tensors(model: nn.Module) -> str:
    plain = [
        (name, tuple(tensor.shape), str(tensor.dtype), str(tensor.device))
        for name, tensor in chain(model.named_parameters(), model.named_buffers())
    ]
    fp8 = [(name, repr(how.info.scheme), repr(how.constants)) for name, _, how in quantized_parameters(model)]
    variables = sorted(
        (k, v) for k, v in os.environ.items() if k.startswith("CTFP8_") and not k.startswith("CTFP8_CACHE")
    )
    return repr((plain, fp8, variables))
