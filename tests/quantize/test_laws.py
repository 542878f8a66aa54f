"""A packed model keeps the laws of a plain one: batches, drafts and saved states change no greedy text."""

from importlib.util import find_spec

import pytest

import refengine
from refengine.quantize import quantize, recipe_of
from refengine.states.state import State

PROMPTS = ["Once upon a time", "Mia had a kite."]
GREEDY = {"max_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """Return a copy of the embedded model in NVFP4, FP8 and bfloat16."""
    out = tmp_path_factory.mktemp("copy") / "out"
    quantize("tiny", out, recipe_of("ultra"))
    return out


@pytest.fixture(scope="module", params=["numpy", "cpu", "torch"])
def engine(request, copy):
    if request.param == "torch" and not find_spec("torch"):
        pytest.skip("PyTorch is not installed")
    with refengine.load(copy, backend=request.param, dtype="float32", batch=2) as engine:
        yield engine


@pytest.fixture(scope="module")
def alone(engine):
    return [engine.complete(prompt, **GREEDY) for prompt in PROMPTS]


def test_texts_in_a_batch_are_those_of_each_alone(engine, alone):
    texts = ["", ""]
    for i, event in engine.generate_batch(PROMPTS, **GREEDY):
        texts[i] += event.text
    assert texts == alone and all(map(len, texts))


def test_drafts_change_no_text(engine, alone):
    assert [engine.complete(prompt, speculate=3, **GREEDY) for prompt in PROMPTS] == alone


def test_a_saved_state_continues_the_text(engine, alone, tmp_path):
    *begun, end = engine.generate(PROMPTS[0], keep="end", **GREEDY | {"max_tokens": 5})
    end.state.save(tmp_path / "state")
    rest = engine.complete(state=State.load(tmp_path / "state"), prompt=None, **GREEDY | {"max_tokens": 7})
    assert "".join(event.text for event in [*begun, end]) + rest == alone[0]
