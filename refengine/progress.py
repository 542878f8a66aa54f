"""A progress bar for long work, on a terminal only."""

from __future__ import annotations

from tqdm import tqdm


def progress(what: str, total: int, unit: str, silent: bool = False) -> tqdm:
    """Return a bar on stderr for work that takes more than a second; it is silent without a terminal."""
    return tqdm(total=total, desc=what, unit=unit, disable=silent or None, delay=1, leave=False)
