"""The state of a Mamba layer, on the device. The verbs change it in place, so a fork is a copy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from refengine.backends.cuda.array import DeviceArray
from refengine.backends.cuda.attention import Cache
from refengine.backends.cuda.scan import Half
from refengine.spec.numerics import rounding_key


@dataclass(frozen=True)
class Recurrent:
    """The state of a Mamba layer: tail b k-1 c in the activations' dtype; S b h p n, float32 or float16."""

    tail: DeviceArray
    S: DeviceArray
    key: DeviceArray | None = None  # b int32, of the random rounding of float16
    position: DeviceArray | None = None  # b int32, positions read; the scan moves it

    @classmethod
    def empty(cls, cfg, batch: int, dtype: str, wide: str, device) -> Recurrent:
        """Return the state of a layer that has read nothing."""
        tail = device.zeros((batch, cfg.conv_kernel - 1, cfg.conv_dim), dtype)
        S = device.zeros((batch, cfg.mamba_num_heads, cfg.mamba_head_dim, cfg.ssm_state_size), wide)
        if wide == "float32":
            return cls(tail, S)
        none = device.zeros((batch,), "int32")
        return cls(tail, S, none, none).keyed([0] * batch, 0)

    def keyed(self, seeds, layer: int) -> Recurrent:
        """Return this state with the keys of sequences with these seeds, in this layer."""
        if self.key is None:
            return self
        return replace(self, key=self.S.device.from_host(rounding_key(seeds, layer).view(np.int32)))

    def each(self, make: Callable) -> Recurrent:
        """Return a state of make(array) for each of its arrays."""
        return replace(self, **{name: make(a) for name, a in vars(self).items() if a is not None})

    def take(self, rows) -> Recurrent:
        """Return the states of these rows."""
        rows = np.arange(len(self.S))[rows]
        return self.each(lambda a: a[rows])

    def put(self, rows, other) -> Recurrent:
        """Return a state in which these rows are those of `other`."""
        put, mine = self.S.device.with_rows, {name: a for name, a in vars(self).items() if a is not None}
        return replace(self, **{name: put(a, rows, getattr(other, name)) for name, a in mine.items()})

    def read(self) -> DeviceArray | Half:
        """Return S as the scan reads it."""
        return self.S if self.key is None or self.position is None else Half(self.S, self.key, self.position)

    def after(self, tail: DeviceArray, S: DeviceArray, count) -> Recurrent:
        """Return the state after `count` more positions, whose end the scan left in S and in `position`."""
        return replace(self, tail=tail, S=S)

    def fork(self) -> Recurrent:
        """Return a copy, since the verbs write in place."""
        return self.each(lambda a: a.copy())

    def tentative(self) -> Recurrent:
        """Return this state in arrays that the verbs do not change."""
        return self.each(lambda a: replace(a, readonly=True))


def new_state(
    kind: str, cfg, batch: int, *, dtype: str, wide: str, device, kv: str | None = None
) -> Recurrent | Cache | None:
    """Return the state of a layer that has read nothing; None for a layer without one."""
    if kind == "M":
        return Recurrent.empty(cfg, batch, dtype, wide, device)
    if kind == "*":
        return Cache.empty(cfg, batch, dtype, device, kv)
    return None
