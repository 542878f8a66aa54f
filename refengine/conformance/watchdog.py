"""Rows of a report in another process: one that crashes or does not answer costs its row and no more."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
from dataclasses import asdict
from multiprocessing import get_context
from tempfile import TemporaryDirectory
from typing import Any

from refengine.backend import NAMES
from refengine.conformance.report import Plan, Result
from refengine.spec.config import InputError

LOADING = 120.0  # seconds to import a candidate and its library


def compute(connection, how: dict[str, Any], scratch: str) -> None:
    """Serve in the other process, until the first one has closed its end of the connection.

    What the candidate prints goes to stderr: stdout is the report's. What Hypothesis stores goes to the
    directory `scratch`, and not into the current one.
    """
    os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", scratch)
    with contextlib.suppress(OSError, ValueError):
        os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends this one
    with contextlib.suppress(EOFError, ConnectionError):
        serve(connection, how)


def serve(connection, how: dict[str, Any]) -> None:
    """Resolve a candidate, then answer each (operation, plan) with a row."""
    try:
        from refengine.conformance.candidate import resolve

        candidate = resolve(**how)
        importlib.import_module("refengine.conformance.strategies")  # now, in the time that loading may take
        about = {"dtype": str(candidate.dtype), "brought": candidate.brought, "notes": candidate.notes()}
        connection.send(("ready", about))
    except InputError as error:
        connection.send(("refused", str(error)))
        return
    except BaseException as error:  # SystemExit and KeyboardInterrupt, too, are the candidate's
        connection.send(("refused", f"{how['name']} {raised(error)}"))
        return
    from refengine.conformance.report import TELL, judged

    TELL.append(lambda case: connection.send(("trying", case)))
    while True:
        operation, plan = connection.recv()
        try:
            if operation == "determinism" and how["name"] in NAMES:
                candidate = resolve(**how, deterministic=True)
            row = judged(operation, candidate, Plan(**plan))
        except BaseException as error:
            row = Result(operation, "wrong", f"{how['name']} {raised(error)}")
        connection.send(("row", asdict(row)))


def raised(error: BaseException) -> str:
    """Return in a line what a candidate raised."""
    text = " ".join(str(error).split())
    return f"raised {type(error).__name__}: {text}" if text else f"raised {type(error).__name__}"


class Watchdog:
    """A process that computes rows, and is replaced when it crashes or takes `limit` seconds for a case."""

    def __init__(self, how: dict[str, Any], limit: float):
        self.how, self.limit = how, limit
        self.process: Any = None
        self.scratch: Any = None
        self.connection: Any = None
        self.dtype = ""
        self.brought: tuple[str, ...] = ()  # the verbs of the candidate
        self.notes: list[str] = []
        self.trying = ""

    def start(self) -> None:
        """Start the process; InputError where the candidate cannot be resolved."""
        context = get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.scratch = TemporaryDirectory(prefix="refengine-", ignore_cleanup_errors=True)
        given = (theirs, self.how, self.scratch.name)
        process = context.Process(target=compute, args=given, daemon=True)
        with hidden_main():
            process.start()
        self.process = process
        theirs.close()
        kind, what = self.answer(LOADING)
        if kind != "ready":
            self.close()
            raise InputError(what if kind == "refused" else f"{self.how['name']} cannot be loaded: {what}")
        self.dtype, self.brought, self.notes = (what[key] for key in ("dtype", "brought", "notes"))

    def judge(self, operation: str, plan: Plan) -> Result:
        """Return the row of an operation."""
        if self.process is None:
            self.start()
        self.trying = ""
        with contextlib.suppress(OSError):  # the process has ended, which `answer` returns
            self.connection.send((operation, asdict(plan)))
        kind, what = self.answer(self.limit)
        if kind == "row":
            return Result(**what)
        self.close()
        recorded = self.trying.startswith("recorded case") or not self.trying
        where = self.trying if recorded else self.trying.partition("(")[0].replace("_", " ")
        why = f"{where or 'before its first case'}: {what}"
        return Result(operation, "wrong", why, again="" if recorded else self.trying)

    def answer(self, limit: float) -> tuple[str, Any]:
        """Return what the process sends, or ("lost", a sentence) where it sends nothing."""
        try:
            while self.connection.poll(limit):
                kind, what = self.connection.recv()
                if kind != "trying":
                    return kind, what
                self.trying = what
            return "lost", f"no answer within {limit:g} seconds"
        except (EOFError, OSError):
            self.process.join(5)
            code = self.process.exitcode
            if code is not None and code < 0:
                with contextlib.suppress(ValueError):
                    return "lost", f"the process ended with signal {signal.Signals(-code).name}"
            return "lost", f"the process ended with code {code}"

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.join(5)
            self.connection.close()
            self.scratch.cleanup()
            self.process = None


@contextlib.contextmanager
def hidden_main():
    """Keep a process that is started from importing this one's main module, which may be any script."""
    main = sys.modules["__main__"]
    kept = {name: getattr(main, name) for name in ("__file__", "__spec__") if hasattr(main, name)}
    for name in kept:
        setattr(main, name, None)
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(main, name, value)
