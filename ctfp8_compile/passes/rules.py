"""The rules, in the order in which they are asked, and how one of yours is added."""

from __future__ import annotations

import inspect
from typing import Any

from ..errors import UsageError
from .embedding import EmbeddingRule
from .experts import GatheredExpertsRule, GroupedExpertsRule
from .linear import BatchedMatmulRule, LinearRule, MatmulRule
from .rule import Rule

#: Linears come before experts: both may start at `bmm`, and the linear's test (a broadcast weight) is the cheaper one.
RULES: list[Rule] = [
    LinearRule(),
    MatmulRule(),
    BatchedMatmulRule(),
    GroupedExpertsRule(),
    GatheredExpertsRule(),
    EmbeddingRule(),
]


def register(rule: Rule) -> Rule:
    """Adds a rule of yours behind the built-in ones, for every graph compiled or lowered in this process from now on.

    A rule of the same class that was registered before gives way to it.

    Raises:
        UsageError: it lacks a name or roots, or overrides what rules of earlier versions could, and would be lost in an
            artifact.
    """
    if not getattr(rule, "name", "") or not getattr(rule, "roots", ()):
        raise UsageError(f"{type(rule).__name__} needs a name and roots: the operators at which its pattern starts.")
    for method in ("check", "rewrite"):
        if hasattr(rule, method):
            raise UsageError(
                f"{type(rule).__name__}.{method}: a rule only finds; what it finds is rewritten here and by whoever loads an "
                "artifact. Say it in the match: passes.Match.of(..., x_views=…, out_views=…); see docs/writing-a-rule.md."
            )
    RULES[:] = [known for known in RULES if _class_of(known) != _class_of(rule)]
    RULES.append(rule)
    return rule


def _class_of(rule: Rule) -> tuple[str, str]:
    return type(rule).__module__, type(rule).__qualname__


def is_ours(thing: Any) -> bool:
    """Whether a class or function is of this package, whose sources are all in the key of Inductor's cache."""
    return str(thing.__module__).startswith(__name__.partition(".")[0] + ".")


def source_of(thing: Any) -> str:
    """The source of a class or function; where there is none, what it does."""
    try:
        return inspect.getsource(thing)
    except (OSError, TypeError):  # made without a file
        parts = vars(thing) if isinstance(thing, type) else {"call": thing}
        return repr(sorted((k, getattr(v, "__code__", v)) for k, v in parts.items() if not k.startswith("__")))
