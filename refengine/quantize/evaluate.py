"""Evaluate a quantized copy: the distance between its distributions and those of the original.

Both models read the same pieces of text, each from its beginning, on the NumPy backend. The loss is the mean
negative log-probability of the next token; KL is that of the copy's distribution from the original's; both in
nats a token. Top-1 is how often the most likely token is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from refengine.backend import fits
from refengine.progress import progress
from refengine.quantize.texts import TEXTS
from refengine.spec.config import Config, InputError
from refengine.spec.sample import log_probs

PIECE = 256  # tokens of a piece; its distributions in float64 take 268 MB where a vocabulary has 131,072
MOST = 4096  # tokens that are read


def can_evaluate(cfg: Config) -> bool:
    """Return whether the original, in float32, takes at most half of the memory that is free."""
    return fits(cfg, "float32")


def evaluate(
    model: str | Path, copy: str | Path, texts: Sequence[str] = TEXTS, piece: int = PIECE
) -> dict[str, float]:
    """Return {"tokens", "loss_before", "loss_after", "kl", "top1"} of a copy; "tokens" are those predicted.

    The first MOST tokens are read, in pieces of at most `piece`. The default texts are 20 stories like those
    that the embedded model was trained on. Raises InputError for a model without a tokenizer, and where there
    are fewer than two tokens.
    """
    import refengine

    counts: list[int] = []
    sums = np.zeros(4)
    with refengine.load(model) as before, refengine.load(copy) as after:
        cut = pieces([before.tokenizer.encode(text) for text in texts], piece)
        with progress("evaluating", sum(map(len, cut)), "token") as bar:
            for ids in cut:
                if len(ids) > 1:
                    counts.append(len(ids) - 1)
                    p, q = (log_probs(each.logits(ids)[:-1].astype(np.float64)) for each in (before, after))
                    sums += differences(p, q, np.array(ids[1:]))
                bar.update(len(ids))
    if not counts:
        raise InputError("the text has fewer than two tokens")
    means = dict(zip(("loss_before", "loss_after", "kl", "top1"), (sums / sum(counts)).tolist(), strict=True))
    return {"tokens": sum(counts), **means}


def pieces(texts: list[list[int]], piece: int) -> list[list[int]]:
    """Return the first MOST tokens of all texts in pieces, none of which has tokens of two texts."""
    out, left = [], MOST
    for ids in texts:
        for at in range(0, min(len(ids), left), piece):
            out.append(ids[at : min(at + piece, left)])
        left -= min(len(ids), left)
    return out


def differences(p: np.ndarray, q: np.ndarray, following: np.ndarray) -> np.ndarray:
    """Return the sums [4] over positions of both losses, KL, and equal most likely tokens.

    p, q: log-probabilities [positions v] of the original and of the copy; following: the next token of each.
    """
    rows = np.arange(len(following))
    losses = [-float(each[rows, following].sum()) for each in (p, q)]
    kl = float((np.exp(p) * (p - q)).sum())
    return np.array([*losses, kl, float((p.argmax(axis=-1) == q.argmax(axis=-1)).sum())])
