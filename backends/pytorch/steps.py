"""Run a whole decoding step on a CPU in the compiled loops of the CPU backend, on states of tensors."""

from __future__ import annotations

from dataclasses import replace

import torch

from refengine.backends.cpu.steps import FEW, Steps
from refengine.backends.cpu.verbs import Verbs

FEW_BESIDE_UNITS = 8  # most rows of a step if PyTorch has matrix units for bfloat16 (not measured)


def steps(verbs: Verbs, active: torch.dtype, alone: bool = True) -> Steps:
    """Return the step for activations of this dtype; alone: no other rank has a part of the model."""
    few = FEW if active == torch.float32 else FEW_BESIDE_UNITS
    return Steps(verbs.built, verbs.run, few, alone, host, torch.from_numpy, writable, written)


def host(x: torch.Tensor):
    """Return a tensor as a float32 array."""
    return x.float().numpy()


def writable(kind: str, state):
    """Return a state in writable tensors, with room for one position."""
    if kind == "M":
        state = state.own()
        return replace(state, tail=state.tail.float(), S=state.S.float(), key=None)
    return state.reserve(1) if kind == "*" else state


def written(kind: str, before, state):
    """Return the state after the step, in its former dtype."""
    if kind == "M":
        return before.after(state.tail.to(before.tail.dtype), state.S, 1)
    return state.advanced() if kind == "*" else state
