"""The engine: a checkpoint, a tokenizer and a runner behind a few calls.

    engine = load("tiny")
    engine.generate(prompt | messages | token ids, ...)   an iterator of events, the last of them an End
    engine.generate_batch([...], options=[{...}, ...])    (index, event) of many, each with its own options
    engine.complete(prompt)                               the text
    engine.state(prompt)                                  a State, to save, to fork, or to go on from
    engine.logits(token_ids)                              [tokens, vocabulary], teacher-forced
    engine.score(text)                                    log-likelihoods, of the prediction head too

The model itself is spec/model.py on whichever backend was chosen; runner.py feeds it, loop.py shares it.
"""

from __future__ import annotations

import operator
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from refengine import backend as backends
from refengine.checkpoint import Checkpoint
from refengine.generation import End, Options, PromptError, Token
from refengine.loop import CLOSED, SLOTS, Batch, Loop
from refengine.progress import progress
from refengine.runner import LocalRunner, Runner, Scores
from refengine.spec.arrays import Weight
from refengine.spec.config import Config, InputError
from refengine.spec.model import Model
from refengine.spec.ops import Backend
from refengine.spec.tensors import table
from refengine.speculation import has_layer_norm
from refengine.states.prefixes import Prefixes, keys
from refengine.states.state import Start, State
from refengine.storage import Storage, storage
from refengine.text.ids_only import tokenizer_of
from refengine.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from refengine.text.chat_template import ChatTemplate


def load(
    model: str | Path | Checkpoint = "tiny",
    backend: str | Backend = "numpy",
    dtype: str = "float32",
    device: str | None = None,
    threads: int | None = None,
    deterministic: bool = False,
    batch: int = SLOTS,
    batch_invariant: bool = False,
    cache: int = 0,
    cache_dir: str | Path | None = None,
    kv_dtype: str | None = None,
    ssm_dtype: str | None = None,
    packed_inputs: bool = False,
    mtp_norm: str = "rms",
) -> Engine:
    """Open a checkpoint and return an Engine; for several ranks see refengine.ranks.load.

    Args:
        model: a directory in the Hugging Face layout, a GGUF file (of a split model the first part), or
            "tiny", the model inside this package; or an open Checkpoint.
        backend: "numpy", "cpu", "torch", "cuda" or "auto"; or a Backend of your own, which makes `dtype`,
            `device` and `deterministic` its own affair.
        dtype: of the activations: "float32" or "float64" (numpy); "float32", "bfloat16", "float16" or
            "float64" (torch); "float32", "bfloat16" or "float16" (cpu, cuda). "auto": as
            Checkpoint.auto_dtype chooses.
        device: "cpu", "cuda", "cuda:1", ...; None: the CPU, and for the cuda backend the first GPU.
        threads: of matrix products in this process; None: as many as there are processors.
        deterministic: require the same bits on every run where a device would not give them.
        batch: sequences side by side, at most; fewer where memory does not hold their states.
        batch_invariant: require logits that have the same bits for any batch, other sequences in it,
            and the cuts of a prompt at whole chunks; slower, and on the cpu backend alone.
        cache: bytes of snapshots to keep, from which prompts start that share a prefix; 0: none.
        cache_dir: a directory in which the last point of each prompt is kept too, up to as many bytes.
        kv_dtype: in which keys and values are stored: "float32", "bfloat16" or "fp8"; None: as the checkpoint
            declares, else as the backend computes (bfloat16 in the cpu backend's, for bfloat16 weights).
        ssm_dtype: in which the states of Mamba layers are stored: "float32" (None), or "float16", rounded at
            random by the seed of the sequence.
        packed_inputs: pack the inputs of packed weights too, by the scales in the files, as hardware with
            W4A4 and W8A8 does; on the numpy backend alone.
        mtp_norm: the final norm of the prediction head: "rms" (an RMSNorm), or "layer" (a LayerNorm without a
            bias, as llama.cpp reads it).

    Raises:
        InputError: one sentence about what is wrong with the files or with the choice.
    """
    began = time.perf_counter()
    check_load(model, threads, batch, cache, cache_dir)
    limit_threads(threads)
    opened = model if isinstance(model, Checkpoint) else Checkpoint.open(model)
    checkpoint = opened.in_large_pages()
    cfg = checkpoint.config
    if packed_inputs:
        checkpoint.check_packed_inputs()
    stored, layer_norm = storage(checkpoint, kv_dtype, ssm_dtype), has_layer_norm(cfg, mtp_norm)
    if isinstance(backend, Backend):
        stored = Storage()
        if kv_dtype or ssm_dtype:
            raise InputError(
                "kv_dtype and ssm_dtype need the name of a backend: a Backend of your own has its own"
            )
        if batch_invariant or packed_inputs:
            mode = "batch_invariant" if batch_invariant else "packed_inputs"
            raise InputError(f"{mode} needs the name of a backend: a Backend of your own has its mode")
        chosen = backend
    else:
        if backend == "auto":
            backend = backends.automatic(
                device, dtype, batch_invariant=batch_invariant, packed_inputs=packed_inputs
            )[0]
        dtype = checkpoint.auto_dtype(backend) if dtype == "auto" else dtype
        chosen = backends.make(
            backend, cfg, dtype, device, threads, deterministic,
            packed=checkpoint.packed, batch_invariant=batch_invariant, packed_inputs=packed_inputs,
            kv=stored.kv, ssm=stored.ssm,
        )  # fmt: skip
    checkpoint = checkpoint.with_packing_note(chosen.name, chosen.packed)
    with progress("loading", len(table(cfg)), "tensor") as bar:

        def read(name: str) -> Weight:
            bar.update()
            return checkpoint.read(name)

        built = Model.build(cfg, read, chosen)
        built = replace(built, scales=stored.scales, head_layer_norm=layer_norm)
    checkpoint.release()  # what was widened is not needed in the file's form too
    seconds = time.perf_counter() - began
    return Engine(checkpoint, LocalRunner(built), seconds, batch, cache, batch_invariant, cache_dir)


