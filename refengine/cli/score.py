"""refengine score: the likelihood of a text."""

from __future__ import annotations

import json
import math

import click

from refengine.cli import options
from refengine.spec.config import InputError


@click.command(cls=options.Command, short_help="Measure how likely a text is.")
@click.argument("file", type=options.FileName())
@click.option("--tokens", is_flag=True, help="Print the log-probability of each token too.")
@options.as_json
@options.engine
@options.ranks
@options.debug
def score(file, tokens, as_json, **how):
    """Print log-likelihood and perplexity of the text in FILE (- is stdin), for model and head."""
    if options.follows():
        options.load(**how).follow()
        return
    text = options.text_of(file)
    if not text:
        raise InputError(f"{options.named(file)} is empty")
    engine = options.load(**how)

    scores = engine.score(text)
    if not scores.trunk:
        name = options.named(file)
        raise InputError(f"{name} is a single token: a score needs two or more")
    result = {"tokens": len(scores.ids), "model": figures(scores.trunk)}
    if scores.head:
        result["prediction_head"] = figures(scores.head)
    if as_json:
        if tokens:
            result |= {"token_ids": scores.ids, "logprobs": scores.trunk, "head_logprobs": scores.head}
        click.echo(json.dumps(result))
    else:
        if tokens:
            say_tokens(engine, scores)
        click.echo(f"{len(scores.ids)} tokens, {len(text.encode())} bytes")
        for name, who in (("model", "model"), ("prediction_head", "prediction head, one token further")):
            if name in result:
                click.echo(f"{who}: {sentence(result[name])}")
    engine.close()


def say_tokens(engine, scores) -> None:
    """Print a line a token: its text and its log-probability."""
    from refengine.cli.generate import quoted

    for token, logprob in zip(scores.ids[1:], scores.trunk, strict=True):
        click.echo(f"{quoted(engine, token):16} {logprob:8.3f}")


def sentence(f: dict) -> str:
    """Return figures as a sentence."""
    return (
        f"log-likelihood {f['log_likelihood']:.3f} over {f['scored']} tokens, "
        f"{f['nats_per_token']:.4f} nats a token, perplexity {f['perplexity']:.3f}"
    )


def figures(logprobs: list[float]) -> dict:
    """Return sum, mean and perplexity of log-probabilities (natural logarithm)."""
    mean = -sum(logprobs) / len(logprobs)
    return {
        "log_likelihood": sum(logprobs),
        "scored": len(logprobs),
        "nats_per_token": mean,
        "perplexity": math.exp(min(mean, 700.0)),  # e^700 is nearly the largest number there is
    }
