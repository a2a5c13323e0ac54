"""ctfp8: a torch.compile backend that runs compressed-tensors FP8 checkpoints in FP8.

import ctfp8_compile as ctfp8

model = ctfp8.from_pretrained("a-checkpoint-FP8-dynamic")
model.forward = torch.compile(model.forward, backend="ctfp8")
"""

from . import ops  # defines the ctfp8:: operators  # isort: skip
from .backend import backend, compiled_reports
from .errors import CheckpointError, Ctfp8Error, SchemeError, TargetError, UsageError
from .export import explain, lower
from .hub import from_pretrained, prepare, save_pretrained
from .quantized import load_state_dict
from .report import Entry, Report
from .target import Target

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "Ctfp8Error",
    "Entry",
    "Report",
    "SchemeError",
    "Target",
    "TargetError",
    "UsageError",
    "backend",
    "compiled_reports",
    "explain",
    "from_pretrained",
    "load_state_dict",
    "lower",
    "ops",
    "prepare",
    "save_pretrained",
]
