"""ctfp8: a torch.compile backend that runs compressed-tensors FP8 checkpoints in FP8.

import ctfp8_compile as ctfp8

model = ctfp8.from_pretrained("a-checkpoint-FP8-dynamic")
model.forward = torch.compile(model.forward, backend="ctfp8")
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from . import ops  # defines the ctfp8:: operators
from .errors import ArtifactError, CheckpointError, Ctfp8Error, InputError, SchemeError, TargetError, UsageError

if TYPE_CHECKING:
    from .artifact import Artifact, load
    from .backend import backend, compiled_reports
    from .export import explain, export, lower
    from .hub import from_pretrained, prepare, save_pretrained
    from .quantized import load_state_dict
    from .report import Entry, Report
    from .static_cache import StaticCacheDecoder, static_cache
    from .target import Target

__version__ = "0.1.0"

__all__ = [
    "Artifact",
    "ArtifactError",
    "CheckpointError",
    "Ctfp8Error",
    "Entry",
    "InputError",
    "Report",
    "SchemeError",
    "StaticCacheDecoder",
    "Target",
    "TargetError",
    "UsageError",
    "backend",
    "compiled_reports",
    "explain",
    "export",
    "from_pretrained",
    "load",
    "load_state_dict",
    "lower",
    "ops",
    "prepare",
    "save_pretrained",
    "static_cache",
]

#: Where each name lives. They are imported on first use, so that loading an artifact needs no transformers.
_HOMES = {
    "artifact": ("Artifact", "load"),
    "backend": ("backend", "compiled_reports"),
    "export": ("explain", "export", "lower"),
    "hub": ("from_pretrained", "prepare", "save_pretrained"),
    "quantized": ("load_state_dict",),
    "report": ("Entry", "Report"),
    "static_cache": ("StaticCacheDecoder", "static_cache"),
    "target": ("Target",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


class _Package(ModuleType):
    """Importing a submodule binds its name here; `backend` and `export` are to stay the functions of that name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and _HOME_OF.get(name) == name:
            value = getattr(value, name)
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name not in _HOME_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
        setattr(self, name, value)
        return value

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
