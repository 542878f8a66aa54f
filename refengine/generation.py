"""One sequence: its options, how it draws tokens from logits, and how tokens become text and events.

A `Drawing` is where the logits are (over ranks: on the last stage) and draws tokens. A `Text` is where the
caller is: it turns tokens into text and decides when the sequence ends. loop.py runs many of them.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from refengine.spec.config import InputError
from refengine.spec.sample import Sampling, alternatives, log_probs, sample
from refengine.speculation import MOST_DRAFTS
from refengine.text.stop_strings import StopStrings
from refengine.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from refengine.states.state import State


MOST_SEED = 2**64 - 1  # of the 64 random bits that round states


class PromptError(InputError):
    """Raised for one prompt among several that is wrong: its number, from 0, and the error of it alone."""

    def __init__(self, index: int, error: Exception):
        super().__init__(f"prompt {index}: {error}")
        self.index, self.error = index, error


@dataclass(frozen=True)
class Token:
    """Holds a new token and the text that became certain with it: none yet, or that of several tokens."""

    id: int
    text: str
    logprob: float | None = None  # with the option `logprobs`: ln p of the token before any sampling filter
    top: tuple[tuple[int, float], ...] = ()  # with `logprobs` = n: the n likeliest tokens and theirs


@dataclass(frozen=True)
class Draw:
    """Holds a token that was drawn from logits; see Token for the other fields."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class End:
    """Holds the reason for the end: "eos" (an end token), "stop" (a stop string), "length", "context"."""

    reason: str
    text: str  # what was still held back
    statistics: dict
    state: State | None = None  # of the sequence, if it was asked for


@dataclass(frozen=True)
class Options:
    """Holds the options of one sequence, named as on the command line. None: as the checkpoint recommends."""

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
    speculate: int | str | None = None  # drafts of the prediction head in a call; "auto": as many as pay

    @classmethod
    def of(cls, given: dict, advice: dict) -> Options:
        """Return options: those given, then the checkpoint's generation_config.json, then neutral values."""
        if unknown := sorted(set(given) - set(cls.__dataclass_fields__)):
            known = ", ".join(cls.__dataclass_fields__)
            raise TypeError(f"generate() has no option {unknown[0]!r}; it has {known}")
        names = set(Sampling.__dataclass_fields__)
        advice = {k: v for k, v in advice.items() if k in names}
        given = {k: v.item() if isinstance(v, np.generic) else v for k, v in given.items() if v is not None}
        options = cls(**(advice | given))
        if type(options.ignore_eos) is not bool:
            raise InputError(f"ignore_eos = {options.ignore_eos!r} is neither True nor False")
        for name in ("max_tokens", "logprobs", "seed", "top_k"):
            value = getattr(options, name)
            if value is not None and (type(value) is not int or value < 0):
                raise InputError(f"{name} = {value!r} is not a whole number from 0 on")
        if options.seed is not None and options.seed > MOST_SEED:
            raise InputError(f"seed = {options.seed} is more than {MOST_SEED}: its random bits have 64")
        drafts = options.speculate
        if drafts not in (None, "auto") and not (type(drafts) is int and 1 <= drafts <= MOST_DRAFTS):
            raise InputError(
                f"speculate = {drafts!r} is neither 'auto' nor a number of drafts from 1 to {MOST_DRAFTS}"
            )
        for name in names:
            if type(getattr(options, name)) not in (int, float, type(None)):
                raise InputError(f"{name} = {getattr(options, name)!r} is not a number")
        options.sampling  # noqa: B018  (its ranges are checked here, before any work)
        stop = (options.stop,) if isinstance(options.stop, str) else options.stop
        if not isinstance(stop, (list, tuple)) or not all(isinstance(text, str) and text for text in stop):
            raise InputError("stop is not a list of non-empty strings")
        seed = secrets.randbits(32) if options.seed is None else options.seed
        return replace(options, stop=tuple(stop), seed=seed)

    @property
    def sampling(self) -> Sampling:
        """Return the sampling options; neutral where none was given. Raises InputError out of range."""
        chosen = {name: getattr(self, name) for name in Sampling.__dataclass_fields__}
        return Sampling(**{name: value for name, value in chosen.items() if value is not None})


