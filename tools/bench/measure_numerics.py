"""Measure what docs/numerics.md claims: how far float32 and coarser formats lie from float64.

    python -m tools.bench.measure_numerics            print the tables
    python -m tools.bench.measure_numerics --write    put them into docs/numerics.md, between its marks

An error is rms(a - b) / rms(b), where b is the float64 result. Weights and inputs are random and seeded;
another BLAS library changes the last digits.
"""

from __future__ import annotations

import inspect
import sys
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from refengine.spec import scan  # noqa: E402
from refengine.spec.config import Config  # noqa: E402
from refengine.spec.model import Model  # noqa: E402
from refengine.spec.moe import largest  # noqa: E402
from refengine.spec.numerics import sigmoid, silu, softplus, tolerance  # noqa: E402
from refengine.spec.ops import DEFINITION, REFERENCE, numpy_backend  # noqa: E402
from refengine.spec.tensors import Tensor, table  # noqa: E402

PAGE = ROOT / "docs" / "numerics.md"
START, END = "<!-- measured -->\n", "<!-- /measured -->"
CONFIG = Config(
    layers="MEM*EMEM*E",
    hidden_size=96,
    vocab_size=160,
    max_position_embeddings=4096,
    mamba_num_heads=8,
    mamba_head_dim=16,
    ssm_state_size=32,
    n_groups=2,
    conv_kernel=4,
    chunk_size=128,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=24,
    n_routed_experts=16,
    num_experts_per_tok=3,
    moe_intermediate_size=40,
    moe_shared_expert_intermediate_size=56,
    moe_latent_size=48,
    routed_scaling_factor=2.5,
    layer_norm_epsilon=1e-5,
)


def rounded(dtype):
    """Return a function that rounds to `dtype` and comes back."""
    return lambda a: a.astype(dtype).astype(a.dtype)


def exact(a):
    """Return the array itself."""
    return a


BF16, F16 = rounded(ml_dtypes.bfloat16), rounded(np.float16)


def error(a, b) -> float:
    """Return rms(a - b) / rms(b)."""
    return float(np.sqrt(np.mean((a - b.astype(np.float64)) ** 2) / np.mean(b.astype(np.float64) ** 2)))


def markdown(title: str, head: list[str], rows: list[list]) -> str:
    """Return a titled table; a float is shown to two digits."""

    def show(cell):
        return f"{cell:.1e}" if isinstance(cell, float) else str(cell)

    lines = [head, ["---"] * len(head), *rows]
    return f"**{title}**\n\n" + "\n".join("| " + " | ".join(map(show, line)) + " |" for line in lines) + "\n"


def random_tensor(row: Tensor, rng) -> np.ndarray:
    """Return a float32 tensor with the spread of a freshly initialised model."""
    if row.key.endswith("A_log"):
        a = np.log(rng.uniform(1, 16, row.shape))
    elif row.key.endswith("dt_bias"):
        a = dt_bias(rng, row.shape)
    elif row.role == "norm" or row.key.endswith(".D"):
        a = rng.uniform(0.5, 1.5, row.shape)
    elif row.role == "embedding":
        a = rng.standard_normal(row.shape)
    elif len(row.shape) == 1:
        a = 0.1 * rng.standard_normal(row.shape)
    else:
        a = rng.standard_normal(row.shape) / row.shape[-1] ** 0.5
    return a.astype(np.float32)


def dt_bias(rng, shape):
    """Return the bias whose softplus is spread evenly, in its logarithm, from 0.001 to 0.1."""
    dt = np.exp(rng.uniform(np.log(1e-3), np.log(1e-1), shape))
    return dt + np.log(-np.expm1(-dt))


