"""Stop words in text that comes in parts."""

from __future__ import annotations


class Stops:
    """Passes text on up to the first stop word; holds back what may become one.

    Attributes:
        words: the stop words.
        found: whether one has come.
    """

    def __init__(self, words: str | list[str] | None):
        self.words = [words] if isinstance(words, str) else list(words or ())
        self.found = False
        self._held = ""

    def feed(self, text: str) -> str:
        """What is certain to come before a stop word, of the text held back and this."""
        if self.found:
            return ""
        self._held += text
        before = self.cut(self._held)
        if self.found:
            self._held = ""
            return before
        most = max((len(word) for word in self.words), default=1) - 1
        kept = next(
            (
                n
                for n in range(min(most, len(self._held)), 0, -1)
                if any(w.startswith(self._held[-n:]) for w in self.words)
            ),
            0,
        )
        sure, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        return sure

    def rest(self) -> str:
        """What was held back, when no more comes."""
        held, self._held = self._held, ""
        return held

    def cut(self, text: str) -> str:
        """The text before the first stop word; all of it where none is."""
        places = [place for word in self.words if (place := text.find(word)) >= 0]
        self.found = self.found or bool(places)
        return text[: min(places)] if places else text
