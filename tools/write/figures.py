"""Write docs/figures/*.svg from the configurations of the released models.

`python -m tools.write.figures` writes them; with `--check` it writes nothing and exits 1, naming stale ones.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from refengine.spec.config import Config
from tools.releases import CONFIGS
from tools.write.drawing import Drawing

FIGURES = Path(__file__).resolve().parents[2] / "docs" / "figures"
NANO, SUPER = CONFIGS["nano"], CONFIGS["super"]
KINDS = {"M": ("M", "Mamba-2"), "*": ("A", "attention"), "E": ("E", "experts")}


def stack(cfg: Config = NANO, count: int = 13) -> Drawing:
    """Draw the first layers of Nano, and what each kind remembers."""
    d = Drawing(f"The first {count} of Nano's {len(cfg.layers)} layers")
    d.box(20, 10, 170, 28, f"embedding: {cfg.hidden_size}", kind="H")
    y = 38
    S, kv = (cfg.mamba_num_heads, cfg.mamba_head_dim, cfg.ssm_state_size), cfg.num_key_value_heads
    chosen = f"{cfg.num_experts_per_tok} of {cfg.n_routed_experts} experts a token, and a shared one"
    notes = {
        "M": [
            f"S: {S[0]} x {S[1]} x {S[2]}, tail: {cfg.conv_kernel - 1} x {cfg.conv_dim}",
            "for a text of any length",
        ],
        "*": [f"keys and values: {kv} x {cfg.head_dim} each", "for every token read"],
        "E": ["remembers nothing", chosen],
    }
    seen: set[str] = set()
    for index, letter in enumerate(cfg.layers[:count]):
        colour, name = KINDS[letter]
        d.line((105, y), (105, y + 12))
        d.box(20, y + 12, 170, 26, f"{index}  {letter}  {name}", kind=colour)
        if letter not in seen:
            seen.add(letter)
            for number, words in enumerate(notes[letter]):
                d.text(206, y + 22 + 16 * number, words, kind="small")
        y += 38
    d.line((105, y), (105, y + 14), arrow=False)
    d.text(105, y + 30, f"... {len(cfg.layers) - count} more layers", "middle", "small")
    d.line((105, y + 38), (105, y + 52))
    d.box(20, y + 52, 170, 28, "norm, head: logits", kind="H")
    d.text(206, y + 70, f"{cfg.vocab_size} numbers, one for each entry of the vocabulary", kind="small")
    return d


def mamba(cfg: Config = NANO) -> Drawing:
    """Draw a Mamba-2 layer from in_proj to out_proj, with Nano's widths."""
    d = Drawing("A Mamba-2 layer with Nano's widths")
    inner, bc = cfg.mamba_num_heads * cfg.mamba_head_dim, cfg.n_groups * cfg.ssm_state_size
    d.text(10, 22, f"x, normalised: {cfg.hidden_size}")
    d.line((240, 28), (240, 46))
    d.box(
        10, 46, 460, 30, f"in_proj: {cfg.hidden_size} -> {2 * inner + 2 * bc + cfg.mamba_num_heads}", kind="M"
    )
    parts = [
        ("z", inner, 110),
        ("x", inner, 110),
        ("B", bc, 76),
        ("C", bc, 76),
        ("dt", cfg.mamba_num_heads, 76),
    ]
    x, at = 10.0, {}
    for name, width, w in parts:
        at[name] = x + w / 2
        d.line((x + w / 2, 76), (x + w / 2, 92))
        d.box(x, 92, w, 42, name, str(width), kind="none")
        x += w + 3
    d.line((at["x"], 134), (at["x"], 150))
    d.line((at["B"], 134), (at["B"], 150))
    d.line((at["C"], 134), (at["C"], 150))
    d.box(123, 150, 268, 30, f"convolution of {cfg.conv_kernel} positions, SiLU", kind="M")
    d.line((257, 180), (257, 206))
    d.line((at["dt"], 134), (at["dt"], 221), (391, 221))
    d.box(123, 206, 268, 46, "S <- exp(dt A) S + dt x B'", "y = S C + D x, for each head", kind="S")
    d.line((257, 252), (257, 278))
    d.line((at["z"], 134), (at["z"], 301), (123, 301))
    d.box(
        123,
        278,
        268,
        46,
        "y silu(z), then the RMS norm",
        f"of each of {cfg.n_groups} groups by itself",
        kind="M",
    )
    d.line((257, 324), (257, 346))
    d.box(123, 346, 268, 30, f"out_proj: {inner} -> {cfg.hidden_size}", kind="M")
    d.line((257, 376), (257, 398))
    d.text(257, 414, "added to the residual stream", "middle")
    return d


