"""ctfp8: a torch.compile backend that runs compressed-tensors FP8 checkpoints in FP8.

import ctfp8_compile as ctfp8

model = ctfp8.from_pretrained("a-checkpoint-FP8-dynamic")
ctfp8.compile(model)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import ops  # defines the ctfp8:: operators
from .errors import (
    ArtifactError,
    CheckpointError,
    Ctfp8Error,
    InputError,
    RankError,
    SchemeError,
    TargetError,
    UsageError,
)
from .paused_gc import paused_gc

if TYPE_CHECKING:
    from .aot.load import load
    from .aot.lower import explain, lower
    from .aot.module import Artifact
    from .hf.fp8_cache import dynamic_cache
    from .hf.hub import from_pretrained, prepare, save_pretrained
    from .hf.paged_cache import paged_cache
    from .hf.static_cache import StaticCacheDecoder, static_cache
    from .inductor.backend import backend, compiled_reports
    from .inductor.recipe import compile
    from .interchange.export import Exported, export
    from .model.state_dict import load_state_dict
    from .model.stored import save_state_dict, state_dict
    from .report import Entry, Report
    from .target import Target

__version__ = "0.1.0"

__all__ = [
    "Artifact",
    "ArtifactError",
    "CheckpointError",
    "Ctfp8Error",
    "Entry",
    "Exported",
    "InputError",
    "RankError",
    "Report",
    "SchemeError",
    "StaticCacheDecoder",
    "Target",
    "TargetError",
    "UsageError",
    "backend",
    "compile",
    "compiled_reports",
    "dynamic_cache",
    "explain",
    "export",
    "from_pretrained",
    "load",
    "load_state_dict",
    "lower",
    "ops",
    "paged_cache",
    "prepare",
    "save_pretrained",
    "save_state_dict",
    "state_dict",
    "static_cache",
]

#: Where each name lives. They are imported on first use, so that loading an artifact needs no transformers.
_HOMES = {
    ".aot.lower": ("explain", "lower"),
    ".aot.load": ("load",),
    ".aot.module": ("Artifact",),
    ".hf.hub": ("from_pretrained", "prepare", "save_pretrained"),
    ".hf.fp8_cache": ("dynamic_cache",),
    ".hf.paged_cache": ("paged_cache",),
    ".hf.static_cache": ("StaticCacheDecoder", "static_cache"),
    ".inductor.backend": ("backend", "compiled_reports"),
    ".inductor.recipe": ("compile",),
    ".interchange.export": ("Exported", "export"),
    ".model.state_dict": ("load_state_dict",),
    ".model.stored": ("save_state_dict", "state_dict"),
    ".report": ("Entry", "Report"),
    ".target": ("Target",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with paused_gc():
        value = globals()[name] = getattr(importlib.import_module(_HOME_OF[name], __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
