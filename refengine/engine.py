"""The engine: a checkpoint, a tokenizer and a backend behind a few calls.

    engine = load("tiny")
    engine.generate(prompt | messages | token ids, ...)   an iterator of events, the last of them an End
    engine.logits(token_ids)                              [tokens, vocabulary], teacher-forced
    engine.score(text)                                    log-likelihoods, of the prediction head too

The model itself is spec/model.py on whichever backend was chosen; this file only cuts work into calls.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from refengine import backend as backends
from refengine import generation
from refengine.checkpoint import Checkpoint
from refengine.generation import Draw, End, Options, Text, Token
from refengine.spec import mtp, state
from refengine.spec.config import Config, InputError
from refengine.spec.model import Model
from refengine.spec.sample import checked, log_probs
from refengine.spec.tensors import table
from refengine.text.chat_template import ChatTemplate
from refengine.text.tokenizer import Tokenizer

PREFILL = 512  # positions in one call, at most; cut at whole chunks of the model
BATCH = 32  # sequences side by side, at most


def load(
    model: str = "tiny",
    backend: str = "numpy",
    dtype: str = "float32",
    device: str | None = None,
    threads: int | None = None,
    deterministic: bool = False,
) -> Engine:
    """Open a checkpoint: a directory in the Hugging Face layout, or "tiny", the model inside this package.

    `device` is the processor unless it is named, of the cuda backend the first GPU. `threads` limits the
    threads of matrix products in this process; `deterministic` asks for the same bits on every run, where
    a device would not give them. InputError says in one sentence what is wrong with the files or with the
    choice. For several ranks see refengine.ranks.load.
    """
    began = time.perf_counter()
    limit_threads(threads)
    checkpoint = Checkpoint.open(model).in_large_pages()
    cfg = checkpoint.config
    chosen = backends.make(backend, cfg, dtype, device, threads, deterministic)
    with progress("loading", len(table(cfg)), "tensor") as bar:

        def read(name: str) -> np.ndarray:
            bar.update()
            return checkpoint.read(name)

        built = Model.build(cfg, read, chosen)
    checkpoint.release()  # what was widened is not needed in the file's form too
    return Engine(checkpoint, built, time.perf_counter() - began)


def limit_threads(threads: int | None) -> None:
    if threads is not None:
        if threads < 1:
            raise InputError(f"threads = {threads} is less than 1")
        threadpool_limits(threads)


@dataclass(frozen=True)
class Scores:
    """Log-probabilities: trunk[i] of token i + 1, and head[i], by the prediction head, of token i + 2."""

    ids: list[int]
    trunk: list[float] = field(default_factory=list)
    head: list[float] = field(default_factory=list)


@dataclass
class Engine:
    """A loaded model; `model` is the spec's own `Model`, for whoever wants to look inside."""

    checkpoint: Checkpoint
    model: Model = field(repr=False)
    load_seconds: float

    @property
    def config(self) -> Config:
        return self.model.cfg

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Read when first asked for: a checkpoint without one still computes logits from token ids."""
        return Tokenizer.load(self.checkpoint.directory, self.config)

    @cached_property
    def chat_template(self) -> ChatTemplate:
        return ChatTemplate.load(self.checkpoint.directory)

    def generate(self, prompt, *, chat: dict | None = None, **options) -> Iterator[Token | End]:
        """Events for one prompt: a text, token ids, or chat messages ({"role": ..., "content": ...}).

        `chat` holds switches of the chat template, such as {"enable_thinking": False}; `options` are the
        fields of generation.Options. Bad input raises InputError here, before the first event.
        """
        return (event for _, event in self.generate_batch([prompt], chat=chat, **options))

    def generate_batch(
        self, prompts: Iterable, *, chat: dict | None = None, **options
    ) -> Iterator[tuple[int, Token | End]]:
        """(index, event) for several prompts; text i is the one `generate` gives with seed + i."""
        checked = Options.of(options, self.tokenizer.generation)
        return self.run([self.ids(prompt, **(chat or {})) for prompt in prompts], checked)

    def run(self, rows: list[list[int]], options: Options) -> Iterator[tuple[int, Token | End]]:
        """(index, event) of prompts that are token ids."""
        alike = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # little padding where lengths are alike
        for start in range(0, len(rows), BATCH):
            part = alike[start : start + BATCH]
            seeds = [options.seed + i for i in part]
            for i, event in generation.run(self, [rows[i] for i in part], options, seeds):
                yield part[i], event

    def ids(self, prompt, **chat) -> list[int]:
        """Token ids of a prompt, checked: some, within the vocabulary and within the context."""
        if isinstance(prompt, bytes):
            raise InputError("the prompt is bytes: decode it to text first")
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt)
        elif len(prompt) and isinstance(prompt[0], dict):
            text = self.chat_template.render(prompt, **chat)
            ids = self.tokenizer.encode(text, add_special_tokens=False)
        else:
            ids = [_whole(token) for token in prompt]
        if not ids:
            raise InputError("the prompt is empty")
        if wrong := [token for token in ids if not 0 <= token < self.config.vocab_size]:
            raise InputError(f"token id {wrong[0]} is not in the vocabulary of {self.config.vocab_size}")
        if len(ids) > self.config.max_position_embeddings:
            raise InputError(
                f"the text has {len(ids)} tokens, and the model's context is "
                f"{self.config.max_position_embeddings}"
            )
        return ids

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """Teacher-forced logits [tokens, vocabulary], float32 or wider; row i is for the token after i."""
        return np.concatenate([self.head(h)[0] for _, _, h, _ in self.read([self.ids(token_ids)])])

    def score(self, prompt) -> Scores:
        """How likely each token of a text is, given those before it."""
        ids = self.ids(prompt)
        scores = Scores(ids)
        head = mtp.new_states(self.model, 1)
        for start, _, h, _ in self.read([ids]):
            following = ids[start + 1 : start + 1 + h.shape[1]]
            scores.trunk.extend(_chosen(self.head(h)[0], following))
            if self.config.mtp_layers and following:
                after = self.model.backend.array(np.array([following]))
                o, head = mtp.predict(self.model, h[:, : len(following)], after, head)
                scores.head.extend(_chosen(self.head(o)[0], ids[start + 2 : start + 2 + len(following)]))
        return scores

    def prefill(self, rows: list[list[int]], width: int = 0) -> tuple[np.ndarray, list]:
        """Read prompts from their beginning: logits [b, v] after each one's last token, and the states.

        They are padded to the longest of them, or to `width` if that is more.
        """
        lengths = np.array([len(row) for row in rows])
        logits = np.empty((len(rows), self.config.vocab_size), np.float32)
        with progress("prompt", lengths.sum(), "token") as bar:
            for start, n, h, states in self.read(rows, width):  # noqa: B007  (the last states are returned)
                ending = (n > 0) & (start + n == lengths)
                if ending.any():
                    logits[ending] = self.head(h, np.maximum(n - 1, 0))[ending]
                bar.update(int(n.sum()))
        return logits, states

    def decode(self, ids: list[int], states: list) -> tuple[np.ndarray, list]:
        """One more token for each sequence: logits [b, v], states."""
        here = self.model.backend
        if here.step:
            return here.step(self.model, ids, states)
        h, states = self.step(np.array(ids)[:, None], states)
        return self.head(h)[:, 0], states

    def draw(self, texts: list[Text], logits: np.ndarray) -> list[Draw | None]:
        """What follows each of some texts, by its row of the logits; None where nothing may follow."""
        return [text.draw(row) for text, row in zip(texts, logits, strict=True)]

    def take(self, states: list, rows: list[int]) -> list:
        """The states of some sequences of a batch."""
        return state.take(states, rows)

    def step(self, ids: np.ndarray, states: list, n: np.ndarray | None = None) -> tuple[object, list]:
        """One call of the model: ids [b l], of which n [b] are real -> h [b l d], states."""
        here = self.model.backend
        x = self.model.embed(here.array(ids))
        return self.model.blocks(x, states, None if n is None else here.array(n))

    def read(self, rows: list[list[int]], width: int = 0) -> Iterator[tuple[int, np.ndarray, object, list]]:
        """Read sequences in calls of whole chunks: (start, n [b], h [b l d], states) of each call."""
        chunk = max(1, self.config.chunk_size)
        step = PREFILL if chunk > PREFILL else PREFILL // chunk * chunk
        lengths = np.array([len(row) for row in rows])
        width = max(width, lengths.max())
        ids = np.array([row + [0] * (width - len(row)) for row in rows])
        states = self.new_states(len(rows))
        for start in range(0, ids.shape[1], step):
            part = ids[:, start : start + step]
            n = np.clip(lengths - start, 0, part.shape[1])
            all_real = (n == part.shape[1]).all()
            h, states = self.step(part, states, None if all_real else n)
            yield start, n, h, states

    def close(self) -> None:
        """Nothing more will be asked: ranks that follow may end."""

    def new_states(self, batch: int) -> list:
        """What the layers remember before the first token."""
        return self.model.new_states(batch)

    def head(self, h, rows: np.ndarray | None = None) -> np.ndarray:
        """Logits on the host: b l v, or of one position of each sequence b v."""
        return self.model.backend.fetch(self.model.head(h, rows))


def progress(what: str, total: int, unit: str, silent: bool = False) -> tqdm:
    """A bar on stderr for work that takes more than a second; nothing where nobody watches."""
    return tqdm(total=total, desc=what, unit=unit, disable=silent or None, delay=1, leave=False)


def _whole(token) -> int:
    try:
        return operator.index(token)
    except TypeError:
        raise InputError(f"the prompt is neither text nor token ids: it holds {token!r}") from None


def _chosen(logits: np.ndarray, ids: list[int]) -> list[float]:
    """The log-probability of each id, by the row of logits that came before it."""
    rows = log_probs(checked(logits[: len(ids)])) if ids else []
    return [float(row[token]) for row, token in zip(rows, ids, strict=True)]
