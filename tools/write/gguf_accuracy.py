"""Write the table of GGUF types in docs/accuracy.md: rounding in the engines, beside the spec in float64.

    python -m tools.write.gguf_accuracy SOURCE BIN            print it
    python -m tools.write.gguf_accuracy SOURCE BIN --write    put it into docs/accuracy.md, between its marks

SOURCE and BIN: see tools/write/gguf_files.py. llama.cpp's quantizer writes the embedded model in each type,
and each engine reads that file. Its distribution after each token of some stories is compared with that of
the NumPy backend in float64 with the same dequantized weights. Needs llama-cpp-python. Tokens are read in one
piece (a prompt), and one after another (steps). llama.cpp runs as it does by default, on two threads.
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

import refengine
from refengine.quantize.evaluate import differences
from refengine.spec.sample import log_probs
from tools.tiny.stories import tell
from tools.write.accuracy import PAGE
from tools.write.gguf_files import TINY, converted, quantized
from tools.write.gguf_table import THEIRS

SEED, STORIES = 20_261_129, 4
START, END = "<!-- gguf -->\n", "<!-- /gguf -->"
TYPES = ("BF16", *THEIRS, "NVFP4")
NVFP4 = ("ssm_in", "ssm_out", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_up", "ffn_down")
Logits = Callable[[list[int]], np.ndarray]  # of ids: [tokens v]


def ours(path: Path, **how) -> tuple[Logits, Logits]:
    """Return the logits of a prompt, and of one token after another, of an engine that is loaded now."""
    engine = refengine.load(path, **how)
    model = engine.runner.model

    def stepped(ids: list[int]) -> np.ndarray:
        states, found = model.new_states(1), []
        for token in ids:
            logits, states = model.backend.step(model, np.array([token]), states)
            found.append(np.array(logits[0]))
        return np.stack(found)

    return engine.logits, stepped


def llama(path: Path) -> tuple[Logits, Logits]:
    """Return the same of llama.cpp."""
    import llama_cpp

    engine = llama_cpp.Llama(
        str(path), n_ctx=1024, logits_all=True, n_threads=2, n_threads_batch=2, verbose=False
    )

    def whole(ids: list[int]) -> np.ndarray:
        engine.reset()
        engine.eval(ids)
        return np.array(engine.scores[: len(ids)])

    def stepped(ids: list[int]) -> np.ndarray:
        engine.reset()
        for token in ids:
            engine.eval([token])
        return np.array(engine.scores[: len(ids)])

    return whole, stepped


def compared(logits: Logits, exact: list[np.ndarray], texts: list[list[int]]) -> tuple[float, float]:
    """Return the mean KL divergence from the exact distributions, and how often the top token is theirs."""
    sums = np.zeros(4)
    for ids, p in zip(texts, exact, strict=True):
        q = log_probs(logits(ids).astype(np.float64))
        sums += differences(p[:-1], q[:-1], np.array(ids[1:]))
    count = sum(len(ids) - 1 for ids in texts)
    return sums[2] / count, sums[3] / count


def rows(source: Path, programs: Path):
    """Yield the lines of the table."""
    rng = random.Random(SEED)
    with refengine.load("tiny") as engine:
        texts = [[*engine.ids(tell(rng).text), 2] for _ in range(STORIES)]
    yield f"{sum(map(len, texts)):,} tokens. KL in nats a token; top-1 in brackets where it is not 100 %."
    yield ""
    heads = ("type", "cpu, prompt", "cpu, steps", "cpu float32, steps", "llama.cpp, prompt", "steps", "ratio")
    yield f"| {' | '.join(heads)} |"
    yield "|---|---|---|---|---|---|---|"
    with tempfile.TemporaryDirectory() as folder:
        wide = converted(source, TINY, Path(folder) / "wide.gguf", "f32")
        for kind in TYPES:
            path = Path(folder) / "theirs.gguf"
            more = [word for name in NVFP4 for word in ("--tensor-type", f"{name}=nvfp4")]
            quantized(programs, wide, path, *(("Q8_0", *more) if kind == "NVFP4" else (kind,)))
            with refengine.load(path, dtype="float64") as engine:
                exact = [log_probs(engine.logits(ids)) for ids in texts]
            default, single, theirs = (
                ours(path, backend="cpu", dtype="bfloat16"),
                ours(path, backend="cpu"),
                llama(path),
            )
            found = [compared(each, exact, texts) for each in (*default, single[1], *theirs)]
            cells = [f"{kl:.1e}" + (f" ({top:.2%})" if top < 1 else "") for kl, top in found]
            ratio = min(found[3][0], found[4][0]) / max(found[0][0], found[1][0])
            yield f"| {kind} | {' | '.join(cells)} | {ratio:.0f}x |"


def main(source: Path, programs: Path, write: bool) -> None:
    """Print the table, or put it into the page."""
    lines = []
    for line in rows(source, programs):
        print(line, file=sys.stderr if write else sys.stdout, flush=True)
        lines.append(line)
    if write:
        text = PAGE.read_text(encoding="utf-8")
        before, rest = text.split(START)
        PAGE.write_text(
            f"{before}{START}\n{chr(10).join(lines)}\n\n{END}{rest.split(END)[1]}", encoding="utf-8"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), "--write" in sys.argv[3:])