def chunk(length: int = 6) -> Drawing:
    """Draw a chunk of the scan: a triangle of products inside, and the state that comes in."""
    d = Drawing("A chunk of the scan: a triangle of products, and the incoming state")
    d.text(10, 20, "y[t] of a chunk has two parts:")
    side, left, top = 34, 130, 66
    d.text(
        left + length * side / 2,
        40,
        "read position s: (C[t]·B[s]) decay(s to t) dt[s] x[s]",
        "middle",
        "small",
    )
    for t in range(length):
        d.text(left - 10, top + side * t + 22, f"t = {t}", "end", "small")
        for s in range(length):
            kind = "M" if s <= t else "none"
            d.box(left + s * side, top + t * side, side - 2, side - 2, kind=kind)
    for s in range(length):
        d.text(left + s * side + 16, top - 8, f"s={s}", "middle", "small")
    right = left + length * side
    d.text(10, top + 96, "state S")
    d.text(10, top + 114, "before")
    d.line((70, top + 102), (88, top + 102))
    d.box(350, top, 120, length * side - 2, "C[t] S", "times the", "decay from the", "start to t", kind="S")
    d.text(right + 4, top + 106, "+", kind="strong")
    y = top + length * side + 26
    d.text(10, y, "The triangle is a masked matrix product,")
    d.text(10, y + 20, "as in attention, without a softmax.")
    d.text(10, y + 44, "The state sums up everything before the chunk.")
    d.text(10, y + 64, "It is updated once:")
    d.text(10, y + 86, "S <- decay(whole chunk) S", kind="code small")
    d.text(10, y + 104, "     + sum over s of decay(s to end) dt[s] x[s] B[s]'", kind="code small")
    return d


def latent(cfg: Config = SUPER) -> Drawing:
    """Draw a LatentMoE layer with Super's two widths."""
    d = Drawing("A LatentMoE layer with Super's widths")
    full, narrow = cfg.hidden_size, cfg.moe_latent_size or 0
    d.text(240, 20, f"x, normalised: [tokens, {full}]", "middle")
    d.line((240, 26), (240, 46), arrow=False)
    d.line((80, 46), (400, 46), arrow=False)
    for x in (80, 240, 400):
        d.line((x, 46), (x, 62))
    d.box(
        10,
        62,
        140,
        64,
        "router",
        f"{full} -> {cfg.n_routed_experts}",
        f"scores, best {cfg.num_experts_per_tok}",
        kind="H",
    )
    d.box(170, 62, 140, 48, "fc1_latent_proj", f"{full} -> {narrow}", kind="E")
    shared = f"{full} -> {cfg.moe_shared_expert_intermediate_size}"
    d.box(330, 62, 140, 174, "shared expert", shared, "relu squared", f"-> {full}", kind="E")
    d.line((240, 110), (240, 152))
    d.line((80, 126), (80, 192), (170, 192))
    d.text(88, 184, "ids, weights", kind="small")
    d.box(170, 152, 140, 84, f"{cfg.num_experts_per_tok} of {cfg.n_routed_experts} experts",
          f"{narrow} -> {cfg.moe_intermediate_size}", "relu squared", f"-> {narrow}", kind="E")  # fmt: skip
    d.line((240, 236), (240, 262))
    d.box(150, 262, 180, 30, "sum, by their weights", kind="none")
    d.line((240, 292), (240, 314))
    d.box(170, 314, 140, 48, "fc2_latent_proj", f"{narrow} -> {full}", kind="E")
    d.line((240, 362), (240, 386))
    d.line((400, 236), (400, 401), (252, 401))
    d.box(228, 386, 24, 30, "+", kind="none")
    d.line((240, 416), (240, 436))
    d.text(240, 452, "added to the residual stream", "middle")
    return d


