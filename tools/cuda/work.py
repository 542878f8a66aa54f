"""Count the work of each CUDA kernel in one call of the model: bytes of device memory, and operations.

`work(cfg, batch, length, context)`: `batch` sequences, `length` new positions of each, `context` before them.
A byte that a kernel must read or write counts once, however often its blocks ask for it (the second time it
is in the cache). tests/backends/cuda/test_roofline.py holds bytes and launches against what the backend does.
"""

from __future__ import annotations

from math import ceil

from refengine.backends.cuda.attention import BLOCKS, FEW, FEW_ROWS, HEAD
from refengine.backends.cuda.experts import FEW as EXPERTS_FEW
from refengine.backends.cuda.experts import MANY
from refengine.backends.cuda.layers import FEW as ROUTER_FEW
from refengine.backends.cuda.scan import CHUNK, PAIRS, TILE, chunks_at_once
from refengine.spec.config import Config
from tools.cuda.call import ACTIVATION, FLOAT, Call, Work, chosen, weight_bytes


def work(cfg: Config, batch: int, length: int, context: int) -> list[Work]:
    """Return the work of one call, an item for each kernel, in order."""
    call = Call(cfg, batch, length, context)
    layers = {"M": mamba, "*": attention, "E": experts, "-": mlp}
    parts = [item for kind in dict.fromkeys(cfg.layers) for item in layers[kind](call)]
    return [*outer(call, first=True), *parts, *outer(call, first=False)]


def outer(call: Call, first: bool):
    """Yield embedding and norms; then the head, for the last position of each sequence."""
    c, d = call.cfg, call.cfg.hidden_size
    row = call.tokens * d * ACTIVATION
    if first:
        yield call.one("", "embed", "embeddings", held=row, passing=row)
        scale, flops = weight_bytes(call.rows("", "norm_f")), 6 * call.tokens * d
        yield call.one("", "rms_norm", "before the first mixer", scale, 2 * row, flops)
        after = call.one("", "rms_norm", "sum and norm after each", scale, 4 * row, flops)
        yield after._replace(calls=len(c.layers))
        return
    head = call.rows("", "embeddings" if c.tie_word_embeddings else "lm_head")
    logits = call.batch * c.vocab_size * FLOAT
    yield call.one(
        "",
        "cuBLAS",
        "logits",
        weight_bytes(head),
        call.batch * d * ACTIVATION + logits,
        2 * call.batch * head[0].size,
        "cuBLAS",
    )


def mamba(call: Call):
    """Yield the work of a Mamba layer."""
    c, t = call.cfg, call.tokens
    width, taps = call.cfg.conv_dim, call.cfg.conv_kernel
    yield call.matrix("in_proj", "M", "in_proj")
    tails = 2 * call.batch * width * (taps - 1) * ACTIVATION
    yield call.one(
        "M",
        "causal_conv",
        "convolution",
        weight_bytes(call.rows("M", "conv1d")) + tails,
        2 * t * width * ACTIVATION,
        t * width * (2 * taps + 4),
    )
    yield from (scan_step if call.length == 1 else scan_chunks)(call)
    yield call.one(
        "M",
        "gated_rms_norm",
        "gate and norm",
        weight_bytes(call.rows("M", "norm")),
        3 * t * c.mamba_inner * ACTIVATION,
        10 * t * c.mamba_inner,
    )
    yield call.matrix("out_proj", "M", "out_proj")


def scan_sizes(call: Call):
    """Return the elements of S of one sequence, and the bytes of x, B (or C), dt and the small weights."""
    c, t = call.cfg, call.tokens
    x, B = t * c.mamba_inner * ACTIVATION, t * c.n_groups * c.ssm_state_size * ACTIVATION
    small = weight_bytes(call.rows("M", "A_log", "D", "dt_bias"))
    return c.mamba_inner * c.ssm_state_size, x, B, t * c.mamba_num_heads * ACTIVATION, small


def scan_step(call: Call):
    """Yield the recurrence of one position."""
    S, x, B, dt, small = scan_sizes(call)
    yield call.one(
        "M",
        "ssd_step",
        "recurrence",
        2 * call.batch * S * FLOAT + small,
        2 * x + 2 * B + dt,
        5 * call.batch * S,
    )


def scan_chunks(call: Call):
    """Yield the work of four kernels.

    C B' is made once for a group of heads, in PAIRS of TILEs on and below the diagonal.
    """
    c, (S, x, B, dt, small) = call.cfg, scan_sizes(call)
    h, p, n, g = c.mamba_num_heads, c.mamba_head_dim, c.ssm_state_size, c.n_groups
    chunks = call.batch * ceil(call.length / CHUNK)
    steps = 3 * chunks * CHUNK * h * FLOAT  # dt, and a in two parts
    added, before = chunks * S * FLOAT, chunks * S * ACTIVATION
    through = 2 * call.tokens * S  # x B', and C S
    pairs = chunks * PAIRS * TILE**2
    scores, within = g * pairs * FLOAT, 2 * h * pairs * p
    state = 2 * call.batch * S * FLOAT
    sizes = (call.batch, call.length, h, p), (call.batch, call.length, g, n)
    turns = ceil(chunks / call.batch / chunks_at_once(*sizes, ACTIVATION))
    for kernel, what, held, passing, flops, unit in (
        ("ssd_states", "what chunks add", small, x + B + dt + steps + added, through, "mma"),
        ("ssd_pass", "state between chunks", state, added + before, 2 * chunks * S, "float32"),
        ("ssd_scores", "C B' of a group", 0, 2 * B + scores, 2 * g * pairs * n, "mma"),
        ("ssd_outputs", "outputs", 0, steps + before + scores + 2 * x + B, through + within, "mma"),
    ):
        yield call.one("M", kernel, what, held, passing, flops, unit, turns)


