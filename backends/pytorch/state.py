"""The state of a Mamba layer, as tensors."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch


def index(rows, device):
    """Return row numbers (a list, an array, a tensor) as a tensor."""
    return torch.as_tensor(rows, dtype=torch.long, device=device)


def with_rows(a, rows, values):
    """Return a copy of `a` in which these rows have these values."""
    return a.index_copy(0, index(rows, a.device), values.to(a))


@dataclass(frozen=True)
class Recurrent:
    """The state of a Mamba layer: tail b t c in the dtype of the activations, S b h p n in float32.

    `forked` is shared with every fork: once it holds anything, a write in place copies first.
    """

    tail: torch.Tensor
    S: torch.Tensor
    forked: list = field(default_factory=list)

    @classmethod
    def empty(cls, cfg, batch: int, dtype, device) -> Recurrent:
        """Return the state of a layer that has read nothing."""
        tail = torch.zeros(batch, cfg.conv_kernel - 1, cfg.conv_dim, dtype=dtype, device=device)
        S = torch.zeros(batch, cfg.mamba_num_heads, cfg.mamba_head_dim, cfg.ssm_state_size, device=device)
        return cls(tail, S)

    def take(self, rows) -> Recurrent:
        """Return the states of these rows."""
        rows = index(rows, self.S.device)
        return Recurrent(self.tail[rows], self.S[rows])

    def put(self, rows, other) -> Recurrent:
        """Return a state in which these rows are those of `other`."""
        return Recurrent(with_rows(self.tail, rows, other.tail), with_rows(self.S, rows, other.S))

    def fork(self) -> Recurrent:
        """Return a second state of this point, in the same arrays."""
        self.forked.append(True)
        return replace(self)

    def tentative(self) -> Recurrent:
        """Return this state: the verbs do not write in place."""
        return self

    def own(self) -> Recurrent:
        """Return the same state in arrays that may be written."""
        return Recurrent(self.tail.clone(), self.S.clone()) if self.forked else self
