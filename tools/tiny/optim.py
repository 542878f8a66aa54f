"""Muon for matrices, Adam for everything else, and a running average of the weights (what is exported)."""

import torch


def orthogonalize(g, steps=5):
    """The nearest semi-orthogonal matrix, roughly, by a quintic Newton-Schulz iteration; g ... m n."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = g.shape[-2] > g.shape[-1]
    x = g.transpose(-1, -2) if tall else g
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        s = x @ x.transpose(-1, -2)
        x = a * x + (b * s + c * s @ s) @ x
    return x.transpose(-1, -2) if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized per matrix; a stack of experts is a stack of matrices."""

    def __init__(self, params, lr=0.02, momentum=0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalize(p.grad.lerp(buffer, group["momentum"]))
                p.add_(update, alpha=-group["lr"] * max(1.0, p.shape[-2] / p.shape[-1]) ** 0.5)


def split_parameters(model):
    """(matrices for Muon, the rest for Adam): embedding, head, routers, convolutions, vectors."""
    muon, adam = [], []
    for name, p in model.named_parameters():
        matrix = p.ndim >= 2 and not any(k in name for k in ("embeddings", "lm_head", "gate", "conv1d"))
        (muon if matrix else adam).append(p)
    return muon, adam


class Average:
    """Exponential moving average of parameters; buffers (selection biases) are copied."""

    def __init__(self, model, decay):
        self.decay, self.seen = decay, 0
        self.values = {k: v.detach().clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model):
        self.seen += 1
        keep = min(self.decay, self.seen / (self.seen + 10))
        for k, v in model.state_dict().items():
            self.values[k].lerp_(v, 1 - keep) if not k.endswith(".bias") or "conv1d" in k else self.values[
                k
            ].copy_(v)
