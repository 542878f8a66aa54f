"""Print the table of docs/gguf.md: the embedded model in each type, beside the original on 20 stories.

    python -m tools.write.gguf_table [SOURCE BIN]

With SOURCE and BIN (see tools/write/gguf_files.py) also the types of llama.cpp's quantizer.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from refengine.checkpoint import Checkpoint
from refengine.convert import KINDS, convert
from refengine.quantize import evaluate
from refengine.spec.tensors import parameters, table
from tools.write.gguf_files import TINY, converted, quantized

THEIRS = (
    "Q8_0", "Q6_K", "Q5_K_M", "Q5_1", "Q5_0", "Q4_K_M", "Q4_1", "IQ4_NL", "Q4_0", "MXFP4_MOE", "Q3_K_M",
    "Q2_K",
)  # fmt: skip


def files(folder: Path, llama: list[Path]) -> Iterator[tuple[str, str, Path]]:
    """Yield the type, the program and the path of each file."""
    for kind in KINDS[2:]:
        convert("tiny", folder / f"{kind}.gguf", kind)
        yield kind, "refengine", folder / f"{kind}.gguf"
    if llama:
        wide = converted(llama[0], TINY, folder / "wide.gguf", "f32")
        for kind in THEIRS:
            yield kind, "llama.cpp", quantized(llama[1], wide, folder / f"theirs-{kind}.gguf", kind)


def main(llama: list[Path]) -> None:
    """Print a row for each file."""
    print("| type | written by | bits an element | loss | KL | same top token |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for kind, program, path in files(Path(folder), llama):
            with Checkpoint.open(path) as checkpoint:
                elements = parameters(table(checkpoint.config))
                bits = 8 * sum(at.nbytes for at in checkpoint.stored.values())
            found = evaluate("tiny", path)
            numbers = f"{found['loss_after']:.4f} | {found['kl']:.5f} | {found['top1']:.1%}"
            print(f"| {kind} | {program} | {bits / elements:.2f} | {numbers} |", flush=True)


if __name__ == "__main__":
    main([Path(part) for part in sys.argv[1:3]])