def nvfp4() -> Drawing:
    """Draw a row of an NVFP4 matrix: bytes of two codes, block scales, and the global scale."""
    d = Drawing("NVFP4: two codes a byte, a scale for 16, and one for the matrix")
    d.text(10, 20, "one row of a matrix: 4 bits an element, E2M1")
    for block in range(3):
        x = 10 + 156 * block
        d.box(x, 32, 148, 34, "16 codes, 8 bytes", kind="M")
        d.line((x + 74, 66), (x + 74, 84), arrow=False)
        d.box(x, 84, 148, 30, "scale: E4M3 byte", kind="E")
    d.line((240, 114), (240, 130), arrow=False)
    d.box(130, 130, 220, 30, "global scale, float32, one", kind="S")
    d.text(10, 188, "a byte holds two neighbours; the low half is the even column:")
    d.box(10, 200, 100, 32, "bits 7..4", kind="none")
    d.box(110, 200, 100, 32, "bits 3..0", kind="M")
    d.text(60, 250, "column 2i + 1", "middle", "small")
    d.text(160, 250, "column 2i", "middle", "small")
    d.text(10, 280, "value = E2M1[code] x (block scale x global scale)")
    d.text(10, 300, "E2M1: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and a sign; the largest code is 6", kind="small")
    return d


def prediction() -> Drawing:
    """Draw the timeline of the prediction head, and a step of speculation."""
    d = Drawing("The prediction head: h[i] and t[i+1] give t[i+2]; and a step of speculation")
    for i in range(4):
        x = 20 + 112 * i
        d.box(x, 10, 92, 28, f"token t[{i}]", kind="none")
        d.line((x + 46, 38), (x + 46, 54))
        d.box(x, 54, 92, 28, "trunk", kind="M")
        d.line((x + 46, 82), (x + 46, 98))
        d.box(x, 98, 92, 28, f"h[{i}]", kind="none")
        if i < 3:
            d.line((x + 46, 126), (x + 46, 152))
            d.line((x + 112, 24), (x + 102, 24), (x + 102, 166), (x + 92, 166))
            d.box(x, 152, 92, 28, "head", kind="S")
            d.line((x + 46, 180), (x + 46, 196))
            d.text(x + 46, 212, f"guess of t[{i + 2}]", "middle")
    d.text(10, 250, "A step of speculation:", kind="strong")
    rows = [
        ("draft", "the head guesses a, b, c, one after another", "S"),
        ("verify", "the trunk reads t, a, b, c in one call", "M"),
        ("accept", "a and b equal its own choices, c does not", "H"),
        ("commit", "states advance by 3 of 4 positions (t, a, b): replay", "M"),
        ("next", "the token in place of c comes from the logits after b", "E"),
    ]
    for number, (name, words, kind) in enumerate(rows):
        y = 262 + 36 * number
        d.box(10, y, 76, 28, name, kind=kind)
        d.text(98, y + 19, words)
    return d


