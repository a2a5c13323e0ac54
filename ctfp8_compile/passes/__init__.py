"""The graph passes: rules that find matmuls with an FP8 weight and rewrite them, and the pipeline that runs them."""

from .pipeline import RULES, fingerprint, register, run
from .rule import Match, Plan, Rule

__all__ = ["RULES", "Match", "Plan", "Rule", "fingerprint", "register", "run"]
