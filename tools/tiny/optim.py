"""Step all parameters in one array, by Muon (matrices) and Adam (the rest), with a running average.

The array has four parts: the parameters of trunk and prediction head that Adam steps, then those that Muon
steps. So ranks exchange all gradients at once, a checkpoint holds a few arrays, and steps that do not train
the prediction head leave out its parts.
"""

import torch

from .ranks import Ranks

BETA1, BETA2, EPSILON, MOMENTUM = 0.9, 0.97, 1e-8, 0.95
PARTS = ("adam", "adam_mtp", "muon", "muon_mtp")


def orthogonalize(g, steps=5):
    """Return about the nearest semi-orthogonal matrix of g ... m n, by a quintic Newton-Schulz iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = g.shape[-2] > g.shape[-1]
    x = g.transpose(-1, -2) if tall else g
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        s = x @ x.transpose(-1, -2)
        x = a * x + (b * s + c * s @ s) @ x
    return x.transpose(-1, -2) if tall else x


def part_of(name, parameter):
    """Return the name in PARTS for a parameter; Adam steps embedding, head, router and convolution."""
    matrix = parameter.ndim >= 2 and not any(k in name for k in ("embeddings", "lm_head", "gate", "conv1d"))
    return ("muon" if matrix else "adam") + ("_mtp" if name.startswith("mtp.") else "")


def split_parameters(model):
    """Return (parameters for Muon, parameters for Adam)."""
    named = list(model.named_parameters())
    muon = [p for n, p in named if part_of(n, p).startswith("muon")]
    return muon, [p for n, p in named if part_of(n, p).startswith("adam")]


class Optimizer:
    """Lays a model's parameters and gradients into one array each, and steps them.

    `values`, `grads`, `momentum` (Muon), `first` and `second` (Adam) and `average` are float32 arrays of all
    parameters; every rank holds the same ones.
    """

    def __init__(self, model, ranks=None, average=0.99):
        self.ranks, self.keep, self.steps = (
            ranks or Ranks(),
            average,
            {"adam": 0, "adam_mtp": 0, "average": 0},
        )
        named = sorted(model.named_parameters(), key=lambda item: PARTS.index(part_of(*item)))
        self.values = torch.cat([p.detach().reshape(-1) for _, p in named])
        self.grads = torch.zeros_like(self.values)
        self.momentum, self.first, self.second = (torch.zeros_like(self.values) for _ in range(3))
        self.average = self.values.clone()
        self.spans, self.matrices, at = {}, {"muon": [], "muon_mtp": []}, 0
        for name, p in named:
            part, end = part_of(name, p), at + p.numel()
            p.data, p.grad = (flat[at:end].view(p.shape) for flat in (self.values, self.grads))
            self.spans[part] = (self.spans.get(part, (at,))[0], end)
            if part in self.matrices:
                self.matrices[part].append((at, end, p.shape))
            at = end
        self.ranks.allocate(at)
        self.share_out()

    def share_out(self):
        """Assign each matrix to one rank: the most work first, each to the rank with the least so far."""
        self.mine = {}
        for part, matrices in self.matrices.items():
            load, self.mine[part] = [0] * self.ranks.size, []
            for at, end, shape in sorted(matrices, key=lambda m: -(m[1] - m[0]) * min(m[2][-2:])):
                rank = load.index(min(load))
                load[rank] += (end - at) * min(shape[-2:])
                if rank == self.ranks.rank:
                    self.mine[part].append((at, end, shape))

    @torch.no_grad()
    def step(self, muon_rate, adam_rate, head):
        """Take a step with the gradients of all ranks, and clear them; `head`: the prediction head too."""
        self.ranks.mean(self.grads)
        parts = ("", "_mtp") if head else ("",)
        norm = torch.stack([self.grads[slice(*self.spans["adam" + p])].norm() for p in parts]).norm()
        scale = 1.0 / max(1.0, float(norm))
        for p in parts:
            self._adam("adam" + p, adam_rate, scale)
            self._orthogonal("muon" + p)
        self.ranks.wait()
        for p in parts:
            a, b = self.spans["muon" + p]
            self.values[a:b].sub_(self.ranks.updates[a:b], alpha=muon_rate)
        self.steps["average"] += 1
        seen = self.steps["average"]
        self.average.lerp_(self.values, 1 - min(self.keep, seen / (seen + 10)))
        self.grads.zero_()

    def _adam(self, part, rate, scale):
        """Step a part by Adam."""
        span = slice(*self.spans[part])
        g, m, v = self.grads[span].mul_(scale), self.first[span], self.second[span]
        self.steps[part] += 1
        n = self.steps[part]
        m.lerp_(g, 1 - BETA1)
        v.mul_(BETA2).addcmul_(g, g, value=1 - BETA2)
        root = v.sqrt().div_((1 - BETA2**n) ** 0.5).add_(EPSILON)
        self.values[span].addcdiv_(m, root, value=-rate / (1 - BETA1**n))

    def _orthogonal(self, part):
        """Write the updates of this rank's matrices into the shared array that all ranks read."""
        a, b = self.spans[part]
        self.momentum[a:b].lerp_(self.grads[a:b], 1 - MOMENTUM)
        for at, end, shape in self.mine[part]:
            g = self.grads[at:end].lerp(self.momentum[at:end], MOMENTUM).view(shape)
            size = max(1.0, shape[-2] / shape[-1]) ** 0.5
            self.ranks.updates[at:end].view(shape).copy_(orthogonalize(g)).mul_(size)

    def state(self):
        """Return the state that a later run continues from: arrays by name, and the counts of steps."""
        names = ("values", "momentum", "first", "second", "average")
        return {name: getattr(self, name) for name in names} | {"steps": dict(self.steps)}

    def restore(self, state):
        """Load a state that `state` returned."""
        self.steps = dict(state["steps"])
        for name in ("values", "momentum", "first", "second", "average"):
            getattr(self, name).copy_(state[name])

    def use_average(self):
        """Replace the values by the running average (before an export), and return the values."""
        values = self.values.clone()
        self.values.copy_(self.average)
        return values
