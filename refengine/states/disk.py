"""Snapshots of prefixes in a directory, for later processes: whole states, one a file.

A file is named by the model's fingerprint, the layout version, the number of tokens and a digest of them.
Files of other names are left alone; one of such a name that is damaged is removed. Over the budget, the files
that were used longest ago are removed, and after an hour what killed processes have left of files.
"""

from __future__ import annotations

import os
import re
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from refengine.spec.config import Config, InputError
from refengine.states.file import VERSION
from refengine.states.state import State

NAME = re.compile(r"([0-9a-f]{16})-v([0-9]{1,4})-([0-9]{1,9})-([0-9a-f]{32})\.state")
PARTIAL = re.compile(rf"\.{NAME.pattern}\.[0-9]+\.[0-9a-f]{{8}}\.partial")  # of states.file.replace_file
ABANDONED = 3600  # seconds after its last write


@dataclass
class Disk:
    """Keeps states of prefixes in a directory, at most `budget` bytes.

    cfg: the configuration of the whole model, and `model` a function that returns its fingerprint. keys: a
    function that yields a digest of the first `end` tokens for each of some ends, which ascend. trouble: why
    nothing more is written, or an empty string.
    """

    directory: Path
    budget: int
    cfg: Config
    model: Callable[[], str]
    keys: Callable[[Sequence[int], Iterable[int]], Iterator[bytes]]
    trouble: str = ""

    def __post_init__(self):
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            probe = self.directory / f".probe-{os.getpid()}"
            probe.touch()
            probe.unlink(missing_ok=True)  # a process of another container may have the same id
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            raise InputError(f"{self.directory} cannot be a cache: {why}") from None

    def files(self) -> dict[tuple[int, str], Path]:
        """Return the files of this model by number and digest of tokens."""
        try:
            names = os.listdir(self.directory)
        except OSError:  # it has vanished
            return {}
        found = {name: NAME.fullmatch(name) for name in names}
        ours = self.model(), str(VERSION)
        return {
            (int(match[3]), match[4]): self.directory / name
            for name, match in found.items()
            if match and match.groups()[:2] == ours
        }

    def longest(self, ids: Sequence[int], more: int) -> State | None:
        """Return the state with the longest prefix of `ids` of more than `more` tokens, that is not all."""
        files = self.files()
        ends = sorted({end for end, _ in files if more < end < len(ids)})
        known = [(end, key.hex()) for end, key in zip(ends, self.keys(ids, ends), strict=True)]
        for at in reversed(known):
            if (path := files.get(at)) and (state := self.read(path, list(ids[: at[0]]))):
                return state
        return None

    def read(self, path: Path, ids: list[int]) -> State | None:
        """Return the state in a file, or None; a file that can be read and has no such state is removed."""
        model = self.model()
        try:
            state = State.load(path)
            state.check(model, self.cfg)
            if list(state.ids) == ids and state.position == len(ids):
                with suppress(OSError):  # the file is of another user
                    os.utime(path)
                return state
        except OSError:
            return None
        except InputError as error:
            if isinstance(error.__context__, OSError):  # what the file holds is not known
                return None
        with suppress(OSError):
            path.unlink()
        return None

    def keep(self, state: State) -> None:
        """Keep the state of a prefix, all of which has been read, and make room for it."""
        if self.trouble or state.nbytes > self.budget:
            return
        (key,) = self.keys(state.ids, [state.position])
        try:
            state.save(self.directory / f"{state.model}-v{VERSION}-{state.position}-{key.hex()}.state")
            self.shrink()
        except (InputError, OSError) as error:
            self.trouble = str(error)

    def holds(self, ids: Sequence[int]) -> bool:
        """Return whether there is a file of the state after these tokens."""
        (key,) = self.keys(ids, [len(ids)])
        return (len(ids), key.hex()) in self.files()

    def shrink(self) -> None:
        """Remove the files that were used longest ago, of any model, until the rest is within the budget.

        Also removes what processes that were killed have left of files.
        """
        sizes = []
        for name in os.listdir(self.directory):
            if PARTIAL.fullmatch(name):
                with suppress(OSError):
                    if time.time() - os.stat(self.directory / name).st_mtime > ABANDONED:
                        os.unlink(self.directory / name)
            if NAME.fullmatch(name):
                with suppress(FileNotFoundError):  # another process has removed it
                    at = os.stat(self.directory / name)
                    if stat.S_ISREG(at.st_mode):
                        sizes.append((at.st_mtime_ns, at.st_size, self.directory / name))
        total = sum(size for _, size, _ in sizes)
        for _, size, path in sorted(sizes):
            if total <= self.budget:
                return
            path.unlink(missing_ok=True)
            total -= size
