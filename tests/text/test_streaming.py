"""Streamed text equals text decoded at once: tokens to characters, and the search for stop strings."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refengine.spec.config import Config, InputError
from refengine.text.stop_strings import StopStrings
from refengine.text.tokenizer import Tokenizer
from tests.support.tries import tries
from tests.support.vocabularies import TINY, engine_of


def pieces_of(stream, ids):
    return [*(stream.push(i) for i in ids), stream.flush()]


@pytest.mark.parametrize("name", ["tiny", pytest.param("real", marks=pytest.mark.thorough)])
@given(text=st.text(max_size=30), skip=st.booleans())
def test_a_stream_never_holds_half_a_character_and_loses_none(name, text, skip):
    tokenizer = engine_of(name)
    ids = tokenizer.encode(f"<|im_start|>{text}</think>")
    pieces = pieces_of(tokenizer.stream(skip_special_tokens=skip), ids)
    assert "".join(pieces) == (text if skip else f"<|im_start|>{text}</think>")
    assert pieces[-1] == "" and ("\ufffd" in text or not any("\ufffd" in piece for piece in pieces))


@pytest.mark.parametrize("name", ["tiny", pytest.param("real", marks=pytest.mark.thorough)])
@given(data=st.data(), skip=st.booleans())
def test_a_stream_of_any_ids_is_what_they_decode_to(name, data, skip):
    tokenizer = engine_of(name)
    ids = data.draw(st.lists(st.integers(0, tokenizer.hf.get_vocab_size() + 5), max_size=30))
    pieces = pieces_of(tokenizer.stream(skip_special_tokens=skip), ids)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip)


def test_a_character_of_several_tokens_appears_with_its_last_one():
    tokenizer = engine_of("tiny")
    ids = tokenizer.encode("🎉!")
    assert pieces_of(tokenizer.stream(), ids) == ["", "", "", "🎉", "!", ""]
    assert pieces_of(tokenizer.stream(), ids[:2]) == ["", "", "\ufffd"], "unless it was never finished"


def first_stop(text: str, stops: list[str]):
    """Return the first complete stop string, letter by letter; of several, the longest."""
    for end in range(len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)], stop
    return text, None


letters = st.text("ab", max_size=30)


@tries(300, 100)
@given(parts=st.lists(letters, max_size=8), stops=st.lists(st.text("ab", min_size=1, max_size=5), max_size=3))
def test_the_first_stop_string_is_found_however_the_text_is_cut(parts, stops):
    scanner, out, found = StopStrings(stops), "", None
    for i, part in enumerate(parts):
        text, found = scanner.push(part)
        out += text
        if found:
            break
        so_far = "".join(parts[: i + 1])
        held = so_far[len(out) :]
        assert so_far == out + held and (not held or any(stop.startswith(held) for stop in stops))
    assert (out + scanner.flush(), found) == first_stop("".join(parts), stops)


def test_an_empty_stop_string_is_refused():
    with pytest.raises(InputError, match="empty"):
        StopStrings(["end", ""])


def write(directory, **files):
    """Return a directory with the embedded model's tokenizer and these JSON files (or their broken text)."""
    (directory / "tokenizer.json").write_bytes((TINY / "tokenizer.json").read_bytes())
    for name, value in files.items():
        text = value if isinstance(value, str) else json.dumps(value)
        (directory / f"{name}.json").write_text(text)
    return directory


def test_text_ends_at_the_end_tokens_of_every_file(tmp_path):
    assert Tokenizer.load(write(tmp_path)).stop_ids == set()
    files = {
        "generation_config": {"eos_token_id": [2, 11]},
        "tokenizer_config": {"eos_token": {"content": "</think>"}},
        "special_tokens_map": {"eos_token": "<unk>"},
    }
    assert Tokenizer.load(write(tmp_path, **files)).stop_ids == {2, 11, 13, 0}


def test_an_end_token_that_is_no_unicode_is_none(tmp_path):
    files = {"tokenizer_config": {"eos_token": "\ud800"}, "special_tokens_map": {"eos_token": "<unk>"}}
    assert Tokenizer.load(write(tmp_path, **files)).stop_ids == {0}


def test_an_id_that_is_no_token_has_no_text():
    assert engine_of("tiny").decode([10, -1, 2**31, 2**40]) == engine_of("tiny").decode([10])


def test_the_checkpoints_advice_on_sampling_is_kept_and_no_sampling_means_greedy(tmp_path):
    advice = {"temperature": 0.6, "top_p": 0.95, "top_k": None, "bos_token_id": 1}
    kept = Tokenizer.load(write(tmp_path, generation_config=advice)).generation
    assert kept == {"temperature": 0.6, "top_p": 0.95}
    greedy = Tokenizer.load(write(tmp_path, generation_config={"do_sample": False, "temperature": 0.6}))
    assert greedy.generation["temperature"] == 0


def test_a_file_cannot_have_prompts_cut_short_or_filled_up(tmp_path):
    file = json.loads((TINY / "tokenizer.json").read_text())
    file["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    file["padding"] = {
        "strategy": {"Fixed": 9},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<unk>",
    }
    tokenizer = Tokenizer.load(write(tmp_path, tokenizer=file))
    assert tokenizer.encode("Once upon a time") == engine_of("tiny").encode("Once upon a time")


@pytest.mark.parametrize(
    "files, says",
    [
        ({"tokenizer": "{"}, "tokenizer.json is not a tokenizer"),
        ({"tokenizer": "[1, 2]"}, "tokenizer.json is not a tokenizer"),
        (
            {"tokenizer": {"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}},
            "byte-level",
        ),
        ({"generation_config": {"eos_token_id": "2"}}, "eos_token_id has to be an id"),
        ({"generation_config": {"temperature": "hot"}}, "temperature = 'hot' is not a number"),
        ({"generation_config": {"top_p": 7}}, "top_p = 7"),
        ({"tokenizer_config": "\\udc00"}, "tokenizer_config.json is not valid JSON"),
    ],
)
def test_a_broken_file_is_named_in_one_sentence(tmp_path, files, says):
    with pytest.raises(InputError, match=says) as refused:
        Tokenizer.load(write(tmp_path, **files))
    assert "\n" not in str(refused.value)


def test_a_token_beyond_the_vocabulary_of_the_model_is_refused_when_a_text_has_it():
    cfg = Config.from_hf(json.loads((TINY / "config.json").read_text()))
    assert Tokenizer.load(TINY, cfg).stop_ids == {2, 11}
    tokenizer = Tokenizer.load(TINY, replace(cfg, vocab_size=300))
    assert tokenizer.encode("a b") == engine_of("tiny").encode("a b")
    with pytest.raises(InputError, match=r"but config\.json has a vocabulary of 300"):
        tokenizer.encode("Once upon a time")


def test_a_missing_tokenizer_and_a_text_that_is_not_unicode_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"tokenizer\.json does not exist"):
        Tokenizer.load(tmp_path)
    with pytest.raises(InputError, match="not valid Unicode at its character 1"):
        engine_of("tiny").encode("a\udc00")
