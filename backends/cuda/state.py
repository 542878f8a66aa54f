"""The state of a Mamba layer, on the device. The verbs change it in place, so a fork is a copy."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from refengine.backends.cuda.array import DeviceArray
from refengine.backends.cuda.attention import Cache


@dataclass(frozen=True)
class Recurrent:
    """The state of a Mamba layer: tail b k-1 c in the activations' dtype; S b h p n, float32 or float16."""

    tail: DeviceArray
    S: DeviceArray

    @classmethod
    def empty(cls, cfg, batch: int, dtype: str, wide: str, device) -> Recurrent:
        """Return the state of a layer that has read nothing."""
        tail = device.zeros((batch, cfg.conv_kernel - 1, cfg.conv_dim), dtype)
        S = device.zeros((batch, cfg.mamba_num_heads, cfg.mamba_head_dim, cfg.ssm_state_size), wide)
        return cls(tail, S)

    def take(self, rows) -> Recurrent:
        """Return the states of these rows."""
        rows = np.arange(len(self.S))[rows]
        return Recurrent(self.tail[rows], self.S[rows])

    def put(self, rows, other) -> Recurrent:
        """Return a state in which these rows are those of `other`."""
        put = self.S.device.with_rows
        return Recurrent(put(self.tail, rows, other.tail), put(self.S, rows, other.S))

    def fork(self) -> Recurrent:
        """Return a copy, since the verbs write in place."""
        return Recurrent(self.tail.copy(), self.S.copy())

    def tentative(self) -> Recurrent:
        """Return this state in arrays that the verbs do not change."""
        return Recurrent(replace(self.tail, readonly=True), replace(self.S, readonly=True))


def new_state(kind: str, cfg, batch: int, *, dtype: str, wide: str, device) -> Recurrent | Cache | None:
    """Return the state of a layer that has read nothing; None for a layer without one."""
    if kind == "M":
        return Recurrent.empty(cfg, batch, dtype, wide, device)
    if kind == "*":
        return Cache.empty(cfg, batch, dtype, device)
    return None