def logits_by_length(length: int = 4096) -> str:
    """Return the table of float32 logits by position, against float64."""
    rng = np.random.default_rng(1)
    weights = {row.name: random_tensor(row, rng) for row in table(CONFIG)}
    ids = rng.integers(0, CONFIG.vocab_size, (1, length))

    def run(dtype, ops, pieces):
        chosen = []

        def route(*args):
            chosen.append(ops.route(*args))
            return chosen[-1]

        model = Model.build(CONFIG, weights.__getitem__, numpy_backend(dtype, ops=replace(ops, route=route)))
        states, out = model.new_states(1), []
        for piece in np.split(ids, range(pieces, length, pieces), axis=1):
            h, states = model.blocks(model.embed(piece), states)
            out.append(model.head(h))
        layers, calls = CONFIG.layers.count("E"), len(out)
        experts = [
            np.concatenate([chosen[call * layers + e].expert for call in range(calls)], axis=1)
            for e in range(layers)
        ]
        return np.concatenate(out, axis=1)[0], np.sort(experts, axis=-1)[:, 0]

    true, experts = run(np.float64, DEFINITION, length)
    forms = [
        ("recurrence", DEFINITION, length),
        ("chunks", REFERENCE, length),
        ("one token at a time", REFERENCE, 1),
    ]
    at, columns, flips = windows(length), [], []
    for _, ops, pieces in forms:
        mine, mine_experts = run(np.float32, ops, pieces)
        same = (experts == mine_experts).all(axis=(0, 2))
        flips.append(int((~same).sum()))
        columns.append([error(mine[w][same[w]], true[w][same[w]]) for w in at])
    rows = [[f"{w.start} to {w.stop - 1}", *cells] for w, *cells in zip(at, *columns, strict=True)]
    rows.append(["positions with another expert, left out", *flips])
    title = f"1. Logits in float32, by position in one sequence of {length:,} (layers `{CONFIG.layers}`)"
    return markdown(title, ["positions", *(name for name, *_ in forms)], rows)


def windows(length: int) -> list[slice]:
    """Return the ranges of positions whose errors are shown."""
    return [slice(a, b) for a, b in ((0, 16), (16, 64), (64, 256), (256, 1024), (1024, length))]


def scan_inputs(length: int, heads: int = 32):
    """Return the arguments of the scan in a fresh model, in float32."""
    rng = np.random.default_rng(2)
    x, B, C = (silu(rng.standard_normal((1, length, *s))) for s in ((heads, 16), (4, 32), (4, 32)))
    arrays = (
        x,
        rng.standard_normal((1, length, heads)),
        np.log(rng.uniform(1, 16, heads)),
        B,
        C,
        np.ones(heads),
        dt_bias(rng, heads),
        np.zeros((1, heads, 16, 32)),
    )
    return [a.astype(np.float32) for a in arrays]


def chunks_and_cumsum(length: int = 4096) -> str:
    """Return the table of the chunked scan, with sums of dt A in float64 and in float32."""
    inputs = scan_inputs(length)
    y, S = scan.ssd_scan(*(a.astype(np.float64) for a in inputs))
    rows = [["recurrence", "", *map(error, scan.ssd_scan(*inputs), (y, S))]]
    text = inspect.getsource(scan.one_chunk)
    assert text.count("dtype=np.float64") == 1
    narrow = dict(vars(scan))
    text = text.replace("dtype=np.float64", "dtype=np.float32")
    exec(text + inspect.getsource(scan.ssd_scan_chunked), narrow)
    for chunk in (16, 128, 1024):
        for name, form in (("float64", scan.ssd_scan_chunked), ("float32", narrow["ssd_scan_chunked"])):
            rows.append([f"chunks of {chunk}", name, *map(error, form(*inputs, chunk=chunk), (y, S))])
    title = f"2. The scan in float32 over {length:,} positions: its two forms, and the running sum of dt A"
    return markdown(title, ["form", "sum in", "error of y", "error of the last S"], rows)


