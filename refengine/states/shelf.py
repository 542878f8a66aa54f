"""The snapshots that one process keeps, by name: the states of its layers at one position of a sequence."""

from __future__ import annotations

from dataclasses import dataclass, field

from refengine.states.arrays import Arrays, is_key, joined


@dataclass
class Shelf:
    """Holds arrays by name. Keys and values of a long sequence lie under several names, one stretch each."""

    kept: dict[int, Arrays] = field(default_factory=dict)

    def put(self, name: int, arrays: Arrays) -> tuple[int, int]:
        """Keep arrays under a name beside those it has; return the bytes of keys and values, and the rest."""
        self.kept[name] = arrays | self.kept.get(name, {})
        sizes = [0, 0]
        for key, a in self.kept[name].items():
            sizes[not is_key(key)] += a.nbytes
        return sizes[0], sizes[1]

    def chain(self, names: list[int]) -> Arrays:
        """Return the arrays of a sequence whose stretches lie under these names, the last one last."""
        return joined([self.kept[name] for name in names])

    def forget(self, names: list[int], points: list[int]) -> None:
        """Forget all that is kept under `names`, and all but keys and values under `points`."""
        for name in points:
            self.kept[name] = {key: a for key, a in self.kept[name].items() if is_key(key)}
        for name in names:
            self.kept.pop(name, None)
