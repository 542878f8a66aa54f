"""Run refengine with a fault in one rank: python faulty_rank.py RANK WHEN WHAT ARGUMENT...

WHEN    start: before anything is imported; meet: before the connection; load, prefill, decode: in the
        midst of it; request: before the first broadcast; end: when all is done; leave: before the end of
        the connection; exit: after it, while Python exits; all_reduce, all_gather, reduce_scatter, send,
        receive, broadcast, share, compare: in that exchange
WHAT    kill: it dies; vanish: it dies, and the launcher sees that only when the others have ended; stop:
        it is stopped; OSError, MemoryError: this is raised; dawdle: it is slow with nine tensors (load) or
        two layers (prefill, decode), for longer than the timeout together, but not each

WHEN    WHAT
says    options that come after those of the other ranks
is      another version of refengine
lacks   a module that cannot be imported
draws   nan: its logits are no numbers
"""

import atexit
import os
import signal
import sys
import time
from functools import wraps
from pathlib import Path

NTH = {
    "load": 9,
    "prefill": 1,
    "decode": 5,
    "all_reduce": 30,
    "all_gather": 3,
    "reduce_scatter": 3,
    "send": 4,
    "receive": 4,
    "broadcast": 2,
    "share": 3,
    "compare": 1,
}


def fail(what: str) -> None:
    """Make this process fail in the way that `what` names."""
    launcher, here = os.getppid(), os.getpid()
    if what == "vanish":
        os.kill(launcher, signal.SIGSTOP)
        when_others_have_ended(launcher, signal.SIGCONT)
    if what == "stop" and "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun itself would kill it after 30 s
        when_others_have_ended(here, signal.SIGKILL)
    if what in ("kill", "vanish"):
        os.kill(here, signal.SIGKILL)
    elif what == "stop":
        os.kill(here, signal.SIGSTOP)
    elif what == "MemoryError":
        raise MemoryError
    else:
        raise OSError(28, "No space left on device")


def when_others_have_ended(pid: int, sign: int) -> None:
    """Send a signal to a process once all other ranks of this host have ended."""
    launcher, here = os.getppid(), str(os.getpid())
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    if os.fork():
        return
    os.closerange(0, 1024)  # close every connection of the dead process
    while any(state(child) not in "ZX" for child in children if child != here):
        time.sleep(0.05)
    os.kill(pid, sign)
    os._exit(0)


def state(pid: str) -> str:
    """Return the state letter of a process, "X" if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def slowly(plain, pauses: list[float], when=lambda *args: True):
    """Return a function whose first calls for which `when` holds are delayed, each by one of the pauses."""

    @wraps(plain)
    def dawdling(*args, **how):
        if pauses and when(*args):
            time.sleep(pauses.pop())
        return plain(*args, **how)

    return dawdling


def before(owner: type, verb: str, nth: int, what: str, when=lambda self, *args: True) -> None:
    """Make the nth call of a method for which `when` holds fail before it does anything."""
    plain, calls = getattr(owner, verb), []

    @wraps(plain)
    def faulty(self, *args, **how):
        if when(self, *args):
            calls.append(1)
            if len(calls) == nth:
                fail(what)
        return plain(self, *args, **how)

    setattr(owner, verb, faulty)


def connection() -> type:
    """Return the class of connection that the launcher of this process selects."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        from refengine.ranks.comm.torch_distributed import TorchDistributed as Connection
    else:
        from refengine.ranks.comm.mpi import MPI as Connection
    return Connection


def plant(when: str, what: str, args: list[str]) -> list[str]:
    """Plant a fault in this process, and return the arguments for refengine."""
    if when == "start":
        fail(what)
    elif when == "says":
        return [*args, *what.split()]
    elif when == "lacks":
        sys.modules[what] = None
    elif when == "is":
        import refengine

        refengine.__version__ = what
    elif when == "draws":
        import numpy as np

        from refengine.ranks.runner import RankRunner

        plain = RankRunner.head
        RankRunner.head = lambda *args: plain(*args) * np.float32(what)
    elif when == "exit":
        atexit.register(fail, what)
    elif when in ("meet", "request", "end", "leave"):
        verb = {"meet": "__init__", "request": "broadcast", "end": "finish", "leave": "leave"}[when]
        before(connection(), verb, 1, what)
    elif (when, what) == ("load", "dawdle"):
        from refengine.checkpoint import Checkpoint

        Checkpoint.read = slowly(Checkpoint.read, [1.0] * 9)
    elif when == "load":
        from refengine.checkpoint import Checkpoint

        before(Checkpoint, "read", NTH[when], what)
    elif when in ("prefill", "decode"):
        from refengine.ranks.runner import RankRunner
        from refengine.spec import model

        long = {"prefill": lambda x: x.shape[1] > 1, "decode": lambda x: x.shape[1] == 1}[when]
        if what == "dawdle":
            pauses = [0.6 * float(args[args.index("--timeout") + 1])] * 2
            model.MIXERS = {
                kind: slowly(mixer, pauses, lambda h, *_: long(h)) for kind, mixer in model.MIXERS.items()
            }
        else:
            before(RankRunner, "blocks", NTH[when], what, lambda self, ids, *_: long(ids))
    elif when == "send":
        before(connection(), "post", NTH[when], what)
    else:
        before(connection(), "exchange", NTH[when], what, lambda self, *_: self.verb == when)
    return args


def main() -> None:
    """Plant the fault in its rank, and run refengine."""
    rank, when, what, *args = sys.argv[1:]
    here = os.environ.get("PMI_RANK") or os.environ["RANK"]
    if rank in (here, "all"):
        args = plant(when, what, args)
    from refengine.cli import main as run

    run(args)


if __name__ == "__main__":
    main()
