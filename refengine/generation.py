"""Generation: the loop from logits to tokens to text, for one sequence or several side by side.

Every sequence is a `Text`: it draws its next token, turns tokens into text, and knows when to end. `run`
feeds what they drew back into the model, all in one batch, until the last has ended.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from refengine.machine import peak_memory
from refengine.spec.config import InputError
from refengine.spec.sample import Sampling, alternatives, log_probs, sample
from refengine.text.stop_strings import StopStrings
from refengine.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Token:
    """One new token, and the text that became certain with it: none yet, or that of several tokens."""

    id: int
    text: str
    logprob: float | None = None  # with the option `logprobs`: ln p of the token before any sampling filter
    top: tuple[tuple[int, float], ...] = ()  # with `logprobs` = n: the n likeliest tokens and theirs


@dataclass(frozen=True)
class Draw:
    """A token that was drawn from logits; see Token for what the others are."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class End:
    """Why a text ended: "eos" (an end token), "stop" (a stop string), "length", "context" (full)."""

    reason: str
    text: str  # what was still held back
    statistics: dict


@dataclass(frozen=True)
class Options:
    """What `generate` may be told, named as on the command line. None: what the checkpoint recommends."""

    max_tokens: int = 256
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: Sequence[str] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    @classmethod
    def of(cls, given: dict, advice: dict) -> Options:
        """Options from those given, then the checkpoint's generation_config.json, then neutral values."""
        if unknown := sorted(set(given) - set(cls.__dataclass_fields__)):
            known = ", ".join(cls.__dataclass_fields__)
            raise TypeError(f"generate() has no option {unknown[0]!r}; it has {known}")
        names = set(Sampling.__dataclass_fields__)
        advice = {k: v for k, v in advice.items() if k in names}
        options = cls(**(advice | {k: v for k, v in given.items() if v is not None}))
        for name in ("max_tokens", "logprobs", "seed", "top_k"):
            value = getattr(options, name)
            if value is not None and (type(value) is not int or value < 0):
                raise InputError(f"{name} = {value!r} is not a whole number from 0 on")
        for name in names:
            if type(getattr(options, name)) not in (int, float, type(None)):
                raise InputError(f"{name} = {getattr(options, name)!r} is not a number")
        options.sampling  # noqa: B018  (its ranges are checked here, before any work)
        stop = (options.stop,) if isinstance(options.stop, str) else options.stop
        if not isinstance(stop, (list, tuple)) or not all(isinstance(text, str) and text for text in stop):
            raise InputError("stop is not a list of strings that say something")
        seed = secrets.randbits(32) if options.seed is None else options.seed
        return replace(options, stop=tuple(stop), seed=seed)

    @property
    def sampling(self) -> Sampling:
        chosen = {name: getattr(self, name) for name in Sampling.__dataclass_fields__}
        return Sampling(**{name: value for name, value in chosen.items() if value is not None})


@dataclass
class Text:
    """One sequence being written."""

    tokenizer: Tokenizer
    options: Options
    ids: list[int]  # the prompt, then what was drawn
    seed: int
    room: int  # how many tokens may follow the prompt
    drawn: int = 0
    ended: bool = False

    def __post_init__(self):
        self.sampling = self.options.sampling
        self.generator = np.random.Generator(np.random.Philox(self.seed))
        self.stream = self.tokenizer.stream(skip_special_tokens=False)
        self.stops = StopStrings(self.options.stop)

    @property
    def full(self) -> str:
        """Why nothing may follow, or an empty string."""
        if self.drawn >= self.options.max_tokens:
            return "length"
        return "context" if self.drawn >= self.room else ""

    def draw(self, logits: np.ndarray) -> Draw | None:
        """The next token, by logits [v], if one may follow."""
        if self.full:
            return None
        token = sample(logits, self.sampling, self.ids, self.generator)
        return Draw(token, *self.likelihoods(logits, token))

    def step(self, draw: Draw | None) -> list[Token | tuple[str, str]]:
        """Take what was drawn: a Token, and at the end (reason, what was held back)."""
        if draw is None:
            return [self.end(self.full)]
        if draw.id in self.tokenizer.stop_ids and not self.options.ignore_eos:
            return [self.end("eos")]
        self.ids.append(draw.id)
        self.drawn += 1
        text, found = self.stops.push(self.stream.push(draw.id))
        new = Token(draw.id, text, draw.logprob, draw.top)
        return [new] if found is None else [new, self.end("stop")]

    def end(self, reason: str) -> tuple[str, str]:
        """What might have become a stop string is text after all. Half a character is not: left out."""
        self.ended = True
        return reason, self.stops.flush()

    def likelihoods(self, logits: np.ndarray, token: int):
        if self.options.logprobs is None:
            return None, ()
        row = log_probs(logits)
        return float(row[token]), tuple(alternatives(row, self.options.logprobs))


def run(
    engine, prompts: list[list[int]], options: Options, seeds: list[int]
) -> Iterator[tuple[int, Token | End]]:
    """(index, event) of all prompts until each has ended."""
    context = engine.config.max_position_embeddings
    texts = [
        Text(engine.tokenizer, options, list(ids), seed, context - len(ids))
        for ids, seed in zip(prompts, seeds, strict=True)
    ]
    began = time.perf_counter()
    logits, states = engine.prefill(prompts)
    decoding = time.perf_counter()
    active = list(range(len(texts)))
    while True:
        for i, draw in zip(active, engine.draw([texts[i] for i in active], logits), strict=True):
            for event in texts[i].step(draw):
                if not isinstance(event, Token):
                    event = End(*event, statistics(engine, prompts[i], texts[i], began, decoding))
                yield i, event
        staying = [row for row, i in enumerate(active) if not texts[i].ended]
        if not staying:
            return
        if len(staying) < len(active):
            states, active = engine.take(states, staying), [active[row] for row in staying]
        logits, states = engine.decode([texts[i].ids[-1] for i in active], states)


def statistics(engine, prompt: list[int], text: Text, began: float, decoding: float) -> dict:
    """Counts, seconds, tokens per second, bytes."""
    prefill, decode = decoding - began, time.perf_counter() - decoding
    steps = max(0, text.drawn - 1)  # the first token comes out of the prefill
    return {
        "prompt_tokens": len(prompt),
        "new_tokens": text.drawn,
        "seed": text.seed,
        "load_seconds": engine.load_seconds,
        "prefill_seconds": prefill,
        "decode_seconds": decode,
        "prefill_tokens_per_second": len(prompt) / prefill,
        "decode_tokens_per_second": steps / decode if steps else None,
        "peak_memory_bytes": peak_memory(),
    }