def attention(call: Call):
    """Yield the work of an attention layer."""
    c, t = call.cfg, call.tokens
    q, k, v = (t * width * ACTIVATION for width in c.qkv_widths)
    known = call.batch * (call.context + call.length) * sum(c.qkv_widths[1:]) * ACTIVATION
    seen = call.tokens * (call.context + (call.length + 1) / 2)  # pairs of a query's position and a key's
    flops = 4 * seen * c.qkv_widths[0]
    yield call.matrix("q, k, v", "*", "q_proj", "k_proj", "v_proj")
    yield call.one("*", "attention_append", "keys and values", held=k + v, passing=k + v)
    group = c.num_attention_heads // c.num_key_value_heads
    if call.length * group > FEW_ROWS:
        yield call.one("*", "attention", "attention", known, 2 * q, flops, "mma")
        yield call.one("*", "attention_advance", "lengths")
    else:
        side = ceil(call.length * group / FEW[ACTIVATION][0]) * call.batch * c.num_key_value_heads
        parts = min(ceil(BLOCKS / side), ceil((call.context + call.length) / FEW[ACTIVATION][1]))
        values = t * c.num_attention_heads * parts
        sums = values * (HEAD + 2) * FLOAT
        yield call.one("*", "attention_decode", "parts of the context", known, q + sums, flops, "mma")
        yield call.one("*", "attention_combine", "their sum", 0, sums + q, 2 * values * HEAD)
    yield call.matrix("o_proj", "*", "o_proj")


def experts(call: Call):
    """Yield the work of a layer of experts."""
    c, t = call.cfg, call.tokens
    d, x, i, k = c.hidden_size, c.expert_width, c.moe_intermediate_size, c.num_experts_per_tok
    scores = t * c.n_routed_experts * FLOAT
    gate, bias = (weight_bytes(call.rows("E", f"gate.{key}")) for key in ("weight", "e_score"))
    few = t <= 4 * ROUTER_FEW
    kernel, products, unit = ("router_few", 1, "float32") if few else ("router_many", 3, "mma")
    flops = products * 2 * t * c.n_routed_experts * d
    yield call.one("E", kernel, "router", gate, t * d * ACTIVATION + scores, flops, unit)
    yield call.one("E", "choose", "top experts", bias, scores + t * k * 2 * FLOAT)
    yield from mlp(call, "E", "shared_experts.")
    if c.moe_latent_size:
        yield call.matrix("into the latent", "E", "fc1_latent_proj")
    met = chosen(c, t) / c.n_routed_experts
    ups, downs = (
        [r for r in call.rows("E", "experts.") if r.key.endswith(f"{key}_proj.weight")]
        for key in ("up", "down")
    )
    many = t > EXPERTS_FEW
    if many:
        yield call.one("E", "experts_sort", "order by expert", passing=6 * t * k * FLOAT, launches=3)
    flops, unit = 2 * t * k * x * i, "mma" if many else "float32"
    inner, rows, tokens = (width * ACTIVATION for width in (t * k * i, t * k * x, t * x))
    tile = "few" if not many else 64 if t * k >= MANY * c.n_routed_experts else 16
    yield call.one("E", f"experts_up_{tile}", "up", met * weight_bytes(ups), tokens + inner, flops, unit)
    out = rows if many else tokens
    yield call.one("E", f"experts_down_{tile}", "down", met * weight_bytes(downs), inner + out, flops, unit)
    if many:
        yield call.one("E", "experts_sum", "weighted sum", passing=rows + tokens, flops=2 * t * k * x)
    if c.moe_latent_size:
        yield call.matrix("out of the latent", "E", "fc2_latent_proj")
    yield call.one("E", "add", "routed + shared", passing=3 * t * d * ACTIVATION, flops=t * d)


def mlp(call: Call, kind: str = "-", prefix: str = ""):
    """Yield the work of a dense layer, or of the shared expert."""
    up = call.matrix("shared up" if prefix else "up", kind, prefix + "up_proj")
    yield up
    inner = call.tokens * call.rows(kind, prefix + "up_proj")[0].shape[0]
    yield call.one(kind, "relu2", "in place", passing=2 * inner * ACTIVATION, flops=2 * inner)
    yield call.matrix("shared down" if prefix else "down", kind, prefix + "down_proj")
