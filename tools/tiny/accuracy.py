"""Measure the embedded model while it is trained: recall, consistency within a story, agreement of drafts."""

import random

import numpy as np
import torch

from .stories import documents, skills, words


@torch.no_grad()
def recall_accuracy(model, tokenizer, count, stories, seed=7, rows=24):
    """Return how often the right thing is the likeliest token after '<name> has the', teacher-forced."""
    rng, right, total = random.Random(seed), 0, 0
    for _ in range(rows):
        ids, weight = documents.encode(tokenizer, skills.recall(rng, count, stories, asked=4))
        size = -len(ids) % model.cfg["chunk_size"]
        ids = np.concatenate([ids, np.zeros(size, ids.dtype)])
        first = torch.zeros(1, len(ids), dtype=torch.bool)
        first[0, 0] = True
        x = torch.tensor(ids)[None]
        guess = model.lm_head(model.hidden(x, first))[0].argmax(-1)
        things = {tokenizer.token_to_id("Ġ" + w) for w in words.THINGS}
        at = [i for i in np.flatnonzero(weight >= 1.0) if ids[i] in things]
        right += sum(int(guess[i - 1]) == ids[i] for i in at)
        total += len(at)
    return float(right / max(total, 1))


@torch.no_grad()
def kept(model, batch):
    """Return the mean probability of words that must repeat earlier ones: names and things."""
    ids, first, weight = (torch.as_tensor(t) for t in batch)
    p = model.lm_head(model.hidden(ids, first))[:, :-1].softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return float(p[(weight[:, 1:] - skills.KEPT).abs() < 1e-6].mean())


@torch.no_grad()
def drafts_agree(model, batch):
    """Return the share of positions of real text where MTP head and trunk have the same likeliest token."""
    ids, first, weight = (torch.as_tensor(t) for t in batch)
    h = model.hidden(ids, first)
    trunk = model.lm_head(h).argmax(-1)[:, 1:]
    draft = model.lm_head(model.draft(h, ids, first)).argmax(-1)
    keep = (weight[:, 1:] > 0) & ~first[:, 1:]
    keep[:, :-1] &= ~first[:, 2:]
    keep[:, -1] = False
    return float((trunk == draft)[keep].float().mean())
