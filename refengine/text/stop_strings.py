"""Find stop strings in text that arrives in pieces, at any cuts."""

from __future__ import annotations

from collections.abc import Iterable

from refengine.spec.config import InputError


class StopStrings:
    """Passes text on up to the first stop string; holds back only the text that may begin one.

    The first is the one that is complete first, so it does not matter how the text is cut.
    """

    def __init__(self, stops: Iterable[str] = ()):
        self.stops, self.held = tuple(stops), ""
        if not all(self.stops):
            raise InputError("a stop string is empty")

    def push(self, text: str) -> tuple[str, str | None]:
        """Return (text that is certain, the stop string that ended it or None)."""
        if not self.stops:
            return text, None
        text = self.held + text
        found = [(at + len(stop), at, stop) for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:
            _, at, stop = min(found)  # of those that end together, the longest
            self.held = ""
            return text[:at], stop
        begun = (n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
        certain = len(text) - max(begun, default=0)
        self.held = text[certain:]
        return text[:certain], None

    def flush(self) -> str:
        """Return the text held back; call it when no more text follows."""
        text, self.held = self.held, ""
        return text
