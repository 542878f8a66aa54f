"""Products of matrices, which the device's library computes, and what stands around them."""

from __future__ import annotations

from math import prod

import numpy as np

from refengine.backends.cuda.verbs import Verbs


class Products(Verbs):
    """The verbs linear, linear_pair, mlp and logits."""

    def linear(self, x, weight):
        """Return x [.. i] weight' -> [.. o]."""
        y = self.device.matmul(x.reshape(prod(x.shape[:-1]), x.shape[-1]), weight)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def linear_pair(self, x, y, weight):
        """Return the weight times x and y end to end."""
        i = x.shape[-1]
        both = self.device.empty((*x.shape[:-1], 2 * i), x.dtype)
        self.device.copy(x, both[..., :i])
        self.device.copy(y, both[..., i:])
        return self.linear(both, weight)

    def mlp(self, h, up, down):
        """Return relu(h up')^2 down'."""
        u = self.linear(h, up)
        self.device.elementwise("relu2", "relu2", (u, np.int64(u.size)), u.size, self.defines)
        return self.linear(u, down)

    def logits(self, h, lm_head):
        """Return the product of linear, in float32."""
        rows = h.reshape(prod(h.shape[:-1]), h.shape[-1])
        out = self.device.empty((len(rows), lm_head.shape[0]), "float32")
        return self.device.matmul(rows, lm_head, out).reshape(*h.shape[:-1], out.shape[-1])
