"""Measure what quantizing costs the embedded model, and what large packed files cost.

    python -m tools.bench.packed [STORIES]     loss, KL and top-1 against BF16, for each recipe
    python -m tools.bench.packed memory NAME   peak memory of a mixed model of about 2 GB on a backend (Linux)
    python -m tools.bench.packed opening       processor time to open the tensor lists of Nano and Super
    python -m tools.bench.packed nano [N]      peak memory of quantizing N layers of a sparse Nano (Linux)
    python -m tools.bench.packed embedding     peak memory of quantizing Ultra's embedding in NVFP4

Stories are told by the generator with a seed that training does not use. KL is of the distribution after each
token, in nats; top-1 is how often the most likely token is the same. The first writes a Markdown table to
stdout. The next three write sparse files, which have true sizes and hold nothing; the last writes 2.1 GB.
"""

from __future__ import annotations

import random
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

import refengine
from refengine.checkpoint import Checkpoint
from refengine.checkpoint.write import Piece, pieces, write_pieces
from refengine.quantize import FORMATS, Recipe, quantize, recipe_of
from refengine.quantize.write import Job
from refengine.spec.arrays import DTYPES
from refengine.spec.config import Config
from refengine.spec.sample import log_probs
from refengine.spec.tensors import Tensor, table
from tools import releases
from tools.tiny.stories import tell

SEED = 20_261_129
ROWS = {
    "NVFP4, every linear": ("nvfp4", False),
    "NVFP4, every linear, four over six": ("nvfp4", True),
    "W4A8, every linear": ("w4a8", False),
    "Nano": ("nano", False),
    "Super": ("super", False),
    "Ultra": ("ultra", False),
    "Lightning": ("lightning", False),
    "FP8, every linear": ("fp8", False),
    "MXFP8, every linear": ("mxfp8", False),
}


def distributions(model: str | Path, texts: list[list[int]]) -> list[np.ndarray]:
    """Return log-probabilities [tokens v] of each text, by the model on the NumPy backend."""
    with refengine.load(model) as engine:
        return [log_probs(engine.logits(ids).astype(np.float64)) for ids in texts]


def main(count: int) -> None:
    """Print the table."""
    rng = random.Random(SEED)
    with refengine.load("tiny") as engine:
        texts = [[*engine.ids(tell(rng).text), 2] for _ in range(count)]
    exact = distributions("tiny", texts)

    def loss(found) -> float:
        pairs = list(zip(found, texts, strict=True))
        nats = [p[np.arange(len(ids) - 1), ids[1:]] for p, ids in pairs]
        return -float(np.concatenate(nats).mean())

    size = sum(at.nbytes for at in Checkpoint.open("tiny").stored.values())
    print(f"{sum(map(len, texts))} tokens; BF16: {size / 1e6:.2f} MB, loss {loss(exact):.4f}\n")
    print("| recipe | MB | loss | KL | top-1 |\n|---|---|---|---|---|")
    for name, (recipe, four_over_six) in ROWS.items():
        with tempfile.TemporaryDirectory() as folder:
            quantize("tiny", Path(folder) / "out", recipe_of(recipe, four_over_six))
            nbytes = sum(at.nbytes for at in Checkpoint.open(Path(folder) / "out").stored.values())
            found = distributions(Path(folder) / "out", texts)
        kl = np.concatenate([(np.exp(p) * (p - q)).sum(axis=1) for p, q in zip(exact, found, strict=True)])
        same = np.concatenate([p.argmax(1) == q.argmax(1) for p, q in zip(exact, found, strict=True)])
        change = loss(found) - loss(exact)
        print(
            f"| {name} | {nbytes / 1e6:.2f} | {change:+.4f} | {kl.mean():.4f} | {same.mean():.1%} |",
            flush=True,
        )


def sparse(directory: Path, cfg: Config, recipe: str, shards: int = 1) -> int:
    """Write the tensor list of a quantized model, with scales of inputs; return its length.

    All codes are 0 and all single scales 1.
    """
    chosen, out = recipe_of(recipe), []
    for row in table(cfg):
        job = Job(row, FORMATS.get(chosen.format_of(row, cfg)), (row,))
        tensors = job.tensors(row.dtype)
        if job.format is not None:
            tensors.append((f"{row.name.removesuffix('weight')}input_scale", "F32", ()))
        for name, dtype, shape in tensors:
            one = None if shape or job.format is None else lambda: np.ones((), np.float32)
            out.append(Piece(name, dtype, shape, one))
    write_pieces(directory, cfg.to_hf(), out, shards)
    return len(out)


