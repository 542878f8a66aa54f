"""refengine: the executable specification of Nemotron 3, and an engine that runs it.

import refengine
engine = refengine.load("tiny")
for event in engine.generate("Once upon a time", max_tokens=100, seed=1):
    print(event.text, end="")
"""

from typing import TYPE_CHECKING

from refengine.spec.keys import InputError

if TYPE_CHECKING:
    from refengine.engine import End, Engine, Token, load

__version__ = "0.1.0"
__all__ = ["End", "Engine", "InputError", "Token", "__version__", "load"]


def __getattr__(name: str):
    """The engine is imported when it is first asked for: `refengine --version` needs none of it."""
    if name in __all__:
        from refengine import engine

        return getattr(engine, name)
    raise AttributeError(f"module 'refengine' has no attribute {name!r}")
