"""States as slots: sequences join, leave, change places and fork, and none of them notices the others."""

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from refengine.conformance.cases import Case, agree, cases, terms
from refengine.conformance.truth import model, truth_of
from refengine.spec import state
from refengine.spec.state import new_state

MOVES = ("read", "leave", "join", "fork", "swap", "overwrite")


class Table:
    """Slots with what each sequence has read, beside the states that ought to remember it."""

    def __init__(self, backend, case: Case):
        self.backend, self.case, self.rng = backend, case, case.rng(7)
        self.model = model(case, backend)
        self.read_so_far: list[list[int]] = [[] for _ in range(case.batch)]
        self.states = self.model.new_states(case.batch)
        self.forks: list = []

    def read(self, at_least: int = 0):
        """Every sequence reads between 0 and 3 tokens more; what stands beyond them is garbage."""
        slots = len(self.read_so_far)
        n = self.rng.integers(at_least, 4, slots)
        ids = self.rng.integers(0, self.case.cfg.vocab_size, (slots, 3))
        give = self.backend.array
        h, self.states = self.model.blocks(self.model.embed(give(ids)), self.states, give(n))
        self.read_so_far = [self.read_so_far[i] + ids[i, : n[i]].tolist() for i in range(slots)]
        return self.backend.fetch(self.model.head(h)), n

    def choose(self, count: int) -> np.ndarray:
        return self.rng.permutation(len(self.read_so_far))[:count]

    def leave(self):
        self.keep(self.choose(max(1, len(self.read_so_far) - 1)))

    def swap(self):
        self.keep(self.choose(len(self.read_so_far)))

    def keep(self, rows):
        self.states = state.take(self.states, rows)
        self.read_so_far = [self.read_so_far[row] for row in rows]

    def join(self):
        """One more slot: room for it is a copy of a slot, into which the new sequence is put."""
        slots = len(self.read_so_far)
        self.keep(np.append(np.arange(slots), 0))
        self.states = state.put(self.states, np.array([slots]), self.model.new_states(1))
        self.read_so_far[slots] = []

    def overwrite(self):
        """A sequence goes on in the slot of another."""
        source, target = self.choose(1), self.choose(1)
        self.states = state.put(self.states, target, state.take(self.states, source))
        self.read_so_far = list(self.read_so_far)  # a fork may hold the old one
        self.read_so_far[target[0]] = self.read_so_far[source[0]]

    def fork(self):
        """All sequences go on twice; the fork waits while the others read, and then reads itself."""
        self.forks.append((state.fork(self.states), self.read_so_far))


@given(case=cases(max_length=1), moves=st.lists(st.sampled_from(MOVES), min_size=1, max_size=8))
@example(case=Case(layers="M*", batch=2), moves=["read", "fork", "read", "fork", "swap", "read"])
def test_whoever_joins_leaves_or_forks_every_sequence_reads_as_if_alone(backend, case, moves):
    table = Table(backend, case)
    for move in moves:
        getattr(table, move)()
    everyone = [(table.states, table.read_so_far), *table.forks]
    for i in [*range(len(everyone)), *range(len(everyone))]:  # each goes on, and again after all others have
        table.states, table.read_so_far = everyone[i]
        logits, n = table.read(at_least=1)
        everyone[i] = table.states, table.read_so_far
        for row, ids in enumerate(table.read_so_far):
            true, size = truth_of(case, np.array([ids])), terms(case.cfg, len(ids))
            if true.sure(backend.dtype, size) == len(ids):
                last = logits[row, n[row] - 1]
                agree(last, true.logits[-1], backend.dtype, size, f"sequence {row}", true.stretch)


@given(case=cases("M*", max_length=1), slots=st.integers(1, 3))
def test_a_forked_cache_shares_its_memory_until_one_of_them_goes_on(case, slots):
    cfg = case.cfg
    k = case.normal(0, slots, 3, cfg.num_key_value_heads, cfg.head_dim)
    cache = new_state("*", cfg, slots, np.float64).append(k, k)
    fork = cache.fork()
    assert np.shares_memory(fork.k, cache.k)
    first, second = cache.append(k + 1, k + 1), fork.append(k + 2, k + 2)
    for after, step in ((first, 1), (second, 2)):
        assert np.array_equal(after.upto(6)[0], np.concatenate([k, k + step], axis=1))
    assert np.array_equal(cache.upto(3)[0], k)


@given(case=cases("M*", max_length=1), slots=st.integers(2, 4))
def test_taking_a_run_of_slots_is_taking_each_of_them(case, slots):
    """`rows` may be a slice: what was taken goes on without writing where the others are."""
    cfg = case.cfg
    k = case.normal(0, slots, 3, cfg.num_key_value_heads, cfg.head_dim)
    cache = new_state("*", cfg, slots, np.float64).append(k, k)
    taken = cache.take(slice(0, 1)).append(k[:1] + 1, k[:1] + 1)
    rest = cache.append(k + 2, k + 2)
    assert np.array_equal(taken.upto(6)[0], np.concatenate([k, k + 1], axis=1)[:1])
    assert np.array_equal(rest.upto(6)[0], np.concatenate([k, k + 2], axis=1))
