"""refengine: the executable specification of Nemotron 3, and an engine that runs it.

Example:

    import refengine
    engine = refengine.load("tiny")
    for event in engine.generate("Once upon a time", max_tokens=100, seed=1):
        print(event.text, end="")
"""

from typing import TYPE_CHECKING

from refengine.spec.keys import InputError

if TYPE_CHECKING:
    from refengine.engine import Engine, Scores, load
    from refengine.generation import End, Options, Token

__version__ = "0.1.0"
__all__ = ["End", "Engine", "InputError", "Options", "Scores", "Token", "__version__", "load"]
InputError.__module__ = __name__  # the name that users import it by, and that tracebacks show


def __getattr__(name: str):
    """Import the engine when it is first asked for: `refengine --version` needs none of it."""
    if name in __all__:
        from refengine import engine, generation

        return getattr(engine, name) if hasattr(engine, name) else getattr(generation, name)
    raise AttributeError(f"module 'refengine' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
