"""refengine: the executable specification of Nemotron 3, and an engine that runs it.

    import refengine
    engine = refengine.load("tiny")
    for event in engine.generate("Once upon a time", max_tokens=100, seed=1):
        print(event.text, end="")
"""

from refengine.engine import End, Engine, Token, load
from spec.config import InputError

__version__ = "0.1.0"
__all__ = ["End", "Engine", "InputError", "Token", "__version__", "load"]