def memory(field: str) -> int:
    """Return a size of this process in bytes, such as RssAnon, as Linux counts it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def measure_memory(backend: str) -> None:
    """Print the peak of memory while a model of Nano's sizes, with fewer layers, reads and generates.

    All pages of the files are read first, so that they count in full. Another model has run before, so that
    what the backend's library takes does not count.
    """
    with refengine.load("tiny", backend=backend, dtype="auto") as engine:
        engine.logits([5])
    with tempfile.TemporaryDirectory() as folder:
        sparse(Path(folder), replace(releases.CONFIGS["nano"], layers="MEM*"), "super")
        begin = memory("VmRSS")
        with refengine.load(folder, backend=backend, dtype="auto") as engine:
            files = engine.checkpoint.files
            for file in files:
                np.frombuffer(file.map, np.uint8)[::4096].max()
            size = sum(file.size for file in files)
            with watched() as peak:
                engine.logits(list(range(64)))
                for _ in range(3):
                    engine.logits([5])
        high = memory("VmHWM")
    print(f"files {size / 1e6:,.0f} MB; peak of the process {high / 1e6:,.0f} MB, before the model")
    print(f"{begin / 1e6:,.0f} MB: {(high - begin) / size - 1:+.1%}; not in files {peak[0] / 1e6:,.0f} MB")


@contextmanager
def watched() -> Iterator[list[int]]:
    """Give a list of one number: the most memory of this process, files left out, while the block runs."""
    peak, done = [memory("RssAnon")], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], memory("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


def measure_quantizing(what: str, count: int) -> None:
    """Print the peak of memory while a model is quantized: layers of a sparse Nano, or Ultra's embedding."""
    if what == "nano":
        nano = releases.CONFIGS["nano"]
        cfg, recipe, values = replace(nano, layers=nano.layers[:count]), recipe_of("nano"), None
    else:
        cfg = replace(releases.CONFIGS["ultra"], layers="M", mtp_layers="", tie_word_embeddings=True)
        recipe, values = Recipe("embedding", {"embedding": "nvfp4"}), repeated
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "source", Path(folder) / "out"
        write_pieces(source, cfg.to_hf(), pieces(cfg, values))
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
        begin, started = memory("VmRSS"), time.perf_counter()
        with watched() as peak:
            quantize(source, out, recipe)
        size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    seconds = time.perf_counter() - started
    print(f"{size / 1e9:.1f} GB in {seconds:.0f} s; peak of the process {memory('VmHWM') / 1e6:,.0f} MB,")
    print(f"of which not in the files {peak[0] / 1e6:,.0f} MB; before the model {begin / 1e6:,.0f} MB")


def repeated(row: Tensor) -> np.ndarray:
    """Return normal numbers, of which a large matrix has the same few over and over."""
    some = np.random.default_rng(0).standard_normal(2**16, np.float32).astype(DTYPES[row.dtype])
    return np.resize(some, row.shape)


def measure_opening() -> None:
    """Print the least processor time of three openings of Nano's and Super's tensor lists."""
    for name, recipe, shards in (("nano", "nano", 5), ("super", "super", 17)):
        with tempfile.TemporaryDirectory() as folder:
            count, times = sparse(Path(folder), releases.CONFIGS[name], recipe, shards), []
            for _ in range(3):
                begin = time.process_time()
                Checkpoint.open(folder).close()
                times.append(time.process_time() - begin)
        print(f"{name}: {count:,} tensors, {min(times):.2f} s of processor time", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["memory"]:
        measure_memory(sys.argv[2] if len(sys.argv) > 2 else "numpy")
    elif sys.argv[1:2] in (["nano"], ["embedding"]):
        measure_quantizing(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 52)
    elif sys.argv[1:] == ["opening"]:
        measure_opening()
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 24)
