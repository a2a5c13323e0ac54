"""Which transformers class loads a checkpoint, where the caller names none."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig

from ..errors import UsageError


def named_class(config: PretrainedConfig) -> Any:
    """The class that config.json names as the first of its `architectures`, if transformers has it for this config; else None."""
    name = (getattr(config, "architectures", None) or [""])[0]
    found = getattr(transformers, name, None) if name else None
    return found if getattr(found, "config_class", None) is type(config) else None


def class_of(path_or_id: object, config: PretrainedConfig, auto_class: Any) -> Any:
    """`auto_class`; where it is None, the class that config.json names, or `AutoModelForCausalLM`.

    A vision-language model that has a class for its text part is loaded as that one, as `AutoModelForCausalLM` does; every other
    model as what it was saved as.

    Args:
        path_or_id: of the checkpoint, for the error.
        config: as read from it.
        auto_class: what the caller gave.

    Raises:
        UsageError: `auto_class` is an `AutoModelFor…` that has no class for this config; or it is None, and no class is known.
    """
    chosen = auto_class or AutoModelForCausalLM
    classes = getattr(chosen, "_model_mapping", None)
    if classes is None or _is_remote(config, chosen):
        return chosen
    named = named_class(config)
    found = classes.get(type(config), None)
    part = found is not None and getattr(found, "config_class", type(config)) is not type(config)
    if auto_class is None and named is not None and not part:
        return named
    if found is None:
        cure = f"pass auto_class=transformers.{named.__name__}" if named is not None else "pass another auto_class"
        if auto_class is not None and named is not None:
            cure = f"leave auto_class out, or {cure}"
        raise UsageError(f"{path_or_id}: {chosen.__name__} has no class for {type(config).__name__}: {cure}.")
    return chosen


def _is_remote(config: PretrainedConfig, auto_class: Any) -> bool:
    """Whether the checkpoint brings a class of its own, which transformers asks about (`trust_remote_code`)."""
    return auto_class.__name__ in (getattr(config, "auto_map", None) or {})