def ranks() -> Drawing:
    """Draw which part of a model each of two ranks holds, under tp, ep and pp."""
    d = Drawing("Which part of a model each of two ranks holds")
    columns = [("--tp 2", "heads and widths", "are cut"), ("--ep 2", "experts and", "prompts are divided"),
               ("--pp 2", "layers are cut", "in two")]  # fmt: skip
    for n, (name, *words) in enumerate(columns):
        x = 10 + 158 * n
        d.text(x + 72, 20, name, "middle", "strong")
        for number, line in enumerate(words):
            d.text(x + 72, 40 + 16 * number, line, "middle", "small")
        for row, (letter, label) in enumerate((("M", "Mamba"), ("A", "attention"), ("E", "experts"))):
            y = 86 + 52 * row
            d.text(x, y - 4, label, kind="small")
            if name == "--pp 2":
                d.box(x, y, 144, 30, "rank 0" if row < 2 else "rank 1", kind=letter if row < 2 else "H")
            elif name == "--ep 2" and letter != "E":
                d.box(x, y, 144, 30, "both: the same", kind=letter)
            else:
                d.box(x, y, 70, 30, "rank 0", kind=letter)
                d.box(x + 74, y, 70, 30, "rank 1", kind="H")
    texts = [
        ("all_reduce", "after each layer"),
        ("all_gather,", "reduce_scatter"),
        ("send, receive", "at the cut"),
    ]
    for n, lines in enumerate(texts):
        for number, line in enumerate(lines):
            d.text(82 + 158 * n, 246 + 17 * number, line, "middle", "small")
    return d


def slots() -> Drawing:
    """Draw which sequence has which slot of the loop, turn by turn."""
    d = Drawing("Slots of the loop: sequences join, are read, step and leave")
    runs = [[("A", 2, 4), ("D", 1, 5)], [("B", 1, 8), ("F", 1, 2)], [("C", 3, 2), ("E", 1, 6)]]
    unit = 32
    for row, run in enumerate(runs):
        y, x = 34 + 46 * row, 62.0
        d.text(10, y + 20, f"slot {row}")
        for name, read, steps in run:
            d.box(x, y, unit * read - 2, 30, name, kind="E")
            x += unit * read
            d.box(x, y, unit * steps - 2, 30, "steps", kind="M")
            x += unit * steps
    d.text(62, 22, "turns →", kind="small")
    d.box(62, 178, 30, 22, kind="E")
    d.text(100, 194, "a chunk of its prompt is read", kind="small")
    d.box(62, 206, 30, 22, kind="M")
    d.text(100, 222, "a token is read, and the next one drawn", kind="small")
    return d


def saved(cfg: Config = NANO) -> Drawing:
    """Draw what the file of a saved state holds."""
    d = Drawing("What the file of a saved state holds")
    d.box(10, 10, 460, 62, "header: fingerprint of the model, version of the layout,",
          "token ids, position, dtypes, sampling, checksum", kind="H")  # fmt: skip
    S = cfg.mamba_num_heads, cfg.mamba_head_dim, cfg.ssm_state_size
    size = 4 * S[0] * S[1] * S[2] + 4 * (cfg.conv_kernel - 1) * cfg.conv_dim
    kv = 4 * cfg.num_key_value_heads * cfg.head_dim
    counts = {letter: cfg.layers.count(letter) for letter in "M*"}
    d.box(10, 78, 460, 44, f"{counts['M']} Mamba layers: tail and S, float32",
          f"{counts['M'] * size / 1e6:.0f} MB, for any number of tokens", kind="M")  # fmt: skip
    d.box(10, 128, 460, 44, f"{counts['*']} attention layers: keys and values, bfloat16",
          f"{counts['*'] * kv / 1e3:.1f} kB for each token", kind="A")  # fmt: skip
    d.text(10, 196, "Sizes of Nano. A safetensors file: any program reads it without this one.", kind="small")
    return d


ALL: dict[str, Callable[[], Drawing]] = {
    "stack": stack, "mamba": mamba, "chunk": chunk, "latent": latent, "nvfp4": nvfp4,
    "prediction": prediction, "ranks": ranks, "slots": slots, "state": saved,
}  # fmt: skip


def main() -> None:
    """Write or check the figures."""
    made = {f"{name}.svg": draw().svg() for name, draw in ALL.items()}
    here = {path.name: path.read_text() for path in FIGURES.glob("*.svg")}
    if "--check" in sys.argv:
        stale = sorted(name for name in made.keys() | here.keys() if made.get(name) != here.get(name))
        raise SystemExit(f"stale: {' '.join(stale)}: run python -m tools.write.figures" if stale else 0)
    FIGURES.mkdir(exist_ok=True)
    for name, text in made.items():
        (FIGURES / name).write_text(text)


if __name__ == "__main__":
    main()
