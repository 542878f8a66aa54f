"""The fingerprint of a model, by which a trace names the weights that it was recorded from."""

from refengine.checkpoint.fingerprint import fingerprint

__all__ = ["fingerprint"]
