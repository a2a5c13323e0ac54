"""Our name of each tensor of a file, whatever its format calls it."""

from __future__ import annotations

from collections.abc import Collection

from ...errors import CheckpointError
from .format import Format


def canonical_names(names: Collection[str], format: Format) -> dict[str, str]:
    """Our name of each tensor of a file → its name there. A scale is ours where the tensor it scales is in the file.

    Raises:
        CheckpointError: two names of a file mean the same.
    """
    there = set(names)
    weights = {name: _weight(name, format, there) for name in names}
    known = set(weights.values())
    out: dict[str, str] = {}
    for name, weight in weights.items():
        ours = _scale(weight, format, known)
        if ours in out:
            raise CheckpointError(
                f"{name} and {out[ours]} both give {ours}. The checkpoint was merged from two; save it again."
            )
        out[ours] = name
    return out


def _weight(name: str, format: Format, there: Collection[str]) -> str:
    if format.packed_by and name.endswith(".weight") and name.removesuffix(".weight") + format.packed_by in there:
        return name + "_packed"
    theirs = next((suffix for suffix in format.weights if name.endswith(suffix)), None)
    return name if theirs is None else name.removesuffix(theirs) + format.weights[theirs]


def _scale(name: str, format: Format, present: set[str]) -> str:
    for theirs, ours in format.suffixes.items():
        if name.endswith(theirs):
            stem = name.removesuffix(theirs)
            weight = stem if ours.startswith("_") else stem + ".weight"
            if weight in present or f"{weight}_packed" in present:
                return stem + ours
    return name
