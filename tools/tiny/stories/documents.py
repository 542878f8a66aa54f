"""From documents to rows of token ids: encode, weigh, pack.

A row holds whole documents, each beginning where `first` is set; what is left over is padding of weight 0.
"""

import numpy as np

from . import chat, skills

END, PAD = 2, 0

# Skills first: recall in words, and keeping a cast; then the whole world.
_SKILLS = {"cast_lines": 6, "again": 3, "recall": 3, "copying": 2, "sums": 0.5, "counting": 0.5, "story": 2}
_WORLD = {
    "story": 6,
    "chat": 1.2,
    "about_story": 1.0,
    "recall": 1.2,
    "again": 0.6,
    "copying": 0.8,
    "sums": 0.25,
}
MIXES = {"skills": _SKILLS, "world": _WORLD | {"counting": 0.25, "cast_lines": 0.3}}
MAKERS = {"chat": chat.chat} | {kind: getattr(skills, kind) for kind in _SKILLS | {"about_story": 0}}


def document(rng, mix):
    """Draw a document's kind from a mix and make one: (kind, pieces)."""
    kinds, shares = zip(*MIXES[mix].items(), strict=True)
    kind = rng.choices(kinds, shares)[0]
    return kind, MAKERS[kind](rng)


def encode(tokenizer, pieces, end=True):
    """Pieces -> (ids, weights). A token takes the weight of the piece it ends in."""
    text = "".join(t for t, _ in pieces)
    edges = np.cumsum([len(t) for t, _ in pieces])
    weights = np.array([w for _, w in pieces])
    code = tokenizer.encode(text, add_special_tokens=False)
    last = np.array([stop for _, stop in code.offsets]) - 1
    out = weights[np.searchsorted(edges, last, side="right")]
    ids = np.array(code.ids)
    if end:
        ids, out = np.append(ids, END), np.append(out, 1.0)
    return ids, out


def pack(documents, length):
    """Fill rows of `length` first-fit from endless (ids, weights); yields (ids, first, weight)."""
    waiting = []
    while True:
        while len(waiting) < 48:
            ids, weight = next(documents)
            waiting.append((ids[:length], weight[:length]))
        row, first, weight, used = (
            np.full(length, PAD),
            np.zeros(length, bool),
            np.zeros(length, np.float32),
            0,
        )
        while True:
            pick = next((i for i, (ids, _) in enumerate(waiting) if len(ids) <= length - used), None)
            if pick is None:
                break
            ids, w = waiting.pop(pick)
            row[used : used + len(ids)], weight[used : used + len(ids)], first[used] = ids, w, True
            used += len(ids)
        if used < length:
            first[used] = True
        yield row, first, weight
