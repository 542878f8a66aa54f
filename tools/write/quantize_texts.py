"""Write the stories on which `refengine quantize` evaluates a copy: refengine/quantize/texts.py.

    python -m tools.write.quantize_texts

The generator tells them with a seed that training does not use.
"""

from __future__ import annotations

import random
import textwrap
from pathlib import Path

from tools.tiny.stories import tell

SEED, COUNT = 20_261_129, 20
TARGET = Path(__file__).resolve().parents[2] / "refengine" / "quantize" / "texts.py"
MODULE = '''\
"""Stories on which a quantized copy is evaluated, made by tools/write/quantize_texts.py: do not edit."""

from __future__ import annotations

BETWEEN = "\\n\\n----\\n\\n"  # two stories


def unwrapped(story: str) -> str:
    """Return a story with each of its paragraphs on one line."""
    return "\\n\\n".join(" ".join(part.splitlines()) for part in story.split("\\n\\n"))


STORIES = """
{stories}
"""
TEXTS = tuple(unwrapped(story) for story in STORIES.strip().split(BETWEEN))
'''


def stories() -> list[str]:
    """Return the stories."""
    rng = random.Random(SEED)
    return [tell(rng).text for _ in range(COUNT)]


def wrapped(story: str) -> str:
    """Return a story in short lines, paragraphs apart."""
    parts = [textwrap.fill(part, 100, break_on_hyphens=False) for part in story.strip().split("\n\n")]
    return "\n\n".join(parts)


def main() -> None:
    """Write the module."""
    text = "\n\n----\n\n".join(map(wrapped, stories()))
    assert '"""' not in text and "\\" not in text
    TARGET.write_text(MODULE.format(stories=text), encoding="utf-8")


if __name__ == "__main__":
    main()