def recurrence(inputs, round_A=exact, round_dt=exact, round_decay=exact, round_S=exact):
    """Return `ssd_scan` in float64, with something rounded and without D: (S C, S, dt A)."""
    x, dt, A_log, B, C, _, bias, S = (a.astype(np.float64) for a in inputs)
    dt, A = round_dt(softplus(dt + bias))[0], -np.exp(round_A(A_log))
    B, C = (np.repeat(m[0], x.shape[2] // m.shape[2], axis=1) for m in (B, C))
    x, S, y = x[0], S[0], np.empty(x.shape[1:])
    for t in range(len(x)):
        decay = round_decay(np.exp(dt[t] * A))[:, None, None]
        S = round_S(decay * S + (dt[t, :, None] * x[t])[..., None] * B[t, :, None])
        y[t] = (S @ C[t, ..., None])[..., 0]
    return y, S, dt * A


def narrow_scan(length: int = 4096) -> str:
    """Return the table of the scan with one quantity rounded to bfloat16 or float16."""
    inputs = scan_inputs(length)
    y, _, steps = recurrence(inputs)
    slow = np.argsort(-steps.mean(axis=0))[: steps.shape[1] // 4]  # dt A nearest to 0: the longest memory
    early, late = slice(0, 64), slice(length - 64, length)
    rows = []
    for name, how in (
        ("A_log in bfloat16", {"round_A": BF16}),
        ("dt in bfloat16", {"round_dt": BF16}),
        ("exp(dt A) in bfloat16", {"round_decay": BF16}),
        ("exp(dt A) in float16", {"round_decay": F16}),
        ("S in bfloat16 after each step", {"round_S": BF16}),
        ("S in float16 after each step", {"round_S": F16}),
        ("S in float32 after each step", {"round_S": rounded(np.float32)}),
    ):
        mine = recurrence(inputs, **how)[0]
        rows.append(
            [
                name,
                error(mine[early], y[early]),
                error(mine[late], y[late]),
                error(mine[late][:, slow], y[late][:, slow]),
            ]
        )
    title = f"3. One thing rounded in a scan that is otherwise float64, {length:,} steps: error of S C"
    head = ["rounded", "first 64 steps", "last 64 steps", "last 64, the quarter of heads that forget slowest"]
    return markdown(title, head, rows)


def narrow_router(tokens: int = 2048) -> str:
    """Return the table of tokens that get other experts when the router is rounded."""
    rows = []
    for name, d, E, k in (("Nano", 2688, 128, 6), ("Super", 4096, 512, 22), ("Ultra", 8192, 512, 22)):
        rng = np.random.default_rng(3)
        h = BF16(rng.standard_normal((tokens, d)).astype(np.float32))
        gate = BF16((0.02 * rng.standard_normal((E, d))).astype(np.float32))
        true = np.sort(largest(sigmoid(h.astype(np.float64) @ gate.astype(np.float64).T), k))

        def changed(s, true=true, k=k):
            return f"{100 * np.mean((np.sort(largest(s, k)) != true).any(axis=-1)):.2f} %"

        z = h @ gate.T
        rows.append(
            [
                f"{name}: {k} of {E}, width {d}",
                changed(sigmoid(z)),
                changed(sigmoid(F16(z))),
                changed(sigmoid(BF16(z))),
                changed(BF16(sigmoid(BF16(z)))),
            ]
        )
    title = f"4. Tokens of {tokens:,} that get other experts than in float64 (h and gate are in bfloat16)"
    head = ["router", "all in float32", "logits in float16", "in bfloat16", "logits and scores in bfloat16"]
    return markdown(title, head, rows)


def sums(trials: int = 2000) -> str:
    """Return the table of sums of products against `tolerance`."""
    rows = []
    for terms in (64, 1024, 16384):
        a, b = np.random.default_rng(4).standard_normal((2, trials, terms)).astype(np.float32)
        true = (a.astype(np.float64) * b).sum(axis=-1)
        one_by_one = np.zeros(trials, np.float32)
        for i in range(terms):
            one_by_one += a[:, i] * b[:, i]
        by_product = (a[:, None] @ b[..., None])[:, 0, 0]
        worst = [float(np.abs(mine - true).max() / np.abs(true).max()) for mine in (one_by_one, by_product)]
        rows.append([f"{terms:,}", *worst, tolerance(np.float32, terms)])
    title = f"5. Sums of products in float32: the worst of {trials:,}, over the largest result"
    return markdown(title, ["terms", "one by one", "matrix product", "tolerance(float32, terms)"], rows)


def main(write: bool) -> None:
    """Print the tables, or write them into docs/numerics.md."""
    tables = "\n".join(f() for f in (logits_by_length, chunks_and_cumsum, narrow_scan, narrow_router, sums))
    print(tables)
    if write:
        before, _, rest = PAGE.read_text().partition(START)
        PAGE.write_text(f"{before}{START}\n{tables}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main(write="--write" in sys.argv[1:])
