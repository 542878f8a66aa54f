"""A progress bar for long work, on a terminal only."""

from __future__ import annotations

import sys
import time
from typing import Any

DELAY = 1  # seconds of work before a bar is drawn


class Bar:
    """Counts work, and draws a bar on stderr for work that takes longer than DELAY, if that is a terminal.

    tqdm, which draws it, is imported only then.
    """

    def __init__(self, what: str, total: int, unit: str, silent: bool):
        self.n, self.total = 0, total
        self.how = {"desc": what, "unit": unit, "leave": False}
        self.silent = silent or sys.stderr is None or sys.stderr.closed or not sys.stderr.isatty()
        self.drawn_from = time.monotonic() + DELAY
        self.drawn: Any = None

    def update(self, count: int = 1) -> None:
        """Add `count` to the work that is done."""
        self.n += count
        if self.silent or time.monotonic() < self.drawn_from:
            return
        if self.drawn is None:
            from tqdm import tqdm

            self.drawn = tqdm(total=self.total, initial=self.n - count, **self.how)
        self.drawn.total = self.total
        self.drawn.update(self.n - self.drawn.n)

    def clear(self) -> None:
        """Take the bar off the screen until the next update."""
        if self.drawn is not None:
            self.drawn.clear()

    def close(self) -> None:
        """Take the bar off the screen."""
        self.silent = True
        if self.drawn is not None:
            self.drawn.close()

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def progress(what: str, total: int, unit: str, silent: bool = False) -> Bar:
    """Return a bar on stderr for work that takes more than a second; it is silent without a terminal."""
    return Bar(what, total, unit, silent)
