"""The tokenizers of the specification and of Hugging Face are the same function, on both vocabularies.

Characters are those assigned in Unicode 14, which Python 3.11 has. A later Unicode assigns further
characters, and the two libraries may have different versions, so they may split those differently.
"""

import json
import re
import shutil
import unicodedata
from copy import deepcopy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refengine import load
from refengine.checkpoint import Checkpoint
from refengine.spec.config import InputError
from refengine.spec.tokenizer import Tokenizer, from_json
from refengine.text.tokenizer import Tokenizer as Loaded
from tests.support.tries import tries
from tests.support.vocabularies import NAMES, TINY, engine_of, file, spec_of

pytestmark = pytest.mark.slow

ASSIGNED = [c for c in map(chr, range(0x110000)) if unicodedata.category(c) not in ("Cn", "Cs")]
TROUBLE = ["camelCase", "\r\n\n", "don't"]
TROUBLE += list("aZ1 /\n\r\t\u00a0\u3000\u0085\x1c\u2028.'é\u0301ǅʰ文Ⅷ²🎉\u200d\ufeff\x00")
SPECIALS = ["<|im_start|>", "<|im_end|>", "<think>", "</think>", "</s>", "<unk>", "<|im", "<s"]
pieces = st.sampled_from(TROUBLE) | st.sampled_from(ASSIGNED) | st.sampled_from(SPECIALS)
texts = st.lists(pieces, max_size=40).map("".join)


@pytest.mark.parametrize("name", NAMES)
@tries(300, 50)
@given(text=texts)
def test_the_spec_and_hugging_face_give_the_same_ids(name, text):
    assert spec_of(name).encode(text) == engine_of(name).hf.encode(text).ids


@pytest.mark.parametrize("name", NAMES)
def test_every_character_is_cut_alike_wherever_it_stands(name):
    hf, spec = engine_of(name).hf, spec_of(name)
    some = ASSIGNED[:: 211 if name == "real" else 41]
    words = [f"{a}{c}{b}" for c in some for a in ("a", " ") for b in ("b", "1")]
    assert [spec.encode(word) for word in words] == [code.ids for code in hf.encode_batch(words)]


@pytest.mark.parametrize("name", NAMES)
@given(text=texts)
def test_decoding_undoes_encoding(name, text):
    assert spec_of(name).decode(spec_of(name).encode(text)) == text
    assert engine_of(name).decode(engine_of(name).encode(text)) == text


@pytest.mark.parametrize("name", NAMES)
@tries(200, 33)
@given(data=st.data())
def test_any_ids_decode_alike_and_broken_characters_are_marked(name, data):
    engine = engine_of(name)
    ids = data.draw(st.lists(st.integers(0, engine.hf.get_vocab_size() - 1), max_size=30))
    expected = engine.hf.decode(ids, skip_special_tokens=False)
    assert spec_of(name).decode(ids) == engine.decode(ids) == expected
    assert engine.decode(ids, skip_special_tokens=True) == engine.hf.decode(ids, skip_special_tokens=True)


def test_the_real_vocabulary_gives_the_published_ids():
    system, question = "<|im_start|>system\n<|im_end|>\n", "<|im_start|>user\nWhat is 2+2?<|im_end|>\n"
    ids = [10, 25708, 1010, 11, 1010, 10, 3263, 1010, 7493, 1395, 1032, 1050, 1043, 1050, 1063, 11, 1010]
    ids += [10, 1503, 19464, 1010, 12, 1010]
    for tokenizer in spec_of("real"), engine_of("real"):
        assert tokenizer.encode(f"{system}{question}<|im_start|>assistant\n<think>\n") == ids
        assert tokenizer.encode("<|im_start|>assistant\n<think></think>")[-4:] == [19464, 1010, 12, 13]
        assert tokenizer.encode("<|im_start|>user\nHi<|im_end|>") == [10, 3263, 1010, 37133, 11]
    assert len(spec_of("real").ids) + len(spec_of("real").specials) == 131072
    assert len(spec_of("real").ranks) == 129816


def model_with(directory, **files):
    """Return a copy of the embedded model with these files changed (text of a JSON file, or its value)."""
    shutil.copytree(TINY, directory, ignore=shutil.ignore_patterns("*.md", "training.json"))
    for name, value in files.items():
        text = value if isinstance(value, str) else json.dumps(value)
        (directory / f"{name}.json").write_text(text)
    return directory


