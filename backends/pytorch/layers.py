"""Norms and the causal convolution: sums over channels and over a few positions, always in float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def rms_norm(x, delta, weight, eps: float):
    """Return norm(x + delta) weight, and x + delta: both in float32, beside bfloat16 activations too.

    Products round their inputs (`Products.linear`). The residual stream and the router's input are not
    rounded: that would be the larger part of the error, and would change which experts are chosen.
    """
    x = x.float() if delta is None else x.float() + delta
    return F.rms_norm(x, x.shape[-1:], weight, eps), x


def gated_rms_norm(y, z, weight, eps: float, groups: int, mean=None):
    """Return y silu(z), normalised over each group of channels, times weight: b l c.

    If this rank has only a part of a group, `mean` turns the local mean of squares, b l g 1, into the
    group's.
    """
    u = F.silu(z.float()).mul_(y)
    u = u.view(*u.shape[:-1], groups, -1)
    if mean is None:
        u = F.rms_norm(u, u.shape[-1:], None, eps)
    else:
        u = u * torch.rsqrt(mean(u.square().mean(-1, keepdim=True)) + eps)
    return u.view(y.shape).mul_(weight).to(y.dtype)


def causal_conv(x, weight, bias, tail, lengths=None):
    """Return silu(bias + sum_j w[j] x[t - k + 1 + j]) b l c, and the last k - 1 rows b k-1 c."""
    length, remembered = x.shape[1], tail.shape[1]
    window = torch.cat([tail, x], dim=1)  # b t+l c
    w = weight[:, 0]  # c k
    y = torch.addcmul(bias, w[:, 0], window[:, :length].float())
    for j in range(1, remembered + 1):
        y.addcmul_(w[:, j], window[:, j : j + length])
    if lengths is None:
        tail = window[:, length:].clone()  # a copy, so that the window can be freed
    else:
        at = lengths[:, None] + torch.arange(remembered, device=x.device)
        tail = window.gather(1, at[..., None].expand(-1, -1, x.shape[2]))
    return F.silu(y).to(x.dtype), tail
