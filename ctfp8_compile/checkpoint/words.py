"""A quantization config as its tools meant it: nulls left out, words in the usual case, whole numbers as integers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: Fields whose words have one meaning in any case.
_LOWER = frozenset(["quant_method", "fmt", "activation_scheme", "scale_fmt", "strategy", "type", "expert_dtype"])
_UPPER = frozenset(["quant_algo"])
_WHOLE = frozenset(["weight_block_size", "block_structure", "group_size", "num_bits"])


def tidy(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same config, in the words that readers of formats know. A field that is null counts as absent."""
    return {key: _value(key, value) for key, value in config.items() if value is not None}


def _value(key: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return tidy(value)
    if isinstance(value, (list, tuple)):
        return [_value(key, item) for item in value if item is not None]
    if isinstance(value, str):
        return value.lower() if key in _LOWER else value.upper() if key in _UPPER else value
    return int(value) if key in _WHOLE and isinstance(value, float) and value.is_integer() else value