@pytest.mark.parametrize("special", [True, False])
def test_a_token_that_a_fine_tune_added_beyond_the_vocabulary_is_refused_by_name_when_used(special, tmp_path):
    """The tokenizer has a padding token for which the embedding has no row."""
    changed = deepcopy(json.loads(file("tiny")))
    pad = {"id": 2048, "content": "<|PAD_TOKEN|>", "special": special}
    rest = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    changed["added_tokens"].append(pad | rest)
    directory = model_with(tmp_path / "model", tokenizer=changed)
    checkpoint = Checkpoint.open(directory)
    tokenizer = Loaded.load(directory, checkpoint.config)
    text = "Once upon a time"
    assert not checkpoint.notes and tokenizer.encode(text) == engine_of("tiny").encode(text)
    with pytest.raises(InputError, match=r"'<\|PAD_TOKEN\|>' with the id 2048, but .* vocabulary of 2048"):
        tokenizer.encode(text + "<|PAD_TOKEN|>")


BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


def sequence(*decoders):
    return {"type": "Sequence", "decoders": list(decoders)}


@pytest.mark.parametrize(
    "decoder", [sequence(BYTES), sequence(sequence(BYTES)), sequence(BYTES, {"type": "Fuse"})]
)
def test_a_sequence_around_the_byte_level_decoder_is_one(decoder, tmp_path):
    directory = model_with(tmp_path / "model", tokenizer=json.loads(file("tiny")) | {"decoder": decoder})
    tokenizer = Loaded.load(directory)
    assert tokenizer.decode(tokenizer.encode(" Once upon a time")) == " Once upon a time"


@pytest.mark.parametrize("decoder", [None, STRIP, sequence(), sequence(BYTES, STRIP), sequence(BYTES, BYTES)])
def test_another_decoder_is_refused(decoder, tmp_path):
    """A decoder that changes the text after the bytes would otherwise be ignored without a message."""
    directory = model_with(tmp_path / "model", tokenizer=json.loads(file("tiny")) | {"decoder": decoder})
    with pytest.raises(InputError, match="is not a byte-level tokenizer"):
        Loaded.load(directory)


@pytest.mark.parametrize("text", ['{"temperature": 0.6,}', "[1", "[1]", "", "null"])
def test_advice_that_cannot_be_read_is_left_out_with_a_note(text, tmp_path):
    """A manually edited file often has an extra comma; the model runs without its sampling defaults."""
    directory = model_with(tmp_path / "model", generation_config=text)
    checkpoint = Checkpoint.open(directory)
    (note,) = checkpoint.notes
    assert "generation_config.json" in note and note.endswith("its advice on sampling are not used")
    tokenizer = Loaded.load(directory, checkpoint.config)
    assert tokenizer.generation == {} and tokenizer.stop_ids == {2, 11}, "other files name both"


def test_a_model_without_a_tokenizer_loads(tmp_path):
    directory = model_with(tmp_path / "model")
    ids = engine_of("tiny").encode("Once upon a time")
    (directory / "tokenizer.json").unlink()
    engine = load(directory)
    assert engine.logits(ids).shape == (len(ids), 2048)


def test_the_merge_of_lowest_rank_is_made_first_and_of_equal_ones_the_leftmost():
    letters = {bytes([byte]): byte for byte in b"abc"}
    ranks = {(b"b", b"c"): 0, (b"a", b"b"): 1, (b"a", b"a"): 2, (b"aa", b"bc"): 3}
    spec = Tokenizer(letters, {}, ranks, re.compile(""))
    assert spec.merge(b"abc") == [b"a", b"bc"]
    assert spec.merge(b"aaa") == [b"aa", b"a"]
    assert spec.merge(b"aabc") == [b"aabc"]


@pytest.mark.parametrize(
    "change, says",
    [
        (
            lambda f: f["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=r"\w+|\s+"),
            r"pattern: \\w\+",
        ),
        (lambda f: f.update(normalizer={"type": "NFC"}), "only byte-level BPE"),
        (lambda f: f["model"].update(type="WordPiece"), "only byte-level BPE"),
        (lambda f: f["added_tokens"][0].update(lstrip=True), "only byte-level BPE"),
    ],
)
def test_a_tokenizer_of_another_kind_is_refused_not_misread(change, says):
    changed = deepcopy(json.loads(file("tiny")))
    change(changed)
    with pytest.raises(InputError, match=says):
        from_json(changed)
