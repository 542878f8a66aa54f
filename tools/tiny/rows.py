"""Make the rows of tokens that the embedded model is trained on, and the weight of each token.

batch(rows) -> ids [rows length], first [rows length]: a document begins here, weight [rows length]
"""

import hashlib
import random

import numpy as np

from .stories import documents, words


class Pairs:
    """Rows of symbols that train recall in every token; `weight` is 1 where the token can be predicted.

    Of eight rows two hold `count` (name, thing) pairs, then the names again, each with its thing; two hold
    pairs of any symbols; one holds 2 * `count` symbols again and again in the same order (copying); three
    hold random words, among them one or two names, each after its own verbs. With `names_only` all rows are
    of the first kind: a model with random weights learns to look a name up much sooner from them alone.
    """

    VERBS = "said asked cried thought whispered shouted called and but for when with hugged".split()  # noqa: SIM905

    def __init__(self, tokenizer, seed, length=64):
        self.rng, self.length = np.random.default_rng(seed), length
        self.count, self.names_only = 2, False

        def ids(some):
            found = [tokenizer.token_to_id("Ġ" + w) for w in some]
            return np.array([i for i in found if i is not None])

        self.keys, self.values, self.verbs = ids(words.NAMES), ids(words.THINGS), ids(self.VERBS)
        self.symbols = ids(sorted({w for some in words.SLOTS.values() for w in some}))
        self.fillers = np.array([i for t, i in sorted(tokenizer.get_vocab().items()) if t.startswith("Ġ")])

    def batch(self, rows):
        """Return (ids, first, weight) of `rows` rows."""
        ids = np.zeros((rows, self.length), np.int64)
        weight = np.zeros((rows, self.length), np.float32)
        for r in range(rows):
            kind = 0 if self.names_only else r % 4
            if kind == 3 and r % 8 == 3:
                size = 2 * self.count
                ids[r] = np.resize(self.rng.permutation(self.symbols)[:size], self.length)
                weight[r, size + 1 :] = 1
                continue
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
        """Fill one row in place: fillers, and at random places a verb followed by its name."""
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


def seeded(*numbers):
    """Return a seed for `random` and NumPy that differs for every tuple of numbers."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:8], "little")


class Rows:
    """The rows of every step. They depend only on (seed, rank, step), so a resumed run reads the same rows.

    Documents are drawn and packed for BLOCK steps at a time; documents that do not fit are dropped.
    """

    BLOCK = 32

    def __init__(self, tokenizer, seed, rank, tokens, length):
        self.tokenizer, self.seed, self.rank, self.tokens, self.length = tokenizer, seed, rank, tokens, length
        self.at, self.rows = None, []

    def dense(self, step, count, names_only=False):
        """Return the dense rows of a step, with `count` pairs (None: a random count)."""
        seed = seeded(self.seed, self.rank, "dense", step)
        source = Pairs(self.tokenizer, seed)
        source.count, source.names_only = count or (2, 4, 8)[seed % 3], names_only
        return source.batch(self.tokens // source.length)

    def documents(self, step, share):
        """Return the packed rows of a step; `share` of the documents come from the skills mix."""
        block, index = divmod(step, self.BLOCK)
        each = self.tokens // self.length
        if self.at != (block, share):
            rng = random.Random(seeded(self.seed, self.rank, "documents", block))
            packed = documents.pack(self._endless(rng, share), self.length)
            self.at, self.rows = (block, share), [next(packed) for _ in range(each * self.BLOCK)]
        return tuple(
            np.stack(part) for part in zip(*self.rows[index * each : (index + 1) * each], strict=True)
        )

    def _endless(self, rng, share):
        while True:
            kind, pieces = documents.document(rng, "skills" if rng.random() < share else "world")
            ids, weight = documents.encode(self.tokenizer, pieces)
            yield ids, weight * documents.worth(kind)
