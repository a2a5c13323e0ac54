"""The graph passes: rules that find matmuls with an FP8 weight, and the pipeline that rewrites them."""

from .attention import attention
from .annotate import Note, notes, read
from .decision import Decision, match, select
from .decompose import decompose
from .pipeline import PASSES, RULES, apply, decide, fingerprint, register, report, run
from .rewrite import preview, rewrite
from .rule import Match, Rule, View
from .transforms import share_rotations, transforms

__all__ = [
    "PASSES",
    "RULES",
    "Decision",
    "Match",
    "Note",
    "Rule",
    "View",
    "apply",
    "attention",
    "decide",
    "decompose",
    "fingerprint",
    "match",
    "notes",
    "preview",
    "read",
    "register",
    "report",
    "rewrite",
    "run",
    "select",
    "share_rotations",
    "transforms",
]
