"""Compute bounds of the CUDA kernels: bytes and operations of each at a released model's shapes.

    python -m tools.cuda.roofline            print the tables
    python -m tools.cuda.roofline --write    put them into docs/cuda.md, between its two marks

Every number of bytes comes from the tensor table and the configuration (tools/cuda/work.py), the figures
of devices from their data sheets; the share of these that a kernel reaches is assumed until a GPU has
measured it.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from refengine.spec.config import Config
from refengine.spec.tensors import parameters
from tools.cuda.call import ACTIVATION, Work, cache_bytes, state_bytes, trunk
from tools.cuda.work import work
from tools.releases import CONFIGS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "cuda.md"
START, END = "<!-- roofline -->\n", "<!-- /roofline -->"

GAP = 3e-6  # seconds from a kernel's end to the next one's working: launch from a graph, filling, emptying
MEMORY_SHARE = 0.85  # of the bandwidth
SHARES = {"cuBLAS": 0.7, "mma": 0.5, "float32": 0.5}  # of what the unit can do
FREE = 0.1  # of the memory is kept for work space


STEPS = {  # sequences, new positions of each, positions before
    "A step of one sequence after 4,096 tokens": (1, 1, 4096),
    "A step of 64 sequences after 4,096 tokens": (64, 1, 4096),
    "A prompt of 4,096 tokens": (1, 4096, 0),
    "A prompt of 32,768 tokens": (1, 32768, 0),
}


class Device(NamedTuple):
    """A data sheet, dense. `mma`: the part of bf16 that mma.sync reaches; the rest is for newer code."""

    name: str
    memory: float  # bytes
    bandwidth: float  # bytes a second
    bf16: float  # operations a second, of matrix units
    float32: float  # operations a second, of the others
    mma: float

    def limit(self, item: Work) -> float:
        """Return the seconds of one call that no kernel can beat."""
        return max(item.bytes / self.bandwidth, item.flops / self.peak(item))

    def peak(self, item: Work) -> float:
        """Return the operations a second of the item's unit."""
        return self.float32 if item.unit == "float32" else self.bf16

    def expected(self, item: Work) -> float:
        """Return the seconds of one call under the assumptions."""
        reachable = self.peak(item) * SHARES[item.unit] * (self.mma if item.unit == "mma" else 1)
        working = max(item.bytes / (self.bandwidth * MEMORY_SHARE), item.flops / reachable)
        return item.launches * GAP + working


DEVICES = (
    Device("H100", 80e9, 3.35e12, 989e12, 67e12, mma=0.62),
    Device("B200", 180e9, 7.7e12, 2250e12, 75e12, mma=0.25),
)


class Total(NamedTuple):
    """A whole step on one device: seconds."""

    held: float  # at full bandwidth, with nothing but weights, states, keys and values
    limit: float  # every kernel at its own limit
    expected: float


def total(device: Device, items: list[Work]) -> Total:
    """Return the seconds of all items on one device."""

    def summed(of):
        return sum(item.calls * of(item) for item in items)

    held = summed(lambda item: item.held) / device.bandwidth
    return Total(held, summed(device.limit), summed(device.expected))


def needed(cfg: Config, batch: int, context: int) -> float:
    """Return the bytes of memory: all weights, and the states of `batch` sequences."""
    return parameters(trunk(cfg)) * ACTIVATION + batch * (state_bytes(cfg) + context * cache_bytes(cfg))