@dataclass
class Drawing:
    """Draws the tokens of one sequence, by its sampling options, random generator and tokens so far."""

    sampling: Sampling
    seed: int
    logprobs: int | None = None
    ids: list[int] = field(default_factory=list)  # the prompt, then what was drawn

    def __post_init__(self):
        self.generator = np.random.Generator(np.random.Philox(self.seed))

    def draw(self, logits: np.ndarray) -> Draw:
        """Return the next token by logits [v]; raises InputError if they are not numbers."""
        token = sample(logits, self.sampling, self.ids, self.generator)
        self.ids.append(token)
        return self.draw_of(token, logits)

    def attempt(self, logits: np.ndarray) -> Draw | InputError:
        """Return the next token by logits [v], or the error of drawing."""
        try:
            return self.draw(logits)
        except InputError as error:
            return error

    def draw_of(self, token: int, logits: np.ndarray) -> Draw:
        """Return the Draw of a token that was drawn by logits [v]."""
        if self.logprobs is None:
            return Draw(token)
        row = log_probs(logits)
        return Draw(token, float(row[token]), tuple(alternatives(row, self.logprobs)))

    @property
    def greedy(self) -> bool:
        """Return whether the next token is that with the largest logit, and nothing more is asked for."""
        sampling = self.sampling
        return not sampling.temperature and sampling.repetition_penalty == 1 and self.logprobs is None

    def fork(self) -> Drawing:
        """Return a copy that draws the same tokens from here on."""
        return deepcopy(self)

    def follow(self, token: int) -> None:
        """Go on as if `token` had been drawn here: another rank drew it."""
        self.ids.append(token)
        if self.sampling.temperature != 0:
            self.generator.random()


def draw_greedily(drawings: Sequence[Drawing], logits: np.ndarray) -> list[Draw] | None:
    """Return what sequences draw from their rows of logits [b v], chosen for all at once; None if one cannot.

    A choice of its own for each takes longer than its share of a small model's step.
    """
    if len(drawings) < 2 or not all(drawing.greedy for drawing in drawings):
        return None
    best = logits.argmax(axis=-1)  # a NaN counts as largest
    if not np.isfinite(logits[np.arange(len(best)), best]).all():
        return None
    for drawing, token in zip(drawings, tokens := best.tolist(), strict=True):
        drawing.ids.append(token)
    return list(map(Draw, tokens))


@dataclass
class Text:
    """Holds the text of one sequence, which grows token by token.

    room: how many tokens the model's context leaves after the prompt.
    """

    tokenizer: Tokenizer
    options: Options
    room: int
    drawn: int = 0
    ended: bool = False

    def __post_init__(self):
        self.stream = self.tokenizer.stream(skip_special_tokens=False)
        self.stops = StopStrings(self.options.stop)

    def follow(self, ids: Sequence[int]) -> None:
        """Go on after these tokens, which may end within a character."""
        for token in ids[-8:]:
            self.stream.push(token)

    @property
    def full(self) -> str:
        """Return the reason why no token may follow ("length", "context"), or an empty string."""
        if self.drawn >= self.options.max_tokens:
            return "length"
        return "context" if self.drawn >= self.room else ""

    def take(self, draw: Draw) -> tuple[list[Token], str]:
        """Return the Token that was drawn, if it is text, and the reason why the sequence ends, or ""."""
        if draw.id in self.tokenizer.stop_ids and not self.options.ignore_eos:
            return [], "eos"
        self.drawn += 1
        text, found = self.stops.push(self.stream.push(draw.id))
        return [Token(draw.id, text, draw.logprob, draw.top)], "stop" if found is not None else self.full

    def rest(self) -> str:
        """Return what was held back: the beginning of a stop string is text, half a character is not."""
        self.ended = True
        return self.stops.flush()