def check_load(model, threads: int | None, batch: int, cache: int, cache_dir: str | Path | None) -> None:
    """Raise InputError for an argument of `load`, of one process or of a rank, that is wrong by itself."""
    if not isinstance(model, (str, Path, Checkpoint)):
        raise InputError(f"the model is {_kind(model)}: give a directory or a name")
    backends.check_threads(threads)
    if type(batch) is not int or batch < 1:
        raise InputError(f"batch = {batch!r} is not a whole number from 1 on")
    if type(cache) is not int or cache < 0:
        raise InputError(f"cache = {cache!r} is not a number of bytes from 0 on")
    if cache_dir is not None and not cache:
        raise InputError("cache_dir needs a number of bytes to keep: cache = 2**31")


def limit_threads(threads: int | None) -> None:
    """Limit the threads of matrix products in this process; None: leave them as they are."""
    if threads is not None:
        from threadpoolctl import threadpool_limits

        threadpool_limits(threads)


@dataclass
class Engine:
    """Holds a loaded model. Several threads may call one engine: their sequences share its slots.

    batch: sequences side by side, at most. cache: bytes of snapshots of prefixes, in memory and in the
    directory `cache_dir`. batch_invariant: whether a prefix must have the same bits, reused or read.
    """

    checkpoint: Checkpoint
    runner: Runner = field(repr=False)
    load_seconds: float
    batch: int = SLOTS
    cache: int = 0
    batch_invariant: bool = False
    cache_dir: str | Path | None = None

    def __post_init__(self):
        self.disk = None
        if self.cache_dir is not None:
            from refengine.states.disk import Disk

            where, cfg = Path(self.cache_dir), self.checkpoint.config
            self.disk = Disk(where, self.cache, cfg, self._fingerprint, keys)

    @property
    def config(self) -> Config:
        """Return the configuration of the model."""
        return self.runner.config

    @property
    def model(self) -> Model:
        """Return the spec's Model: over ranks, this rank's part of it."""
        return self.runner.model

    @property
    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer, read when first asked for; a checkpoint without one has IdsOnly."""
        return self._tokenizer()

    @cached_property
    def _tokenizer(self) -> Callable[[], Tokenizer]:
        """Return a function that reads the tokenizer once, and does not keep the engine alive."""
        directory, config = self.checkpoint.directory, self.config
        return cache(lambda: tokenizer_of(directory, config))

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """Return the chat template, read when first asked for."""
        from refengine.text.chat_template import ChatTemplate  # jinja2 takes a while to import

        return ChatTemplate.load(self.checkpoint.directory)

    @cached_property
    def loop(self) -> Loop:
        """Return the loop in which all sequences of this engine run."""
        tokenizer, title = self._tokenizer, self.checkpoint.directory.name
        ends, exactly = lambda: tokenizer().stop_ids, self.batch_invariant
        how = ends, exactly, self._fingerprint, title, self.disk
        prefixes = Prefixes(self.runner, self.cache, *how)
        return Loop(self.runner, tokenizer, self.load_seconds, self.batch, prefixes=prefixes)

    @property
    def fingerprint(self) -> str:
        """Return the fingerprint of the model, of which saved states must be."""
        return self._fingerprint()

    @cached_property
    def _fingerprint(self) -> Callable[[], str]:
        """Return a function that computes the fingerprint once, and does not keep the engine alive."""
        cfg, read = self.checkpoint.config, self.checkpoint.read

        @cache
        def computed() -> str:
            from refengine.checkpoint.fingerprint import fingerprint

            return fingerprint(cfg, read)

        return computed

    def generate(
        self, prompt=None, *, chat: dict | None = None, state: State | None = None, keep: str = "", **options
    ) -> Generator[Token | End, None, None]:
        """Return the events of one prompt: Tokens, then one End. Closing the iterator frees the slot.

        Args:
            prompt: a text, token ids, or chat messages ({"role": ..., "content": ...}).
            chat: switches of the chat template, such as {"enable_thinking": False}.
            state: to go on from: the prompt is what follows it, or None. Its sampling options and random
                generator go on too, where no other option and no seed is given.
            keep: which state the End returns: "end", or "turn": after the last end token of the prompt.
            options: the fields of Options.

        Raises:
            InputError: before the first event, if the prompt or an option is wrong.
            TypeError: for an option that does not exist.
        """
        return _events(self.generate_batch([prompt], chat=chat, state=state, keep=keep, **options))

    def generate_batch(
        self,
        prompts: Iterable,
        options: Sequence[Mapping] | None = None,
        *,
        chat: dict | None = None,
        state: State | None = None,
        keep: str = "",
        **shared,
    ) -> Batch:
        """Return an iterator of (index, event) over several prompts, with `cancel(index)` and `close()`.

        The text of prompt i is the one that `generate` gives with seed + i, in any batch.

        Args:
            prompts: a list, all of which is checked before the first event; or an iterator, from which
                prompts are taken as slots fall free, or pairs (prompt, its options). An InputError in
                place of a prompt is one that was found wrong already.
            options: for a list, the options of each prompt; they go before the `shared` ones.
            chat, state, keep, shared: as in `generate`, for all prompts. The random generator of a state goes
                on in prompt 0; prompt i begins with its seed + i.

        Raises:
            PromptError: an InputError with the number of the prompt that is wrong, from 0. For one of an
                iterator it is raised after the prompts before it have ended; `next` then continues with the
                prompts after it.
        """
        self._check_open()
        advice, start = self.tokenizer.generation, self._start(state, keep, shared)
        if start.state is not None:
            advice = advice | start.state.sampling
            if shared.get("seed") is None:
                shared = shared | {"seed": start.state.sampling.get("seed")}
        base = Options.of(shared, advice)
        if isinstance(prompts, (str, bytes, Mapping)) or not isinstance(prompts, Iterable):
            raise InputError(f"the prompts are {_kind(prompts)}: give a list of them")
        if isinstance(prompts, Sequence):
            given: Sequence[Mapping] = [{}] * len(prompts) if options is None else options
            if not isinstance(given, Sequence) or isinstance(given, str) or len(given) != len(prompts):
                raise InputError(f"options is not a list of {len(prompts)} dicts, one a prompt")
            requests = [
                self._request(i, *pair, base, shared, advice, chat, start)
                for i, pair in enumerate(zip(prompts, given, strict=True))
            ]
            for wrong in (each for each in requests if isinstance(each, PromptError)):
                raise wrong if len(prompts) > 1 else wrong.error
            return Batch(self.loop, iter(requests))
        if options is not None:
            raise InputError("options needs a list of prompts; an iterator gives pairs (prompt, options)")
        pairs: Iterator[tuple[Any, Mapping]]
        pairs = (item if _is_pair(item) else (item, {}) for item in prompts)

        def request(i: int, prompt, own: Mapping):
            return self._request(i, prompt, own, base, shared, advice, chat, start)

        return Batch(self.loop, (request(i, *one) for i, one in enumerate(pairs)))

    def _start(self, state: State | str | Path | None, keep: str, shared: dict) -> Start:
        """Return where sequences start and which states they return; InputError for a state that is wrong."""
        if keep not in ("", "end", "turn"):
            raise InputError(f"keep = {keep!r} is none of '', 'end', 'turn'")
        source = "the state"
        if isinstance(state, (str, Path)):
            source, state = str(state), State.load(state)
        if state is None:
            return Start(keep=keep)
        if not isinstance(state, State):
            raise InputError(f"the state is {_kind(state)}: give a State, or the name of a file")
        state.check(self.fingerprint, self.checkpoint.config, source)
        return Start(state, shared.get("seed") is None, keep)

    def _request(
        self,
        i: int,
        prompt,
        own: Mapping,
        base: Options,
        shared: dict,
        advice: dict,
        chat: dict | None,
        start: Start,
    ) -> tuple[list[int], Options, Start] | PromptError:
        """Return the token ids, the options and the start of prompt i, or its error."""
        try:
            if isinstance(prompt, InputError):
                raise prompt
            if not isinstance(own, Mapping):
                raise InputError(f"its options are {_kind(own)}, not a dict")
            chosen = replace(base, seed=(base.seed or 0) + i)
            if own:
                seed = {"seed": chosen.seed} if own.get("seed") is None else {}
                chosen = Options.of({**shared, **own, **seed}, advice)
            if chosen.speculate and not self.config.mtp_layers:
                raise InputError(
                    "there is no prediction head in this checkpoint, so nothing to speculate with"
                )
            if start.resumed and (i or own.get("seed") is not None):
                start = replace(start, resumed=False)
            return self.ids(prompt, start.state, **(chat or {})), chosen, start
        except (InputError, TypeError) as error:
            return PromptError(i, error.with_traceback(None))

    async def agenerate(self, prompt, **how) -> AsyncIterator[Token | End]:
        """Return the events of one prompt as `generate` does, for asyncio: each is awaited in a thread."""
        import asyncio

        batch = self.generate_batch([prompt], **how)
        try:
            while found := await asyncio.to_thread(next, batch, None):
                yield found[1]
        finally:
            batch.close()

    def complete(self, prompt, **how) -> str:
        """Return the text that `generate` gives for one prompt."""
        return "".join(event.text for event in self.generate(prompt, **how))

    def state(self, prompt, *, chat: dict | None = None, state: State | None = None, **options) -> State:
        """Return the State of a sequence that has read a prompt; `state` and options: as in `generate`."""
        *_, end = self.generate(prompt, chat=chat, state=state, keep="end", max_tokens=0, **options)
        assert isinstance(end, End) and end.state is not None
        return end.state

    def ids(self, prompt, after: State | None = None, **chat) -> list[int]:
        """Return the token ids of a prompt: some, within the vocabulary and within the context.

        after: a state that the prompt follows, whose ids come first; the prompt may then be None.
        """
        if prompt is None and after is not None:
            if after.position == len(after.ids):
                raise InputError("the state has read all of its tokens: give a prompt to continue with")
            return self._in_context(list(after.ids))
        if isinstance(prompt, bytes):
            raise InputError("the prompt is bytes: decode it to text first")
        if isinstance(prompt, Mapping) or not isinstance(prompt, Iterable):
            raise InputError(f"the prompt is {_kind(prompt)}: give a text, token ids or a list of messages")
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt, add_special_tokens=after is None)
        elif isinstance(prompt, Sequence) and len(prompt) and isinstance(prompt[0], dict):
            text = self.chat_template.render(list(prompt), **chat)
            ids = self.tokenizer.encode(text, add_special_tokens=False)
        else:
            ids = [_whole(token) for token in prompt]
        if not ids:
            raise InputError("the prompt is empty")
        if wrong := [token for token in ids if not 0 <= token < self.config.vocab_size]:
            raise InputError(f"token id {wrong[0]} is not in the vocabulary of {self.config.vocab_size}")
        return self._in_context(ids if after is None else [*after.ids, *ids])

    def _in_context(self, ids: list[int]) -> list[int]:
        """Return token ids; InputError if they are more than the model's context has."""
        if len(ids) > self.config.max_position_embeddings:
            raise InputError(
                f"the text has {len(ids)} tokens, and the model's context is "
                f"{self.config.max_position_embeddings}"
            )
        return ids

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """Return teacher-forced logits [tokens, vocabulary], float32 or wider; row i: after token i."""
        self._check_open()
        ids = self.ids(token_ids)
        with self.loop.alone():
            return self.runner.logits(ids)

    def score(self, prompt) -> Scores:
        """Return how likely each token of a text is, given those before it."""
        self._check_open()
        ids = self.ids(prompt)
        with self.loop.alone():
            return self.runner.score(ids)

    def follow(self) -> None:
        """Do this rank's part in all that rank 0 is asked for, until rank 0 closes its engine."""
        self.runner.follow()

    def close(self) -> None:
        """Free the states and weights; over ranks, the others may end."""
        self.loop.close(InputError(CLOSED))

    def _check_open(self) -> None:
        if self.runner.closed:
            raise InputError(CLOSED)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _events(batch: Batch) -> Generator[Token | End, None, None]:
    """Return the events of a batch without their index."""
    try:
        for _, event in batch:
            yield event
    finally:
        batch.close()


def _is_pair(item) -> bool:
    """Return whether an item of an iterator is (prompt, its options), not a prompt."""
    return isinstance(item, tuple) and len(item) == 2 and not isinstance(item[1], int)


def _kind(value) -> str:
    """Return the name of a value's type for a sentence."""
    return "None" if value is None else f"of type {type(value).__name__}"


def _whole(token) -> int:
    """Return a token id as an int; raises InputError for anything else."""
    try:
        return operator.index(token)
    except TypeError:
        raise InputError(f"the prompt is neither text nor token ids: it holds {token!r}") from None
