"""Run a library of compiled loops on random small models, and compare each with the definition in float64.

    python -m tests.backends.cpu.loops LIBRARY COUNT THREADS
    python -m tests.backends.cpu.loops LIBRARY overflow|race    a planted fault that a sanitizer must report

It imports only NumPy and ml_dtypes, so that it also runs on an emulated processor.
"""

from __future__ import annotations

import ctypes
import hashlib
import sys
import threading
from ctypes import addressof
from pathlib import Path

import numpy as np

from refengine.backends.cpu import build, cpu_backend, native
from refengine.backends.cpu.arrays import address, matrix
from refengine.backends.cpu.interface import declared
from refengine.conformance.cases import MENUS, Case
from refengine.conformance.truth import agree_with_truth
from refengine.spec.model import Model

DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


def library(folder: Path, compiler: str, *flags: str) -> Path:
    """Return the loops compiled with these flags, from `folder` if a former run kept them there."""
    parts = [compiler, *build.FLAGS, *flags, *(path.read_text() for path in sorted(build.KERNELS.iterdir()))]
    path = folder / f"{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}.so"
    if not path.exists():
        for old in folder.glob("*.so"):
            old.unlink()
        build.PATIENCE = 3600  # with a sanitizer a file takes minutes
        build.compiled(compiler, flags, path)
    return path


def case_of(number: int, wide: bool) -> Case:
    """Return a random case; a wide case has enough work in each call for several threads."""
    rng = np.random.default_rng(number)

    def one(menu):
        return menu[rng.integers(len(menu))]

    sizes = {name: one(menu) for name, menu in MENUS.items()}
    if wide:
        sizes |= {"hidden_size": int(rng.integers(100, 700)), "moe_latent_size": one((None, 97, 333))}
        sizes |= {"head_dim": one((31, 64)), "mamba_head_dim": one((33, 64)), "ssm_state_size": one((31, 64))}
    elif rng.random() < 0.1:
        sizes["hidden_size"] = int(rng.integers(300, 1400))
    layers = "".join(one("M*E-") for _ in range(rng.integers(1, 5)))
    batch, length = (int(rng.integers(1, most)) for most in (5, 90))
    return Case(layers=layers, seed=number, batch=batch, length=length, disk=one([*DTYPES]), **sizes)


def run(number: int, threads: int) -> None:
    """Read a prompt in two parts, then two more positions by steps or by a recorded call.

    Compare with the definition. The last call is recorded, with ragged rows, and a part of it is committed.
    """
    case = case_of(number, threads > 1)
    here = cpu_backend(DTYPES[case.disk], threads, steady=number % 3 == 0, kv="float32")
    m = Model.build(case.cfg, case.read, here)
    states, steps = m.new_states(case.batch), max(0, case.length - 2)
    logits = []
    for part in (slice(0, steps // 2), slice(steps // 2, steps)):
        if part.start < part.stop:
            h, states = m.blocks(m.embed(case.ids[:, part]), states)
            logits.append(m.head(h))
    rest = case.ids[:, steps:]
    if number % 4 < 2 and (found := m.backend.verify(m, rest.tolist(), states)):
        logits.append(np.stack(found[0]))
        states, steps = found[2](states, [rest.shape[1]] * case.batch), case.length
    for t in range(steps, case.length):
        found, states = m.backend.step(m, case.ids[:, t], states)
        logits.append(found[:, None])
    for row, found in enumerate(np.concatenate(logits, axis=1)):
        agree_with_truth(case, row, found, np.dtype(np.float32))
    if number % 2:  # rows of different lengths
        m.blocks(m.embed(case.ids), m.new_states(case.batch), case.lengths)
        rows = [ids[: 1 + (number + i) % 7].tolist() for i, ids in enumerate(case.ids)]
        _, _, record = m.backend.verify(m, rows, states)
        m.backend.step(
            m, case.ids[:, 0], record(states, [(number + i) % (1 + len(r)) for i, r in enumerate(rows)])
        )


def overflow(built) -> None:
    """Read a row beyond the end of an array."""
    x, how = np.ones((3, 40), np.float32), cpu_backend().step.run
    y = np.empty((4, 40), np.float32)
    built.rms_norm(address(x), None, address(x), 1e-5, address(y), address(x), 4, 40, addressof(how))


def race(built) -> None:
    """Write one array from two threads at once."""
    x, w, y = (np.ones((400, 400), np.float32) for _ in range(3))
    how, of = cpu_backend(threads=2).step.run, matrix(w)

    def product():
        built.linear(addressof(of), 400, 400, address(x), 400, address(y), 400, addressof(how))

    threads = [threading.Thread(target=product) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def main(path: str, what: str, threads: str = "1") -> None:
    """Load the library in place of the one of this machine, and run it."""
    built = declared(ctypes.CDLL(path))
    native.load = lambda: built
    if what in ("overflow", "race"):
        return {"overflow": overflow, "race": race}[what](built)
    for number in range(int(what)):
        run(number, int(threads))


if __name__ == "__main__":
    main(*sys.argv[1:])
