"""What the embedded model reads while it is trained: rows of tokens, and what each token is worth.

batch(rows) -> ids [rows length], first [rows length]: a document begins here, weight [rows length]
"""

import random

import numpy as np

from .stories import documents, words


class Pairs:
    """Rows of symbols, the densest practice of recall; `weight` marks what can be known.

    A quarter of the rows: `count` (name, thing) pairs, then the names again, each with its thing. A quarter:
    pairs of any symbols. Half: random words, among them one or two names, each after its own verbs.
    """

    VERBS = "said asked cried thought whispered shouted called and but for when with hugged".split()  # noqa: SIM905

    def __init__(self, tokenizer, seed, length=64):
        self.rng, self.length, self.count = np.random.default_rng(seed), length, 2

        def ids(some):
            found = [tokenizer.token_to_id("Ġ" + w) for w in some]
            return np.array([i for i in found if i is not None])

        self.keys, self.values, self.verbs = ids(words.NAMES), ids(words.THINGS), ids(self.VERBS)
        self.symbols = ids(sorted({w for some in words.SLOTS.values() for w in some}))
        self.fillers = np.array([i for t, i in sorted(tokenizer.get_vocab().items()) if t.startswith("Ġ")])

    def batch(self, rows):
        ids = np.zeros((rows, self.length), np.int64)
        weight = np.zeros((rows, self.length), np.float32)
        for r in range(rows):
            kind = r % 4
            if kind >= 2:
                self._talk(ids[r], weight[r])
                continue
            if kind == 0:
                keys, values = (self.rng.permutation(s)[: self.count] for s in (self.keys, self.values))
            else:
                keys, values = self.rng.permutation(self.symbols)[: 2 * self.count].reshape(2, -1)
            asked = [self.rng.permutation(self.count) for _ in range(self.length // (2 * self.count))]
            order = np.concatenate([np.arange(self.count), *asked])[: self.length // 2]
            ids[r, 0::2], ids[r, 1::2] = keys[order], values[order]
            weight[r, 2 * self.count + 1 :: 2] = 1
        first = np.zeros((rows, self.length), bool)
        first[:, 0] = True
        return ids, first, weight

    def _talk(self, ids, weight):
        """Fill one row: fillers, and now and then a verb with the name that belongs to it."""
        ids[:] = self.rng.choice(self.fillers, self.length)
        names = self.rng.permutation(self.keys)[: self.rng.integers(1, 3)]
        verbs = self.rng.permutation(self.verbs)
        at, seen = int(self.rng.integers(0, 4)), set()
        while at + 1 < self.length:
            k = int(self.rng.integers(len(verbs)))
            name = names[k % len(names)]
            ids[at], ids[at + 1] = verbs[k], name
            weight[at + 1] = float(name in seen and (len(names) == 1 or (k, name) in seen))
            seen |= {name, (k, name)}
            at += 2 + int(self.rng.integers(0, 3)) * int(self.rng.random() < 0.5)


class Mixed:
    """Packed rows of documents, a share of them from the `skills` mix."""

    def __init__(self, tokenizer, seed, length):
        self.rng, self.tokenizer, self.share = random.Random(seed), tokenizer, 1.0
        self.rows = documents.pack(self._documents(), length)

    def _documents(self):
        while True:
            mix = "skills" if self.rng.random() < self.share else "world"
            kind, pieces = documents.document(self.rng, mix)
            ids, weight = documents.encode(self.tokenizer, pieces)
            yield ids, weight * (2.0 if kind not in ("story", "about_story", "chat", "cast_lines") else 1.0)

    def batch(self, rows):
        return tuple(np.stack(part) for part in zip(*(next(self.rows) for _ in range(rows)), strict=True))
