"""Experts: tokens are sorted by expert, and each chosen expert is read once.

On a CPU this is a loop over the chosen experts, here or in the loops of the CPU backend. On CUDA nothing may
wait for the host, so all experts are one grouped product over the stacked matrices, and the borders of the
groups are computed on the device. Packed experts take the loop on CUDA too: the host waits for the numbers of
the chosen experts, and dequantizes one at a time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from refengine.backends.cpu.experts import Listed
from refengine.backends.pytorch.products import Products, relu2
from refengine.spec.moe import Routing


def route(h, gate, bias, cfg) -> Routing:
    """Return `num_experts_per_tok` experts for each token; on a tie the lowest index wins."""
    s = torch.sigmoid(F.linear(h.float(), gate))  # b l E
    c = s + bias
    if cfg.n_group > 1:
        c = only_best_groups(c, cfg.n_group, cfg.topk_group)
    expert = largest(c, cfg.num_experts_per_tok)
    w = s.gather(-1, expert)
    if cfg.norm_topk_prob:
        w = w / (w.sum(-1, keepdim=True) + 1e-20)
    return Routing(expert, w * cfg.routed_scaling_factor)


def largest(c, k: int):
    """Return the indices of the k largest, best first, equal ones in order (topk does not guarantee it)."""
    return torch.sort(c, dim=-1, descending=True, stable=True).indices[..., :k]


def only_best_groups(c, groups: int, keep: int):
    """Return c, -inf outside the `keep` best groups; the score of a group is the sum of its two best."""
    by_group = c.unflatten(-1, (groups, -1))
    best = largest(by_group.topk(2, dim=-1).values.sum(-1), keep)
    kept = torch.zeros(by_group.shape[:-1], dtype=torch.bool, device=c.device).scatter_(-1, best, True)
    return by_group.masked_fill(~kept[..., None], -torch.inf).flatten(-2)


class Stacked(NamedTuple):
    """Experts as two arrays, for grouped products."""

    up: torch.Tensor  # E i x
    down: torch.Tensor  # E x i


class Apart(NamedTuple):
    """Experts as separate matrices, possibly packed."""

    matrices: list  # (up, down) of each


class Experts:
    """(u [b l x], placed experts, routing) -> sum over the chosen of  weight relu(u up')^2 down'

    `experts` has the routed experts from number `first` on; experts of other ranks contribute nothing.
    """

    def __init__(self, products: Products):
        self.products = products

    def __call__(self, u, experts, routing: Routing, first: int = 0):
        u = u.to(self.products.dtype)
        tokens, k = u.reshape(-1, u.shape[-1]), routing.expert.shape[-1]
        expert, weight = routing.expert.reshape(-1), routing.weight.reshape(-1, 1)
        if isinstance(experts, Stacked):
            y = grouped(tokens, experts, here(expert, first, len(experts.up)), weight, k)
        else:
            y = self.listed(tokens, experts, here(expert, first, len(experts.matrices)), weight, k)
        return y.to(u.dtype).view(u.shape)

    def listed(self, tokens, experts: Listed | Apart, expert, weight, k):
        """Return the weighted sum [tokens x] float32, by a loop over the chosen experts."""
        matrices, count = experts.matrices, len(experts.matrices)
        order = expert.argsort(stable=True)
        token, weight, start = order // k, weight[order], 0
        y = torch.zeros(tokens.shape, device=tokens.device)  # float32
        for i, hits in enumerate(expert.bincount(minlength=count)[:count].tolist()):
            if hits:
                rows = token[start : start + hits]
                out = self.products.mlp(tokens[rows], *matrices[i])
                y.index_add_(0, rows, out.float().mul_(weight[start : start + hits]))  # no token twice
                start += hits
        return y


def here(expert, first: int, count: int):
    """Return expert numbers relative to `first`; `count` for those outside first .. first + count - 1."""
    local = expert - first
    return local.masked_fill_((local < 0) | (local >= count), count)


def grouped(tokens, matrices: Stacked, expert, weight, k):
    """Return the weighted sum by grouped products: sums in a fixed order, without waiting for the device.

    Choices of an expert of another rank come last and belong to no group: their rows are undefined.
    """
    order = expert.argsort(stable=True)
    ends = torch.searchsorted(expert[order], torch.arange(len(matrices.up), device=tokens.device), right=True)
    ends = ends.to(torch.int32)
    rows = product(tokens[order // k].to(matrices.up.dtype), matrices.up, ends)
    rows = product(relu2(rows), matrices.down, ends)  # (tokens k) x, by expert
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    elsewhere = (expert == len(matrices.up))[:, None]
    return (rows[back].float() * weight).masked_fill_(elsewhere, 0).view(len(tokens), k, -1).sum(1)


def product(rows, stacked, ends):
    """Return rows ends[i-1] .. ends[i] times stacked[i]', for every i."""
    if hasattr(torch, "_grouped_mm") and rows.dtype == torch.bfloat16 and aligned(stacked):
        return torch._grouped_mm(rows, stacked.transpose(-1, -2), offs=ends)
    y, start = rows.new_empty(len(rows), stacked.shape[1]), 0
    for matrix, end in zip(stacked, ends.tolist(), strict=True):
        if end > start:
            y[start:end] = F.linear(rows[start:end], matrix)
        start = end
    return y


def aligned(stacked) -> bool:
    """Return whether the rows of both operands are aligned to 16 bytes, as the grouped kernel requires."""
    return all(size * stacked.element_size() % 16 == 0 for size in stacked.shape[1:])
