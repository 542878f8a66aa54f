"""A damaged or untruthful safetensors file is refused in one sentence, which states the remedy."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest

from tests.support.checkpoints import CONFIGS, add, alter, join, random_checkpoint, refusal

EMBEDDING, NORM = "backbone.embeddings.weight", "backbone.norm_f.weight"


@pytest.fixture
def weights(tmp_path) -> Path:
    """Return the only file of a good checkpoint."""
    return random_checkpoint(tmp_path, CONFIGS["latent"]) / "model.safetensors"


BYTES = {
    "is empty": lambda raw: b"",
    "is too short": lambda raw: raw[:7],
    "is truncated: its header promises": lambda raw: raw[:-1],
    "the file has 100; download it again": lambda raw: raw[:100],
    "1 bytes follow its last tensor": lambda raw: raw + b"\0",
    f"its header would be {2**60} bytes": lambda raw: struct.pack("<Q", 2**60) + raw[8:],
    f"its header would be {2**64 - 1} bytes": lambda raw: b"\xff" * 8 + raw[8:],
    "is a Git LFS pointer": lambda raw: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "is not UTF-8 text": lambda raw: raw[:9] + b"\xff" + raw[10:],
    "is not valid JSON": lambda raw: raw[:8] + b" " + raw[9:],
    "is nested too deeply": lambda raw: join(b"[" * 100_000 + b"]" * 100_000, b""),
    "is not a JSON object": lambda raw: join([1], b""),
    "is the download complete?": lambda raw: join({}, b""),
}


@pytest.mark.parametrize("sentence", BYTES)
def test_a_damaged_file_is_refused(sentence, weights):
    weights.write_bytes(BYTES[sentence](weights.read_bytes()))
    said = refusal(weights.parent)
    assert sentence in said and str(weights.parent) in said


ENTRIES = {
    "unknown dtype 'BF17'": {"dtype": "BF17"},
    "unknown dtype ['BF16']": {"dtype": ["BF16"]},
    "the impossible shape [-1, 26]": {"shape": [-1, 26]},
    "the impossible shape [61, 26.0]": {"shape": [61, 26.0]},
    "the impossible shape [True, 26]": {"shape": [True, 26]},
    f"the impossible shape [{2**64}, 1]": {"shape": [2**64, 1]},
    "the impossible shape [1, 1": {"shape": [1] * 100_000},
    "the impossible shape '61'": {"shape": "61"},
    f"not what BF16 [{2**60}, {2**60}] takes": {"shape": [2**60, 2**60]},
    "not what BF16 [61, 25] takes": {"shape": [61, 25]},
    "not what F32 [61, 26] takes": {"dtype": "F32"},
    "the impossible data_offsets [0]": {"data_offsets": [0]},
    "the impossible data_offsets [-2, 3170]": {"data_offsets": [-2, 3170]},
    "the impossible data_offsets [3172, 0]": {"data_offsets": [3172, 0]},
    "the impossible data_offsets {}": {"data_offsets": {}},
    "an entry that is not {dtype": {"strides": [1, 61]},
    "has the shape [26, 61], where config.json calls for [61, 26]": {"shape": [26, 61]},
    "has the dtype I16, which is none of BF16": {"dtype": "I16"},
    "holds packed weights": {"dtype": "U8", "shape": [61, 52]},
}


@pytest.mark.parametrize("sentence", ENTRIES)
def test_a_header_that_lies_about_a_tensor_is_refused(sentence, weights):
    alter(weights, lambda header, data: (header | {EMBEDDING: header[EMBEDDING] | ENTRIES[sentence]}, data))
    said = refusal(weights.parent)
    assert sentence in said and EMBEDDING in said


@pytest.mark.parametrize("entry", [None, 5, "x", [], {}, {"dtype": "BF16"}])
def test_an_entry_that_is_none_is_refused(entry, weights):
    alter(weights, lambda header, data: (header | {EMBEDDING: entry}, data))
    assert "an entry that is not {dtype" in refusal(weights.parent)


@pytest.mark.parametrize("remarks", [5, ["pt"], {"format": 1}])
def test_metadata_that_is_not_text_is_refused(remarks, weights):
    alter(weights, lambda header, data: (header | {"__metadata__": remarks}, data))
    assert "__metadata__ that is not text" in refusal(weights.parent)


def test_tensors_may_not_overlap(weights):
    def overlap(header, data):
        first, second = [name for name in header if name.endswith("experts.0.up_proj.weight")][:2]
        return header | {second: header[second] | {"data_offsets": header[first]["data_offsets"]}}, data

    alter(weights, overlap)
    assert "overlaps another" in refusal(weights.parent)


def test_no_bytes_may_lie_between_tensors(weights):
    alter(weights, lambda header, data: ({k: v for k, v in header.items() if k != NORM}, data))
    assert "leaves a hole before it" in refusal(weights.parent)


def test_offsets_may_not_lead_beyond_the_file(weights):
    def beyond(header, data):
        last = max(header, key=lambda name: header[name].get("data_offsets", [0])[0])
        begin, end = header[last]["data_offsets"]
        size = (end - begin) // 2 + 2**40
        longer = {"shape": [size], "dtype": "BF16", "data_offsets": [begin, begin + 2 * size]}
        return header | {last: longer}, data

    alter(weights, beyond)
    assert f"promises {weights.stat().st_size + 2**41} bytes" in refusal(weights.parent)


def test_a_key_may_not_come_twice(weights):
    def twice(header, data):
        return json.dumps(header).replace(NORM, EMBEDDING).encode(), data

    alter(weights, twice)
    assert f"has the key '{EMBEDDING}' twice" in refusal(weights.parent)


def test_a_number_of_ten_thousand_digits_is_refused(weights):
    def huge(header, data):
        return json.dumps(header).replace("[61, 26]", f"[{'9' * 10_000}]", 1).encode(), data

    alter(weights, huge)
    assert "is not valid JSON" in refusal(weights.parent)


def test_a_hostile_name_stays_on_one_line(weights):
    add(weights, "\ud800\n\x1b[2J" + "long" * 10_000, np.ones(2, np.float32), "F32")
    assert "\\ud800\\n\\x1b" in refusal(weights.parent)
