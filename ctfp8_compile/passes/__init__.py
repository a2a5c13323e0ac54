"""The graph passes: rules that find matmuls with an FP8 weight, and the pipeline that rewrites them."""

from .annotate import Note, notes, read
from .attention import attention
from .decision import Decision, match, select
from .decompose import decompose
from .graph_pass import Context, Pass
from .pipeline import PASSES, apply, decide, fingerprint, parse, register_pass, report, report_of, run, standard
from .rewrite import preview, rewrite
from .rule import Match, Rule, View
from .rules import RULES, register
from .runner import Pipeline
from .transforms import share_rotations, transforms
from .verify import verifying

__all__ = [
    "PASSES",
    "RULES",
    "Context",
    "Decision",
    "Match",
    "Note",
    "Pass",
    "Pipeline",
    "Rule",
    "View",
    "apply",
    "attention",
    "decide",
    "decompose",
    "fingerprint",
    "match",
    "notes",
    "parse",
    "preview",
    "read",
    "register",
    "register_pass",
    "report",
    "report_of",
    "rewrite",
    "run",
    "select",
    "share_rotations",
    "standard",
    "transforms",
    "verifying",
]
