"""The state-space scan: the recurrence for one position, chunks of matrix products for more.

Letters and equations are those of spec/scan.py. A call of one position computes the recurrence. A longer call
uses `chunks`: everything that does not need the state is computed for all chunks at once, then a loop passes
the state over the chunks. S and its decays are float32. Sums of dt A are float64, because differences of two
long sums are used.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

SPAN = 32  # positions at a time on a CPU, at most: work within a chunk grows with its square (docs/torch.md)


def ssd_scan(x, dt, A_log, B, C, D, dt_bias, S, lengths=None, dt_limit=(0.0, math.inf), chunk: int = 128):
    """Return y b l h p, and the state after the last real position of each row."""
    dt = F.softplus(dt.float() + dt_bias)  # b l h
    if tuple(dt_limit) != (0.0, math.inf):
        dt = dt.clamp(*dt_limit)
    if lengths is not None:
        real = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
        dt = dt.masked_fill(~real[..., None], 0)
    A = -torch.exp(A_log)  # h
    scan = one_position if x.shape[1] == 1 else chunks
    y, S = scan(x.float(), dt, A, B.float(), C.float(), D, S, chunk)
    return y.to(x.dtype), S


def one_position(x, dt, A, B, C, D, S, chunk):
    """Return y and S by the recurrence: S <- exp(dt A) S + dt x B',  y = S C + D x."""
    b, _, h, p = x.shape
    g, n = B.shape[2:]
    r = h // g * p  # rows of S that share B and C
    x, dt = x[:, 0], dt[:, 0]  # b h p   b h
    S = S * torch.exp(dt * A)[..., None, None]  # b h p n, a new array: forks may use the old one
    rows = S.view(b * g, r, n)
    rows.baddbmm_((dt[..., None] * x).reshape(b * g, r, 1), B.reshape(b * g, 1, n))
    y = torch.bmm(rows, C.reshape(b * g, n, 1)).view(b, h, p)
    return torch.addcmul(y, D[:, None], x)[:, None], S


def chunks(x, dt, A, B, C, D, S, chunk):
    """Return y and S by chunks; the last chunk is padded with positions of dt = 0, which change nothing."""
    (b, l, h, p), (g, n) = x.shape, B.shape[2:]
    r, q = h // g, min(chunk, l) if x.is_cuda else min(chunk, l, SPAN)
    pad = -l % q
    c = (l + pad) // q  # chunks
    u = F.pad(dt[..., None] * x, (0, 0, 0, 0, 0, pad)) if pad else dt[..., None] * x
    step = F.pad(dt, (0, 0, 0, pad)) if pad else dt
    a = (step.double() * A).view(b, c, q, g, r).cumsum(2).permute(0, 1, 3, 4, 2)  # b c g r q
    u = u.view(b, c, q, g, r, p).permute(0, 1, 3, 4, 2, 5)  # b c g r q p
    B, C = (F.pad(m, (0, 0, 0, 0, 0, pad)).view(b, c, q, g, n).transpose(2, 3) for m in (B, C))  # b c g q n
    y = torch.empty(b, c, q, g, r, p, dtype=x.dtype, device=x.device)
    S = S.reshape(b, g, r * p, n)
    later = torch.ones(q, q, dtype=torch.bool, device=x.device).tril_()  # i >= j
    for i in range(c):
        y[:, i], S = one_chunk(u[:, i], a[:, i], B[:, i], C[:, i], S, later)
    y = y.view(b, c * q, h, p)[:, :l]
    return torch.addcmul(y, D[:, None], x), S.view(b, h, p, n)


def one_chunk(u, a, B, C, S, later):
    """Return y b q g r p and S, of u b g r q p, a b g r q, B and C b g q n, S b g (r p) n."""
    b, g, r, q, p = u.shape
    # WITHIN the chunk: attention-like, masked by causality and weighted by the decay
    L = (a[..., :, None] - a[..., None, :]).float().masked_fill_(~later, -math.inf).exp_()  # b g r i j
    L.mul_((C @ B.transpose(-1, -2))[:, :, None])
    y = (L @ u).permute(0, 3, 1, 2, 4)  # b q g r p
    # FROM BEFORE: the incoming state, decayed to each position
    before = (C @ S.transpose(-1, -2)).view(b, g, q, r, p).transpose(1, 2)  # b q g r p
    y = torch.addcmul(y, a.exp().float().permute(0, 3, 1, 2)[..., None], before)
    # ONWARDS: the state decayed over the chunk, plus each position decayed to the chunk's end
    end = a[..., -1]
    u = u * (end[..., None] - a).exp().float()[..., None]  # b g r q p
    added = u.transpose(-1, -2).reshape(b, g, r * p, q) @ B  # b g (r p) n
    decay = end.exp().float()[..., None].expand(b, g, r, p).reshape(b, g, r * p, 1)
    return y, torch.addcmul(added, decay, S)
