"""The embedded model as a torch module for training: `M*MEM*EME` plus the MTP head `*E`.

It computes what `spec/` defines, in forms that train fast on a CPU: the chunked scan, and tokens grouped by
expert. Documents are packed into rows; `first` marks the tokens that start a document. Convolution, state and
attention do not cross such a border. Parameter names are the checkpoint's, except that a
layer's experts are stacked.
"""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import nn

from . import kernels


class RMSNorm(nn.Module):
    """Scales each row to a root mean square of one, times a weight."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        """Return x normalised along its last axis."""
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


def linear(n_out, n_in, std=None):
    """Return a linear layer without bias; its weights have deviation 1 / sqrt(n_in) by default."""
    layer = nn.Linear(n_in, n_out, bias=False)
    nn.init.normal_(layer.weight, std=std if std is not None else 1 / math.sqrt(n_in))
    return layer


def scan(x, dt, A, B, C, first, chunk):
    """Return y of the scan: S[t] = exp(dt A) S[t-1] + dt x[t] B[t]', y[t] = S[t] C[t].

    It is computed in chunks; S is zero again where `first` is set.
    x b l h p, dt b l h, A h, B and C b l g n, first b l (bool) -> y b l h p
    """
    b, length, h, p = x.shape
    g, n = B.shape[2:]
    c, r = length // chunk, h // g
    a = dt * A - 30.0 * first[..., None]  # exp(-30) resets S
    a = a.view(b, c, chunk, h).permute(0, 1, 3, 2).cumsum(-1)  # b c h q
    xdt = (x * dt[..., None]).view(b, c, chunk, g, r, p).permute(0, 1, 3, 4, 2, 5)  # b c g r q p
    B = B.view(b, c, chunk, g, n).transpose(2, 3)  # b c g q n
    C = C.view(b, c, chunk, g, n).transpose(2, 3)  # b c g q n
    a = a.view(b, c, g, r, chunk)
    lower = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).tril()
    decay = (a[..., :, None] - a[..., None, :]).masked_fill(~lower, -math.inf).exp()  # b c g r q q
    y = (decay * (C @ B.transpose(-1, -2))[:, :, :, None]) @ xdt  # b c g r q p
    to_end = (a[..., -1:] - a).exp()[..., None]  # b c g r q 1
    states = (xdt * to_end).transpose(-1, -2) @ B[:, :, :, None]  # b c g r p n
    total = a[..., -1].cumsum(1)  # b c g r
    before = total - a[..., -1]
    carry = before[:, :, None] - total[:, None, :]  # b c k g r: from the end of k to the start of c
    strict = torch.ones(c, c, dtype=torch.bool, device=x.device).tril(-1)
    carry = carry.masked_fill(~strict[None, :, :, None, None], -math.inf).exp()
    entering = torch.einsum("bckgr,bkgrpn->bcgrpn", carry, states)
    y = y + a.exp()[..., None] * (C[:, :, :, None] @ entering.transpose(-1, -2))
    return y.permute(0, 1, 4, 2, 3, 5).reshape(b, length, h, p)


class Mamba(nn.Module):
    """Mamba-2 layer: projection, convolution, scan, gate with grouped norm, projection."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.h, self.p, self.g, self.n = (
            cfg[k] for k in ("mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size")
        )
        self.inner = self.h * self.p
        conv = self.inner + 2 * self.g * self.n
        self.in_proj = linear(self.inner + conv + self.h, cfg["hidden_size"])
        self.conv1d = nn.Module()
        self.conv1d.weight = nn.Parameter(torch.randn(conv, 1, cfg["conv_kernel"]) * 0.3)
        self.conv1d.bias = nn.Parameter(torch.zeros(conv))
        self.A_log = nn.Parameter(torch.linspace(1, 8, self.h).log())
        self.D = nn.Parameter(torch.ones(self.h))
        low, high = math.log(cfg["time_step_min"]), math.log(cfg["time_step_max"])
        dt = torch.exp(torch.rand(self.h) * (high - low) + low)
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # softplus(dt_bias) = dt
        self.norm = nn.Module()
        self.norm.weight = nn.Parameter(torch.ones(self.inner))
        self.out_proj = linear(cfg["hidden_size"], self.inner, 0.5 / math.sqrt(self.inner))

    def forward(self, x, first, age):
        """Return the output for x b l d; `first` and `age` b l mark where documents begin."""
        b, length, _ = x.shape
        gn = self.g * self.n
        z, xBC, dt = self.in_proj(x).split([self.inner, self.inner + 2 * gn, self.h], -1)
        if kernels.fits(self.cfg, length):
            age = age.int()
            xBC = kernels.ConvSilu.apply(xBC, self.conv1d.weight[:, 0], self.conv1d.bias, age)
            A, dt = -self.A_log.exp(), F.softplus(dt + self.dt_bias)
            return self.gated(kernels.Scan.apply(xBC, dt, A, self.D, age, self.g), z)
        w = self.conv1d.weight[:, 0]  # c k
        k = w.shape[1]
        y = self.conv1d.bias + w[:, k - 1] * xBC
        for j in range(1, k):  # the token j positions back, if it is in the same document
            y = y + w[:, k - 1 - j] * F.pad(xBC, (0, 0, j, 0))[:, :length] * (age >= j)[..., None]
        xs, B, C = F.silu(y).split([self.inner, gn, gn], -1)
        xs = xs.reshape(b, length, self.h, self.p)
        y = scan(
            xs,
            F.softplus(dt + self.dt_bias),
            -self.A_log.exp(),
            B.reshape(b, length, self.g, self.n),
            C.reshape(b, length, self.g, self.n),
            first,
            self.cfg["chunk_size"],
        )
        return self.gated((y + self.D[:, None] * xs).reshape(b, length, self.inner), z)

    def gated(self, y, z):
        """Return y gated by z, normalised by groups and projected out: y and z b l inner -> b l d."""
        groups = (y * F.silu(z)).unflatten(-1, (self.g, -1))
        y = F.rms_norm(groups, groups.shape[-1:], eps=self.cfg["layer_norm_epsilon"])
        return self.out_proj(y.flatten(-2) * self.norm.weight)


