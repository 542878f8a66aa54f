"""List the resources of every CUDA kernel, on every architecture, without a GPU.

    python -m tools.cuda.resources            print the page
    python -m tools.cuda.resources --write    write it to docs/cuda_resources.md
    python -m tools.cuda.resources --check    one sentence for each spill, each excess, each line that drifted

A spill is a register kept in memory for want of room. The largest block that a released model asks for
(tools/cuda/paper.py) may not exceed what a multiprocessor has.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from refengine.spec.config import InputError
from tools.cuda.compile import SHARED, Use, all_uses, nvrtc_version
from tools.cuda.paper import Block, largest_blocks

PAGE = Path(__file__).resolve().parents[2] / "docs" / "cuda_resources.md"
REGISTERS, THREADS = 1 << 16, 1024  # of a block, on all of them
HEAD = """# What the CUDA kernels take

Written by `python -m tools.cuda.resources --write` with NVRTC {version}. The test run compiles again and
fails on any other number, on a spill, and on a block that no multiprocessor could hold ([how](cuda.md)).

Bound: the most threads a block may have (`__launch_bounds__`). Block: the most it has in a released model,
if it is launched there. Static and dynamic: bytes of shared memory of that block. Stack and spills: bytes of
a thread. Registers: of a thread. One number holds for all architectures; four are those of
{archs}.

| file | kernel | build | bound | block | static | dynamic | stack | spills | registers |
|---|---|---|---|---|---|---|---|---|---|
"""
Blocks = dict[tuple[str, str, str], Block]  # by file, kernel, build


def lines(found: list[Use], blocks: Blocks) -> list[str]:
    """Return the table's lines."""
    rows: dict[tuple[str, str, str], list[Use]] = {}
    for use in found:
        rows.setdefault((use.file, use.kernel, use.build), []).append(use)
    return ["| " + " | ".join([*key, *cells(rows[key], blocks.get(key))]) + " |" for key in sorted(rows)]


def cells(row: list[Use], block: Block | None) -> list[str]:
    """Return the cells of one kernel and build, over all architectures."""

    def on_each(name):
        values = [str(getattr(use, name)) for use in row]
        return values[0] if len(set(values)) == 1 else " / ".join(values)

    threads, dynamic = ("", "") if block is None else map(str, block)
    bound = "" if row[0].bound is None else str(row[0].bound)
    rest = map(on_each, ("stack", "spills", "registers"))
    return [bound, threads, on_each("shared"), dynamic, *rest]


def page(found: list[Use], blocks: Blocks) -> str:
    """Return the text of docs/cuda_resources.md."""
    head = HEAD.format(version=nvrtc_version(), archs=" / ".join(SHARED))
    return head + "".join(f"{line}\n" for line in lines(found, blocks))


def excesses(found: list[Use], blocks: Blocks):
    """Return a sentence for each spill and each block that does not fit."""
    for use in found:
        block = blocks.get((use.file, use.kernel, use.build)) or Block(use.bound or THREADS, 0)
        registers = (use.registers + 7) // 8 * 8 * block.threads  # handed out eight a thread
        shared = use.shared + block.shared
        if use.spills:
            yield f"{use} spills {use.spills} bytes of registers into memory"
        if use.bound and block.threads > use.bound:
            yield f"{use} is launched with {block.threads} threads, and compiled for {use.bound}"
        if registers > REGISTERS:
            yield f"{use} takes {registers} registers for {block.threads} threads; a block has {REGISTERS}"
        if shared > SHARED[use.arch]:
            yield f"{use} takes {shared} bytes of shared memory; a block has {SHARED[use.arch]}"


def drift(found: list[Use], blocks: Blocks, text: str):
    """Return a sentence for each line of the page that the compiler no longer gives."""
    written = [line for line in text.splitlines() if line.startswith("| ")][1:]
    said = lines(found, blocks)
    yield from (f"docs/cuda_resources.md lacks: {line}" for line in said if line not in written)
    yield from (
        f"docs/cuda_resources.md says, and the compiler does not: {line}"
        for line in written
        if line not in said
    )


def faults(text: str, cache: Path | None = None) -> list[str]:
    """Return all faults; the page is only compared with the version of the compiler that wrote it."""
    (found, broken), blocks = all_uses(cache=cache), largest_blocks()
    drifted = list(drift(found, blocks, text))
    if text and f"with NVRTC {nvrtc_version()}." not in text:
        drifted = [f"docs/cuda_resources.md was not written with NVRTC {nvrtc_version()}, which is installed"]
    return [*broken, *excesses(found, blocks), *drifted]


def main(arguments=None) -> int:
    """Print, write or check the page, and return the exit status."""
    parser = argparse.ArgumentParser("python -m tools.cuda.resources", description=__doc__.split("\n")[0])
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--write", action="store_true", help="write docs/cuda_resources.md")
    choice.add_argument("--check", action="store_true", help="fail on a spill, an excess, a drifted line")
    options = parser.parse_args(arguments)
    try:
        if options.check:
            wrong = faults(PAGE.read_text() if PAGE.exists() else "")
            print("\n".join(wrong) or "no kernel spills, exceeds a limit, or differs from the page")
            return 1 if wrong else 0
        found, broken = all_uses()
    except InputError as error:
        sys.exit(str(error))
    if broken:
        sys.exit("\n".join(broken))
    if options.write:
        PAGE.write_text(page(found, largest_blocks()))
    else:
        print(page(found, largest_blocks()), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
