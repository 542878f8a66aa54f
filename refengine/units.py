"""Numbers for people: bytes and counts as short texts."""

from __future__ import annotations


def bytes_text(count: float) -> str:
    """Return a number of bytes as a text, in powers of 1000 as disks are sold: 1536 -> '1.54 KB'."""
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if abs(count) < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError


def count_text(count: float) -> str:
    """Return a number as a text in thousands, millions, ...: 31577940288 -> '31.6 B'."""
    for unit in ("", "K", "M", "B", "T"):
        if abs(count) < 1000 or unit == "T":
            return f"{count:.3g} {unit}".strip() if unit else f"{count:.0f}"
        count /= 1000
    raise AssertionError
