"""From documents to rows of token ids: encode, weigh, pack.

A row holds whole documents, each beginning where `first` is set; what is left over is padding of weight 0.
"""

import numpy as np

from . import chat, skills

END, PAD = 2, 0

# Skills first: recall in words, and keeping a cast; then the whole world. Shares are of documents.
_SKILLS = {
    "cast_lines": 5, "again": 3, "recall": 3, "copying": 2, "sums": 1.5, "counting": 1, "running_count": 1,
    "story": 2, "about_story": 1, "chat": 2, "practice": 2,
}  # fmt: skip
_WORLD = {
    "story": 3.5, "chat": 4.0, "practice": 3.5, "about_story": 1.0, "recall": 1.0, "again": 0.3,
    "copying": 1.0, "sums": 0.5, "counting": 0.9, "running_count": 0.1, "cast_lines": 0.2,
}  # fmt: skip
MIXES = {"skills": _SKILLS, "world": _WORLD}
MAKERS = {"chat": chat.chat, "practice": chat.practice}
MAKERS |= {kind: getattr(skills, kind) for kind in _WORLD if kind not in MAKERS}
# Their pieces have their final weights; skills count twice.
WHOLE = ("story", "about_story", "chat", "practice", "cast_lines")


def document(rng, mix):
    """Draw a document's kind from a mix and make one: (kind, pieces)."""
    kinds, shares = zip(*MIXES[mix].items(), strict=True)
    kind = rng.choices(kinds, shares)[0]
    return kind, MAKERS[kind](rng)


def worth(kind):
    """Return the factor on the weights of a document of this kind."""
    return 1.0 if kind in WHOLE else 2.0


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
