"""The state of a Mamba layer, as tensors."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from refengine.spec.numerics import rounding_key


def index(rows, device):
    """Return row numbers (a list, an array, a tensor) as a tensor."""
    return torch.as_tensor(rows, dtype=torch.long, device=device)


def with_rows(a, rows, values):
    """Return a copy of `a` in which these rows have these values."""
    return a.index_copy(0, index(rows, a.device), values.to(a))


@dataclass(frozen=True)
class Recurrent:
    """The state of a Mamba layer: tail b t c in the dtype of the activations, S b h p n in float32.

    S may be float16, with rounding keys and the positions read. `forked` is shared with every fork: once it
    is not empty, the arrays are copied before a write.
    """

    tail: torch.Tensor
    S: torch.Tensor
    key: torch.Tensor | None = None  # b int64, below 2^32
    position: torch.Tensor | None = None  # b
    forked: list = field(default_factory=list)

    @classmethod
    def empty(cls, cfg, batch: int, dtype, device, half: bool = False) -> Recurrent:
        """Return the state of a layer that has read nothing."""
        tail = torch.zeros(batch, cfg.conv_kernel - 1, cfg.conv_dim, dtype=dtype, device=device)
        S = torch.zeros(batch, cfg.mamba_num_heads, cfg.mamba_head_dim, cfg.ssm_state_size, device=device)
        if not half:
            return cls(tail, S)
        none = torch.zeros(batch, dtype=torch.long, device=device)
        return cls(tail, S.half(), none, none).keyed([0] * batch, 0)

    def keyed(self, seeds, layer: int) -> Recurrent:
        """Return this state with the rounding keys of sequences with these seeds, in this layer."""
        if self.key is None:
            return self
        key = torch.from_numpy(rounding_key(seeds, layer).astype(np.int64))
        return replace(self, key=key.to(self.S.device))

    @property
    def arrays(self) -> dict[str, Any]:
        """Return the tensors that it holds, by name."""
        return {name: a for name, a in vars(self).items() if a is not None and name != "forked"}

    def take(self, rows) -> Recurrent:
        """Return the states of these rows."""
        rows = index(rows, self.S.device)
        return Recurrent(**{name: a[rows] for name, a in self.arrays.items()})

    def put(self, rows, other) -> Recurrent:
        """Return a state in which these rows are those of `other`."""
        theirs = other.arrays
        return Recurrent(**{name: with_rows(a, rows, theirs[name]) for name, a in self.arrays.items()})

    def read(self) -> torch.Tensor:
        """Return S as the scan reads it."""
        return self.S.float()

    def after(self, tail: torch.Tensor, S: torch.Tensor, count) -> Recurrent:
        """Return the state after `count` more positions, an int or [b], at whose end the scan left S."""
        if self.key is None or self.position is None:
            return Recurrent(tail, S)
        position = self.position + count
        return Recurrent(tail, to_half(S, self.key, position), self.key, position)

    def fork(self) -> Recurrent:
        """Return another state with the same contents, in the same arrays."""
        self.forked.append(True)
        return replace(self)

    def tentative(self) -> Recurrent:
        """Return this state: the verbs do not write in place."""
        return self

    def own(self) -> Recurrent:
        """Return the same state in writable arrays."""
        return replace(self, tail=self.tail.clone(), S=self.S.clone(), forked=[]) if self.forked else self


WORD = 2**32 - 1


def mix(x):
    """Return integers below 2^32 mixed as in refengine.spec.numerics, in int64: uint32 has no sums."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & WORD
    x = (x ^ (x >> 15)) * 0x846CA68B & WORD
    return x ^ (x >> 16)


def to_half(S, key, position):
    """Return S b h p n in float16, rounded at random by key, position and element."""
    step = mix((position & WORD ^ key) + 0x9E3779B9 & WORD)[:, None]
    element = torch.arange(S[0].numel() if len(S) else 0, device=S.device)
    bits = (mix(mix(element ^ step) + step & WORD) >> 19).view(S.shape)
    size = S.abs()
    normal = (size.view(torch.int32) + bits.int() & ~0x1FFF).view(torch.float32)
    small = torch.floor(size * 2.0**24 + bits.float() / 2.0**13) / 2.0**24
    size = torch.where(size < 2.0**-14, small, torch.where(size.isnan(), size, normal))
    return torch.copysign(size.clamp(max=65504), S).half()