def decode_table(cfg: Config, batches=(1, 8, 64), contexts=(4096, 262144)) -> str:
    """Return the table of decoding, in tokens a second."""
    rows = []
    for context in contexts:
        for batch in batches:
            items = work(cfg, batch, 1, context)
            row = [
                f"{context:,}",
                batch,
                f"{sum(i.calls * i.bytes for i in items) / 1e9:.2f}",
                sum(i.calls * i.launches for i in items),
            ]
            for device in DEVICES:
                if needed(cfg, batch, context) > (1 - FREE) * device.memory:
                    row += [f"{needed(cfg, batch, context) / 1e9:.0f} GB do not fit", "", ""]
                    continue
                t = total(device, items)
                row += [f"{batch / t.held:,.0f}", f"{batch / t.expected:,.0f}", f"{t.held / t.expected:.0%}"]
            rows.append(row)
    head = ["context", "batch", "GB a step", "kernels"]
    for device in DEVICES:
        head += [f"{device.name}: bandwidth limit", "expected", "share"]
    return markdown(head, rows)


def prefill_table(cfg: Config, lengths=(512, 4096, 32768)) -> str:
    """Return the table of reading a prompt, in tokens a second."""
    rows = []
    for length in lengths:
        items = work(cfg, 1, length, 0)
        row = [f"{length:,}", f"{sum(i.calls * i.flops for i in items) / 1e12:.1f}"]
        for device in DEVICES:
            t = total(device, items)
            row += [f"{length / t.limit:,.0f}", f"{length / t.expected:,.0f}", f"{t.limit / t.expected:.0%}"]
        rows.append(row)
    head = ["prompt", "TFLOP"]
    for device in DEVICES:
        head += [f"{device.name}: limit", "expected", "share"]
    return markdown(head, rows)


def kernel_table(items: list[Work]) -> str:
    """Return a line for each kernel: one call of it."""
    rows = []
    for item in items:
        row = [item.kernel, item.what, item.calls, number(item.bytes / 1e6), number(item.flops / 1e9)]
        for device in DEVICES:
            limit, expected = device.limit(item), device.expected(item)
            by = "memory" if item.bytes / device.bandwidth == limit else "operations"
            row += [f"{number(limit * 1e6)} ({by})", number(expected * 1e6), f"{limit / expected:.0%}"]
        rows.append(row)
    head = ["kernel", "what", "calls", "MB", "GFLOP"]
    for device in DEVICES:
        head += [f"{device.name}: limit µs", "expected µs", "share"]
    return markdown(head, rows)


def number(x: float) -> str:
    """Return a number with three digits, at most two of them after the point."""
    return f"{x:.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.2f}"


def markdown(head: list[str], rows: list[list]) -> str:
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def time_table(cfg: Config) -> str:
    """Return the table of expected times: gaps between kernels, and the kernels that take most."""
    rows = []
    for title, step in STEPS.items():
        items = work(cfg, *step)
        for device in DEVICES:
            parts = Counter({"gaps": sum(i.calls * i.launches for i in items) * GAP})
            for item in items:
                parts[item.kernel] += item.calls * (device.expected(item) - item.launches * GAP)
            whole = sum(parts.values())
            most = [f"{name} {part / whole:.0%}" for name, part in parts.most_common(6) if part > whole / 100]
            rows.append([title, device.name, number(whole * 1e3), ", ".join(most)])
    return markdown(["", "device", "expected ms", "of which"], rows)


def tables(cfg: Config = CONFIGS["nano"]) -> str:
    """Return all tables of the page."""
    parts = [
        ("Decoding: tokens/s", decode_table(cfg)),
        ("Reading a prompt: tokens/s", prefill_table(cfg)),
        ("Where the time would go", time_table(cfg)),
    ]
    for title, step in [*STEPS.items()][:-1]:
        parts += [(f"{title}, kernel by kernel", kernel_table(work(cfg, *step)))]
    return "\n".join(f"**{title}**\n\n{text}" for title, text in parts)


def main(arguments=None) -> int:
    """Print the tables, or write them into docs/cuda.md."""
    parser = argparse.ArgumentParser("python -m tools.cuda.roofline", description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="put the tables into docs/cuda.md")
    if parser.parse_args(arguments).write:
        before, rest = PAGE.read_text().split(START)
        PAGE.write_text(before + START + "\n" + tables() + "\n" + END + rest.split(END)[1])
    else:
        print(tables(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
