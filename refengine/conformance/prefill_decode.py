"""Compare prefill with decode on a checkpoint: the same tokens, by one call and one at a time.

A text is sampled token by token (decode), then read again in whole (prefill). Programs that train with
reinforcement learning compute the ratio of the two probabilities of each token, exp|delta ln p|: it is 1
where both paths compute the same numbers, and biases the gradient where they do not.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from refengine.engine import Engine
from refengine.progress import progress
from refengine.runner import LocalRunner
from refengine.spec.config import InputError
from refengine.spec.sample import Sampling, log_probs, sample

BEGINNING = "Once upon a time"


@dataclass(frozen=True)
class Comparison:
    """The two paths over `tokens` tokens.

    ratio, worst_ratio   exp|ln p(decode) - ln p(prefill)| of the sampled tokens: the mean, and the largest
    kl                   of the prefill's distribution from the decode's, in nats: the mean
    top1                 share of the positions at which both hold the same token likeliest
    repeats              whether a second run of the decode gave the same bits
    """

    tokens: int
    ratio: float
    worst_ratio: float
    kl: float
    top1: float
    repeats: bool


def compare(
    engine: Engine, tokens: int, seed: int = 0, beginning: list[int] | None = None, silent: bool = True
) -> Comparison:
    """Return how far prefill and decode of a sampled text are apart.

    silent: without progress bars. InputError without finite logits, and beyond the model's context.
    """
    prompt, most = beginning or first_ids(engine), engine.config.max_position_embeddings
    if len(prompt) + tokens > most:
        what = f"{tokens} tokens after a prompt of {len(prompt)}"
        raise InputError(f"{what} are more than the model's context of {most}")
    ids, decoded = sampled(engine.runner, prompt, tokens, seed, silent)
    again = forced(engine.runner, ids, len(prompt), silent)
    decode = log_probs(decoded)
    prefill = log_probs(engine.runner.logits(ids)[len(prompt) - 1 : -1])
    chosen = np.arange(tokens), np.array(ids[len(prompt) :])
    apart = np.abs(decode[chosen] - prefill[chosen])
    p = np.exp(decode)
    kl = np.where(p > 0, p * (decode - np.where(p > 0, prefill, 0)), 0).sum(axis=-1)
    return Comparison(
        tokens=tokens,
        ratio=float(np.exp(apart).mean()),
        worst_ratio=float(np.exp(apart.max())),
        kl=float(max(0.0, kl.mean())),
        top1=float((decode.argmax(-1) == prefill.argmax(-1)).mean()),
        repeats=decoded.tobytes() == again.tobytes(),
    )


def first_ids(engine: Engine) -> list[int]:
    """Return the ids of a beginning; token 1 where the checkpoint has no tokenizer."""
    try:
        return engine.tokenizer.encode(BEGINNING)
    except InputError:
        return [min(1, engine.config.vocab_size - 1)]


def sampled(
    runner, prompt: list[int], tokens: int, seed: int, silent: bool = True
) -> tuple[list[int], np.ndarray]:
    """Return the prompt with `tokens` sampled ones, and the logits [tokens v] that these are drawn from."""
    rng, how = np.random.Generator(np.random.Philox(seed)), Sampling()
    ids, found = list(prompt), []
    with progress("decode", tokens, "token", silent) as bar:
        for logits in decoding(runner, prompt, tokens, lambda i: ids[len(prompt) + i]):
            found.append(logits)
            ids.append(sample(logits, how, [], rng))
            bar.update()
    return ids, np.array(found)


def forced(runner, ids: list[int], prompt: int, silent: bool = True) -> np.ndarray:
    """Return the logits [tokens v] of a second run of the decode, with the tokens of the first."""
    given, found = ids[prompt:], []
    with progress("decode again", len(given), "token", silent) as bar:
        for logits in decoding(runner, ids[:prompt], len(given), given.__getitem__):
            found.append(logits)
            bar.update()
    return np.array(found)


def decoding(runner, prompt: list[int], tokens: int, token):
    """Yield logits [v] after the prompt, and after each token(i) fed to one slot, `tokens` in all."""
    if not isinstance(runner, LocalRunner):
        raise InputError("prefill and decode are compared in one process")
    slot = -1
    try:
        yield runner.forward([slot], [prompt], [slot], True, len(prompt))[0]
        for i in range(tokens - 1):
            yield runner.forward([slot], [[token(i)]], [], True, 1)[0]
    finally:
        runner.drop([slot])


def text(model: str, found: Comparison, backend: str) -> str:
    """Return a comparison as a few lines; backend: what computed, with its dtype."""
    how = f"{found.tokens} tokens sampled one at a time (decode), then read at once (prefill)"
    return "\n".join(
        (
            f"{model} on {backend}: {how}",
            f"mean exp|d ln p|   {found.ratio:.9f}   of the sampled tokens; 1 is no difference",
            f"worst              {found.worst_ratio:.9f}",
            f"mean KL            {found.kl:.3g} nats",
            f"top-1 agreement    {100 * found.top1:.2f} %",
            f"two runs           {'the same bits' if found.repeats else 'DIFFERENT bits'}",
        )
    )