class Attention(nn.Module):
    """Attention without position encoding; a group of query heads shares a key head."""

    def __init__(self, cfg):
        super().__init__()
        self.q, self.kv, self.d = cfg["num_attention_heads"], cfg["num_key_value_heads"], cfg["head_dim"]
        hidden = cfg["hidden_size"]
        self.q_proj, self.k_proj = linear(self.q * self.d, hidden), linear(self.kv * self.d, hidden)
        self.v_proj = linear(self.kv * self.d, hidden)
        self.o_proj = linear(hidden, self.q * self.d, 0.5 / math.sqrt(self.q * self.d))

    def forward(self, x, age, mask):
        """Return the output for x b l d; a token sees the `age` tokens before it, as in `mask` b 1 l l."""
        b, length, _ = x.shape
        q = self.q_proj(x).view(b, length, self.q, self.d)
        k = self.k_proj(x).view(b, length, self.kv, self.d)
        v = self.v_proj(x).view(b, length, self.kv, self.d)
        if self.d == kernels.ATTENTION_DIM and kernels.load() is not None:
            return self.o_proj(kernels.Attention.apply(q, k, v, age.int()).flatten(-2))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        k, v = (t.repeat_interleave(self.q // self.kv, 1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.o_proj(y.transpose(1, 2).reshape(b, length, -1))


class Experts(torch.autograd.Function):
    """The routed experts: u t l, up e i l, down e l i, idx and w t k, counts e -> sum of w * expert(u), t l.

    Tokens are sorted by expert once. Each expert takes two products forward and four backward, on its slice
    of one array; autograd sees one node for all of them.
    """

    @staticmethod
    def forward(ctx, u, up, down, idx, w, counts):
        """Return the weighted sum over each token's experts."""
        order = idx.reshape(-1).argsort(stable=True)
        token, edges = order // idx.shape[1], [0, *counts.cumsum(0).tolist()]
        x, share = u[token], w.reshape(-1)[order, None]
        act, y = x.new_empty(len(order), up.shape[1]), torch.empty_like(x)
        spans = [(e, a, b) for e, (a, b) in enumerate(itertools.pairwise(edges)) if a < b]
        for e, a, b in spans:
            torch.mm(x[a:b], up[e].T, out=act[a:b])
        act.relu_()
        square = act * act
        for e, a, b in spans:
            torch.mm(square[a:b], down[e].T, out=y[a:b])
        ctx.save_for_backward(x, up, down, act, square, y, share, order, token)
        ctx.spans, ctx.shape = spans, w.shape
        return torch.zeros_like(u).index_add_(0, token, y * share)

    @staticmethod
    def backward(ctx, g):
        """Return the gradients of u, up, down and w."""
        x, up, down, act, square, y, share, order, token = ctx.saved_tensors
        gy = g[token]
        gw = gy.new_empty(len(order)).index_copy_(0, order, (gy * y).sum(-1)).view(ctx.shape)
        gy *= share
        gup, gdown = torch.zeros_like(up), torch.zeros_like(down)
        gact, gx = torch.empty_like(act), torch.empty_like(x)
        for e, a, b in ctx.spans:
            torch.mm(gy[a:b].T, square[a:b], out=gdown[e])
            torch.mm(gy[a:b], down[e], out=gact[a:b])
        gact.mul_(act).mul_(2.0)
        for e, a, b in ctx.spans:
            torch.mm(gact[a:b].T, x[a:b], out=gup[e])
            torch.mm(gact[a:b], up[e], out=gx[a:b])
        gu = torch.zeros_like(g).index_add_(0, token, gx)
        return gu, gup, gdown, None, gw, None


class LatentMoE(nn.Module):
    """Routed experts in the latent width, and a shared expert in the full width."""

    def __init__(self, cfg):
        super().__init__()
        hidden, latent = cfg["hidden_size"], cfg["moe_latent_size"]
        e, width = cfg["n_routed_experts"], cfg["moe_intermediate_size"]
        self.k, self.scale = cfg["num_experts_per_tok"], cfg["routed_scaling_factor"]
        self.gate = linear(e, hidden)
        self.register_buffer("bias", torch.zeros(e))  # gate.e_score_correction_bias
        self.up = nn.Parameter(torch.randn(e, width, latent) / math.sqrt(latent))
        self.down = nn.Parameter(torch.randn(e, latent, width) * 0.5 / math.sqrt(width))
        shared = cfg["moe_shared_expert_intermediate_size"]
        self.shared_up, self.shared_down = (
            linear(shared, hidden),
            linear(hidden, shared, 0.5 / math.sqrt(shared)),
        )
        self.fc1, self.fc2 = linear(latent, hidden), linear(hidden, latent, 0.5 / math.sqrt(latent))
        self.load = self.aux = None  # both of the last forward call
        self.by_row = False  # whether the auxiliary loss balances each row of text by itself

    def forward(self, h):
        """Return the output for h b l d; store the load and the auxiliary loss."""
        shape, h = h.shape, h.reshape(-1, h.shape[-1])  # t d
        e = self.bias.shape[0]
        s = self.gate(h).sigmoid()
        idx = (s.detach() + self.bias).topk(self.k, -1).indices  # t k
        w = s.gather(1, idx)
        w = w / (w.sum(-1, keepdim=True) + 1e-20) * self.scale
        counts = torch.bincount(idx.reshape(-1), minlength=e)
        r = Experts.apply(self.fc1(h), self.up, self.down, idx, w, counts)
        out = self.fc2(r) + self.shared_down(F.relu(self.shared_up(h)).square())
        self.load = counts
        p = s / s.sum(-1, keepdim=True)  # t e
        if self.by_row:
            chosen = torch.zeros_like(p).scatter_(1, idx, 1.0).view(*shape[:-1], e).mean(1) / self.k  # b e
            self.aux = e * (p.view(*shape[:-1], e).mean(1) * chosen).sum(-1).mean()
        else:
            self.aux = e * (p.mean(0) * counts / idx.numel()).sum()
        return out.view(shape)


MIXERS = {"M": Mamba, "*": Attention, "E": LatentMoE}


class Block(nn.Module):
    """Pre-norm residual block of one kind: M, * or E."""

    def __init__(self, letter, cfg):
        super().__init__()
        self.letter = letter
        self.norm = RMSNorm(cfg["hidden_size"], cfg["layer_norm_epsilon"])
        self.mixer = MIXERS[letter](cfg)

    def forward(self, x, first, age, mask):
        """Return x plus the mixer's output."""
        h = self.norm(x)
        if self.letter == "M":
            return x + self.mixer(h, first, age)
        return x + (self.mixer(h, age, mask) if self.letter == "*" else self.mixer(h))


class TinyModel(nn.Module):
    """The trunk, the head and the MTP head; parameter names are the checkpoint's."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        hidden, eps = cfg["hidden_size"], cfg["layer_norm_epsilon"]
        self.embeddings = nn.Embedding(cfg["vocab_size"], hidden)
        nn.init.normal_(self.embeddings.weight, std=0.5)
        self.layers = nn.ModuleList(Block(c, cfg) for c in cfg["hybrid_override_pattern"])
        self.norm_f = RMSNorm(hidden, eps)
        self.lm_head = linear(cfg["vocab_size"], hidden, 0.02)
        self.mtp = nn.Module()
        self.mtp.enorm, self.mtp.hnorm = RMSNorm(hidden, eps), RMSNorm(hidden, eps)
        self.mtp.eh_proj = linear(hidden, 2 * hidden)
        self.mtp.layers = nn.ModuleList(Block(c, cfg) for c in cfg["mtp_hybrid_override_pattern"])
        self.mtp.final_layernorm = RMSNorm(hidden, eps)

    @staticmethod
    def borders(first):
        """Return age b l (tokens since the document began) and mask b 1 l l (causal, in a document)."""
        length = first.shape[1]
        document = first.long().cumsum(1)
        at = torch.arange(length, device=first.device)
        start = torch.where(first, at, 0).cummax(1).values
        mask = (document[:, :, None] == document[:, None, :]) & (at[:, None] >= at[None, :])
        return at - start, mask[:, None]

    def hidden(self, ids, first):
        """Return the normalised hidden states b l d that the heads read; ids b l, first b l (bool)."""
        age, mask = self.borders(first)
        x = self.embeddings(ids)
        for layer in self.layers:
            x = layer(x, first, age, mask)
        return self.norm_f(x)

    def draft(self, h, ids, first):
        """Return the MTP head's states b l-1 d: state i, of hidden i and token i+1, predicts token i+2."""
        age, mask = self.borders(first[:, :-1])
        v = torch.cat([self.mtp.enorm(self.embeddings(ids[:, 1:])), self.mtp.hnorm(h[:, :-1])], -1)
        v = self.mtp.eh_proj(v)
        for layer in self.mtp.layers:
            v = layer(v, first[:, :-1], age, mask)
        return self.mtp.final_layernorm(v)

    def losses(self, ids, first, weight, mtp=True):
        """Return the weighted losses of the next token and the one after it; `weight` b l is of targets."""
        h = self.hidden(ids, first)
        w1 = weight[:, 1:] * ~first[:, 1:]
        main = self.cross_entropy(h[:, :-1], ids[:, 1:], w1)
        if not mtp:
            return main, None
        o = self.draft(h, ids, first)
        w2 = w1[:, 1:] * ~first[:, 1:-1]
        return main, self.cross_entropy(o[:, :-1], ids[:, 2:], w2)

    def cross_entropy(self, h, target, weight):
        """Return the weighted mean loss of targets b l, given h b l d and weights b l."""
        keep = weight > 0
        loss = F.cross_entropy(self.lm_head(h[keep]), target[keep], reduction="none")
        return (loss * weight[keep]).sum() / weight[keep].sum().clamp_min(1e-6)

    def moes(self):
        """Return the expert layers; that of the MTP head is the last."""
        return [b.mixer for b in [*self.layers, *self.mtp.layers] if b.letter == "E"]


def export_state(model):
    """Return {released name: tensor}: one matrix per expert, in BF16, the selection bias in F32."""
    out = {}

    def put(name, tensor, dtype=torch.bfloat16):
        out[name] = tensor.detach().to(dtype).clone().contiguous()

    def block(prefix, layer):
        put(prefix + "norm.weight", layer.norm.weight)
        m, prefix = layer.mixer, prefix + "mixer."
        if layer.letter != "E":
            for name, value in m.state_dict().items():
                put(prefix + name, value)
            return
        put(prefix + "gate.weight", m.gate.weight)
        put(prefix + "gate.e_score_correction_bias", m.bias, torch.float32)
        for e in range(m.up.shape[0]):
            put(f"{prefix}experts.{e}.up_proj.weight", m.up[e])
            put(f"{prefix}experts.{e}.down_proj.weight", m.down[e])
        put(prefix + "shared_experts.up_proj.weight", m.shared_up.weight)
        put(prefix + "shared_experts.down_proj.weight", m.shared_down.weight)
        put(prefix + "fc1_latent_proj.weight", m.fc1.weight)
        put(prefix + "fc2_latent_proj.weight", m.fc2.weight)

    put("backbone.embeddings.weight", model.embeddings.weight)
    for i, layer in enumerate(model.layers):
        block(f"backbone.layers.{i}.", layer)
    put("backbone.norm_f.weight", model.norm_f.weight)
    put("lm_head.weight", model.lm_head.weight)
    mtp = model.mtp
    for name in ("enorm", "hnorm", "eh_proj"):
        put(f"mtp.layers.0.{name}.weight", getattr(mtp, name).weight)
    for i, layer in enumerate(mtp.layers):
        block(f"mtp.layers.{i}.", layer)
    put(f"mtp.layers.{len(mtp.layers) - 1}.final_layernorm.weight", mtp.final_layernorm.weight)
    return out


def import_state(model, tensors):
    """Load tensors by their released names into the module, in float32: the inverse of `export_state`."""
    exported = export_state(model)
    missing = sorted(set(exported) - set(tensors))
    if missing:
        raise ValueError(f"the checkpoint lacks {missing[0]} (and {len(missing) - 1} more tensors)")
    own = {}
    for name, value in tensors.items():
        name = name.removeprefix("backbone.")
        if name.startswith("mtp.layers.") and name.split(".")[3] in (
            "enorm",
            "hnorm",
            "eh_proj",
            "final_layernorm",
        ):
            name = "mtp." + name.split(".", 3)[3]
        for old, new in (
            ("shared_experts.up_proj", "shared_up"),
            ("shared_experts.down_proj", "shared_down"),
            ("fc1_latent_proj", "fc1"),
            ("fc2_latent_proj", "fc2"),
            ("gate.e_score_correction_bias", "bias"),
        ):
            name = name.replace(old, new)
        own[name] = value.float()
    for which in ("up", "down"):
        for prefix in {n.split("experts.")[0] for n in own if ".experts." in n}:
            rows = [
                own.pop(f"{prefix}experts.{e}.{which}_proj.weight")
                for e in range(model.cfg["n_routed_experts"])
            ]
            own[prefix + which] = torch.stack(rows)
    model.load_state_dict(own)
