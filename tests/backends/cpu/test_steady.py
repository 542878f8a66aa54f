"""In the steady mode logits have the same bits for any batch and for any cut of a prompt into calls."""

from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import refengine
from refengine import runner
from refengine.backends.cpu import cpu_backend, native
from refengine.cli import main
from refengine.conformance.cases import Case, cases
from refengine.spec.config import InputError
from refengine.spec.model import Model
from tests.support.tries import tries

pytestmark = pytest.mark.skipif(native.load() is None, reason="there is no compiler for the loops")
STEADY = partial(cpu_backend, "float32", 2, steady=True)


def read(m: Model, ids: np.ndarray, ends: list[int], lengths=None):
    """Return the logits of a prompt that is cut at these positions, and the states after it."""
    states, told, start = m.new_states(len(ids)), [], 0
    for end in ends:
        n = None if lengths is None else np.clip(lengths - start, 0, end - start)
        h, states = m.blocks(m.embed(ids[:, start:end]), states, n)
        told.append(m.head(h))
        start = end
    return np.concatenate(told, axis=1), states


def same(one, other):
    np.testing.assert_array_equal(one, other)


@tries(200, 33)
@given(case=cases(max_length=70), steps=st.integers(0, 2), which=st.integers(0, 9))
def test_no_logit_moves_with_company_or_cuts(case: Case, steps, which):
    """Each row alone and uncut, in a padded batch, and in parts of whole chunks; then steps."""
    m, n = Model.build(case.cfg, case.read, STEADY()), case.lengths
    chunk = max(1, case.cfg.chunk_size) * (1 + which % 3)  # 0 without a Mamba layer
    ends = [*range(chunk, case.length, chunk), case.length]
    batch, states = read(m, case.ids, [case.length], n)
    cut, cut_states = read(m, case.ids, ends, n)
    following = case.rng(5).integers(0, case.cfg.vocab_size, (steps, case.batch))
    for row in range(case.batch):
        if not n[row]:
            continue
        alone, own = read(m, case.ids[row : row + 1, : n[row]], [n[row]])
        same(batch[row, : n[row]], alone[0])
        same(cut[row, : n[row]], alone[0])
        if row == which % case.batch:
            for_row = own
    if n[which % case.batch]:
        row = which % case.batch
        for token in following:
            batch, states = m.backend.step(m, token, states)
            cut, cut_states = m.backend.step(m, token, cut_states)
            alone, for_row = m.backend.step(m, token[row : row + 1], for_row)
            same(batch[row], alone[0])
            same(cut[row], alone[0])


@pytest.mark.parametrize("batch", [2, 7, 40])
def test_widths_of_several_blocks_and_more_rows_than_a_step_has(batch):
    case = Case(layers="M*E-", batch=batch, length=40, hidden_size=1300, head_dim=60, moe_latent_size=1100)
    m = Model.build(case.cfg, case.read, STEADY())
    together, states = read(m, case.ids, [40])
    alone, own = read(m, case.ids[:1], [22, 33, 40])
    same(together[0], alone[0])
    for t in range(2):
        together, states = m.backend.step(m, case.ids[:, t], states)
        alone, own = m.backend.step(m, case.ids[:1, t], own)
        same(together[0], alone[0])


ONCE = "Once upon a time there was a little dragon who could not sleep. "


@pytest.fixture(scope="module")
def engine():
    with refengine.load("tiny", backend="cpu", batch_invariant=True) as made:
        yield made


def told(events) -> list[tuple]:
    """Return each new token with its log-probability and those of the likeliest tokens."""
    return [(e.id, e.logprob, *e.top) for e in events if hasattr(e, "id")]


def test_through_the_engine_a_text_has_the_same_bits_alone_and_among_seven(engine):
    prompts = [ONCE * (1 + 9 * (i % 3)) + "And then " * i for i in range(7)]
    how = {"max_tokens": 8, "ignore_eos": True, "logprobs": 3}
    together: list[list] = [[] for _ in prompts]
    for i, event in engine.generate_batch(prompts, seed=5, **how):
        together[i].append(event)
    for i, prompt in enumerate(prompts):
        assert told(together[i]) == told(engine.generate(prompt, seed=5 + i, **how))


def test_through_the_engine_cuts_at_whole_chunks_change_no_bit(engine, monkeypatch):
    ids = engine.ids(ONCE * 40)[:500]
    whole = engine.logits(ids)
    for most in (1, 3):
        monkeypatch.setattr(runner, "PREFILL", most * engine.config.chunk_size)
        same(engine.logits(ids), whole)


def test_a_batch_invariant_mode_is_refused_in_one_sentence_where_there_is_none(engine):
    for name in ("numpy", "torch", "cuda"):
        with pytest.raises(
            InputError, match=f"the {name} backend has no batch-invariant mode; --backend cpu"
        ):
            refengine.load("tiny", backend=name, batch_invariant=True)
    with pytest.raises(InputError, match="batch_invariant needs the name of a backend"):
        refengine.load("tiny", backend=engine.model.backend, batch_invariant=True)


def test_auto_is_then_the_cpu_backend_and_stats_name_it_and_the_reason(capfd):
    for how, reason in (
        (["--batch-invariant"], "backend cpu (auto: the only one with a batch-invariant mode)"),
        (["--backend", "cpu"], "backend cpu"),
    ):
        with pytest.raises(SystemExit, match="0"):
            main(["generate", "Once", "-n", "2", "--stats", "--ignore-eos", *how])
        assert capfd.readouterr().err.rstrip().endswith("; " + reason)
