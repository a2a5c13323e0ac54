"""What a file and its config differ in, collected while a checkpoint is read and said in one warning."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from ..errors import SchemeError


class Notes:
    """By sentence, the tensors that it is true of."""

    def __init__(self) -> None:
        self._names: dict[str, dict[str, None]] = {}

    def add(self, sentence: str, *names: str) -> None:
        """Notes something of tensors; `sentence` follows "N tensors, such as NAME: "."""
        self._names.setdefault(sentence, {}).update(dict.fromkeys(names))

    def __bool__(self) -> bool:
        return bool(self._names)

    def __str__(self) -> str:
        return "; ".join(f"{_some(names)}: {sentence}" for sentence, names in self._names.items())

    def say(self, strict: bool = False, stacklevel: int = 2) -> None:
        """Warns of all that was noted, once.

        Raises:
            SchemeError: `strict`, and something was.
        """
        if not self:
            return
        if strict:
            raise SchemeError(
                f"the checkpoint's files and its quantization_config do not fit each other: {self}. Leave out strict=True to "
                "load it as the files say."
            )
        warnings.warn(f"the checkpoint is read as its files say: {self}.", stacklevel=stacklevel + 1)
        self._names = {}


def _some(names: Iterable[str]) -> str:
    first, *more = names
    return f"{1 + len(more)} tensors, such as {first}" if more else first
