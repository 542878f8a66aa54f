"""A state that is saved and loaded continues the same text, on any backend and any layout of ranks."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import refengine
from refengine import End, InputError, Token
from refengine.conformance.cases import Case, cases
from refengine.conformance.truth import model
from refengine.runner import How, LocalRunner, Part
from refengine.spec.layout import Layout
from refengine.states.state import State
from tests.support.benches import BENCHES
from tests.support.layouts import cuttable, spelled
from tests.support.runners import case_over_ranks
from tests.support.sequences import Sequences

pytestmark = pytest.mark.slow

NAME = 7  # of a snapshot


def read(sequences: Sequences, turns: int) -> State:
    """Return the state of slot 1 after some tokens beside other slots; no file contains it."""
    for slot in range(3):
        sequences.join(slot)
    for _ in range(turns):
        sequences.step(sequences.some(3))
        sequences.turn(sequences.some(3), 3, True)
    sequences.runner.snapshot(1, NAME)
    ids = tuple(sequences.known[1])
    return State("", ids, len(ids), sequences.runner.collect(NAME))


def goes_on(sequences: Sequences, state: State) -> None:
    """Check that a state continues in a slot like the sequence of which it was saved, beside others."""
    sequences.join(0)
    sequences.runner.spread(NAME, state.arrays)
    for slot in (5, 2):
        sequences.runner.restore(slot, [NAME], list(state.ids), How())
        sequences.known[slot] = list(state.ids)
    sequences.runner.forget([NAME], [])
    sequences.verify([5], [sequences.tokens(3)])
    sequences.step([2, 0, 5])
    sequences.turn([5, 0, 2], 3, True)
    sequences.verify([0, 2, 5], [sequences.tokens(2) for _ in range(3)])


def through_a_file(state: State, folder) -> State:
    """Return the state as it is read from a file."""
    state.save(folder / "state")
    return State.load(folder / "state")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("states")


FEW = settings(max_examples=max(2, settings().max_examples // 4))


@FEW
@given(case=cases(max_length=1), turns=st.integers(0, 2))
@example(case=Case(layers="M*"), turns=1)
def test_save_load_and_continue_is_to_continue(backend, folder, case, turns):
    state = through_a_file(read(Sequences(backend, case), turns), folder)
    state.check("", case.cfg)
    goes_on(Sequences(backend, case), state)


@settings(max_examples=1)
@given(case=cases(max_length=1), turns=st.integers(0, 2))
@example(case=Case(layers="M*"), turns=1)
def test_a_state_goes_on_with_another_backend(backend, folder, case, turns):
    plain = BENCHES["numpy-float32"]()
    for one, other in ((backend, plain), (plain, backend)):
        state = through_a_file(read(Sequences(one, case), turns), folder)
        sequences = Sequences(other, case)
        sequences.backend = plain  # whose rounding is that of the coarser of the two
        goes_on(sequences, state)


LAYOUTS = [Layout(2), Layout(1, 2), Layout(1, 1, 2)]
LAYOUTS += [pytest.param(layout, marks=pytest.mark.thorough) for layout in (Layout(2, 1, 2), Layout(1, 2, 2))]


@pytest.mark.parametrize("layout", LAYOUTS, ids=spelled)
@settings(max_examples=2)
@given(data=st.data(), turns=st.integers(0, 2))
def test_a_state_goes_on_over_ranks_and_back(layout, data, turns):
    case, backend = data.draw(cuttable(layout)), BENCHES["numpy-float64"]()

    def reads(runner):
        return read(Sequences(backend, case, runner), turns)

    def writes(runner):
        goes_on(Sequences(backend, case, runner), alone)

    alone = reads(LocalRunner(model(case, backend)))
    case_over_ranks(layout, case, writes, backend)
    together = case_over_ranks(layout, case, reads, backend)
    together.check("", case.cfg)
    for name, a in alone.arrays.items():
        assert np.allclose(a, together.arrays[name])
    goes_on(Sequences(backend, case), together)


@pytest.mark.slow
@settings(max_examples=2)
@given(data=st.data())
def test_a_state_goes_on_over_another_layout(data):
    case, backend = data.draw(cuttable(Layout(2, 2, 2))), BENCHES["numpy-float64"]()
    state = case_over_ranks(
        Layout(2, 2), case, lambda runner: read(Sequences(backend, case, runner), 1), backend
    )
    case_over_ranks(
        Layout(1, 1, 3), case, lambda runner: goes_on(Sequences(backend, case, runner), state), backend
    )


# The engine: texts go on where they ended.


@pytest.fixture(scope="module", params=["numpy", "cpu"])
def engine(request):
    with refengine.load("tiny", request.param, dtype="float32") as engine:
        yield engine


def ids_of(events) -> list[int]:
    return [event.id for event in events if isinstance(event, Token)]


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_text_goes_on_where_it_ended(engine, folder, temperature):
    """With its sampling options, penalties and random numbers; a new engine reads the file."""
    how = {"temperature": temperature, "repetition_penalty": 1.3, "top_k": 40, "ignore_eos": True}
    whole = ids_of(engine.generate("Once upon a time", max_tokens=20, seed=3, **how))
    *first, end = engine.generate("Once upon a time", max_tokens=8, seed=3, keep="end", **how)
    assert ids_of(first) == whole[:8] and end.state.position == len(end.state.ids) - 1
    end.state.save(folder / "text")
    with refengine.load("tiny", "numpy") as other:
        rest = ids_of(other.generate(state=folder / "text", max_tokens=12, ignore_eos=True))
    assert rest == whole[8:]


def test_a_prompt_may_follow_a_state(engine):
    how = {"max_tokens": 6, "temperature": 0, "ignore_eos": True}
    ids = engine.ids("Once upon a time there was")
    expected = ids_of(engine.generate(ids, **how))
    for cut in range(1, len(ids)):
        state = engine.state(ids[:cut])
        *found, end = engine.generate(ids[cut:], state=state, **how)
        assert ids_of(found) == expected
        assert end.statistics["prompt_tokens"] == len(ids)
        assert end.statistics["reused_tokens"] == state.position >= cut - 1
    state = engine.state("Once upon")
    assert ids_of(engine.generate(" a time there was", state=state, **how)) == expected


def test_several_texts_go_on_from_one_state(engine):
    state = engine.state("Once upon a time")
    prompts = [None, " there", " in", None]
    events = list(engine.generate_batch(prompts, state=state, max_tokens=8, seed=5, ignore_eos=True))
    for i, prompt in enumerate(prompts):
        alone = ids_of(engine.generate(prompt, state=state, max_tokens=8, seed=5 + i, ignore_eos=True))
        assert [event.id for j, event in events if j == i and isinstance(event, Token)] == alone
    forks = [ids_of(engine.generate(state=state.fork(seed), max_tokens=9)) for seed in (1, 1, 2)]
    assert forks[0] == forks[1] != forks[2] and state.fork() is state


def test_a_state_may_be_kept_at_the_last_turn_of_a_prompt(engine):
    messages = [{"role": "user", "content": "Tell me a story."}]
    *_, end = engine.generate(messages, keep="turn", max_tokens=3)
    state, ids = end.state, engine.ids(messages)
    assert ids[state.position - 1] in engine.tokenizer.stop_ids
    assert not set(ids[state.position :]) & engine.tokenizer.stop_ids
    assert list(state.ids) == ids[: state.position + 1]
    *_, end = engine.generate("Once", keep="turn", max_tokens=3)
    assert list(end.state.ids) == engine.ids("Once") and end.state.position == len(end.state.ids)
    with pytest.raises(InputError, match="the state has read all of its tokens"):
        engine.generate(state=end.state)


def test_a_character_that_is_cut_by_the_end_of_a_text_is_whole_when_it_goes_on(engine):
    ids = engine.tokenizer.encode("é", add_special_tokens=False)
    if len(ids) < 2:
        pytest.skip("the tokenizer has é as one token")
    loop_text = engine.generate(state=engine.state([5, *ids[:1]]), max_tokens=0)
    assert isinstance(next(loop_text), End)


def test_bad_states_are_refused_in_a_sentence(engine, tmp_path):
    state = engine.state("Once")
    other = State("f" * 16, state.ids, state.position, state.arrays, "other")
    with pytest.raises(InputError, match=r"belongs to another model \(other\): its fingerprint is 'ffff"):
        engine.generate("x", state=other)
    less = {k: a for k, a in state.arrays.items() if not k.endswith("k")}
    for arrays, says in (
        (less, "lacks the tensor layers"),
        (state.arrays | {"layers.99.S": np.zeros(1)}, "has the tensor layers.99.S"),
        ({k: a[..., :1] for k, a in state.arrays.items()}, "is .* not "),
        ({k: a.astype(np.int32) for k, a in state.arrays.items()}, "holds no floating-point numbers"),
    ):
        with pytest.raises(InputError, match=says):
            engine.generate("x", state=State(state.model, state.ids, state.position, arrays))
    with pytest.raises(InputError, match="has the token id 999999"):
        engine.generate("x", state=State(state.model, (999999,), state.position, state.arrays))
    with pytest.raises(InputError, match="the state is of type int"):
        engine.generate("x", state=3)
    with pytest.raises(InputError, match="keep = 'all' is none of"):
        engine.generate("x", keep="all")
    with pytest.raises(InputError, match="nowhere does not exist"):
        engine.generate("x", state=tmp_path / "nowhere")
    with pytest.raises(InputError, match="the prompt is None"):
        engine.generate()


def stored_backends(kv: str, ssm: str) -> dict:
    """Return backends that store states in these dtypes, by name."""
    from refengine.spec.ops import numpy_backend

    made = {"numpy": numpy_backend(np.float32, kv=kv, ssm=ssm)}
    if "cpu-float32" in BENCHES:
        from refengine.backends.cpu import cpu_backend

        made["cpu"] = cpu_backend("float32", 1, kv=kv, ssm=ssm)
    if "torch-float32" in BENCHES:
        from refengine.backends.pytorch import torch_backend

        made["torch"] = torch_backend("float32", kv=kv, ssm=ssm)
    return made


@pytest.mark.parametrize("kv, ssm", [("fp8", "float16"), ("bfloat16", "float32")])
@pytest.mark.parametrize("name", ["numpy", "cpu", "torch"])
def test_a_state_in_fewer_bits_goes_on_with_the_same_bits(folder, name, kv, ssm):
    """Codes, scales and rounding keys are restored; a state of another dtype continues too."""
    case = Case(layers="M*M*")
    made = stored_backends(kv, ssm)
    if name not in made:
        pytest.skip(f"there is no {name} backend here")
    runner = LocalRunner(model(case, made[name]))
    prompt, how = case.rng(1).integers(0, 61, 20).tolist(), How(seed=5)
    runner.read([Part(0, prompt, how, True)])
    runner.snapshot(0, NAME)
    state = through_a_file(State("", tuple(prompt), 20, runner.collect(NAME)), folder)
    state.check("", case.cfg)
    dtypes = {key: a.dtype.name for key, a in state.arrays.items()}
    assert dtypes["layers.1.k"] == ("float8_e4m3fn" if kv == "fp8" else kv)
    assert dtypes["layers.0.S"] == ssm and ("layers.1.k_scale" in dtypes) == (kv == "fp8")
    other = LocalRunner(model(case, made[name]))
    other.spread(NAME, state.arrays)
    other.restore(3, [NAME], prompt, how)
    more = [7, 8, 9]
    for token in more:
        runner.step([0], [token], draw=False)
        other.step([3], [token], draw=False)
    found, expected = other.verify([3], [more]), runner.verify([0], [more])
    assert np.array_equal(found, expected)
    plain = LocalRunner(model(case, BENCHES["numpy-float32"]()))
    plain.spread(NAME, state.arrays)
    plain.restore(3, [NAME], [*prompt], how)
    assert np.isfinite(plain.verify([3], [more])[0]).all()


def test_a_text_with_drafts_goes_on_where_it_ended(engine):
    """The head's own cache starts anew, which costs drafts and changes no token."""
    how = {"temperature": 0, "ignore_eos": True}
    whole = ids_of(engine.generate("Once upon a time", max_tokens=20, **how))
    *first, end = engine.generate("Once upon a time", max_tokens=9, keep="end", speculate=3, **how)
    rest = ids_of(engine.generate(state=end.state, max_tokens=11, speculate=3, **how))
    assert ids_of(first) + rest == whole and end.state.position == len(end.state.ids) - 1
