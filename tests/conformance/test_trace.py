"""A trace records the right arrays, its file is checked, and it names its model."""

import json
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from refengine.checkpoint import Checkpoint
from refengine.checkpoint.fingerprint import fingerprint
from refengine.checkpoint.random_values import random_values
from refengine.checkpoint.write import write
from refengine.conformance.cases import Case
from refengine.conformance.traces import load, packed
from refengine.conformance.traces.diff import diagnose
from refengine.conformance.traces.record import record
from refengine.conformance.traces.watch import STEPS
from refengine.spec.config import InputError
from refengine.spec.model import Model
from refengine.spec.ops import numpy_backend
from tests.support.checkpoints import alter, random_checkpoint
from tests.support.traces import clean, outside, rows

CASE = Case(layers="M*E-", mtp_layers="*E", length=17, seed=3)
SINGLE = Case(layers="M*", length=11, seed=4)


def traced(case=CASE, dtype=np.float32, **how):
    return clean(case, numpy_backend(dtype), **how)


def test_every_step_of_every_layer_is_recorded():
    names = set(traced().arrays)
    for i, kind in enumerate(CASE.layers):
        steps = [s for s in STEPS[kind] if s != "router"] + ["input"] + ["S", "tail"] * (kind == "M")
        assert {f"layers.{i}.{step}" for step in steps} <= names
    assert {
        "layers.2.router.experts",
        "layers.2.router.weights",
        "embeddings",
        "final_hidden",
        "logits",
    } <= names
    assert {"mtp.eh_proj", "mtp.layers.0.attention", "mtp.layers.1.output", "mtp.logits"} <= names


def test_the_stream_runs_from_layer_to_layer():
    a = traced().arrays
    assert np.array_equal(a["embeddings"], a["layers.0.input"])
    for i in range(1, len(CASE.layers)):
        assert np.array_equal(a[f"layers.{i - 1}.output"], a[f"layers.{i}.input"])


def test_pieces_rows_and_steps_are_one_call_of_each_row():
    """Pieces of 6, a shorter second row, and decoding agree with each row in one call."""
    parts = traced(dtype=np.float64)
    assert parts.calls == [[6, 6], [6, 5], [5, 0], [1, 1], [1, 1]]
    model = Model.build(CASE.cfg, CASE.read, numpy_backend(np.float64))
    for row, ids in enumerate(parts.token_ids):
        alone = record(model, [ids])
        for name, whole in alone.arrays.items():
            value = parts.arrays[name][row : row + 1]
            if not name.startswith("mtp.") and name.rpartition(".")[2] not in ("S", "tail"):
                value = packed(parts.arrays[name], parts.calls)[row : row + 1]
            assert np.allclose(value[:, : whole.shape[1]], whole, atol=1e-9), name


def test_what_is_written_is_read(tmp_path):
    made = traced(engine="an engine", fingerprint="0123", weights_dtype="float32")
    made.save(tmp_path / "t")
    read = load(tmp_path / "t")
    assert replace(read, arrays={}, name="") == replace(made, arrays={}, name="")
    assert set(read.arrays) == set(made.arrays)
    assert all(np.array_equal(read.array(name), made.array(name)) for name in made.arrays)


def test_a_file_that_is_not_completed_leaves_the_old_one_and_nothing_beside_it(tmp_path, monkeypatch):
    traced(SINGLE, engine="first").save(tmp_path / "t")
    for error, raised in ((KeyboardInterrupt(), KeyboardInterrupt), (OSError(28, "full"), InputError)):
        monkeypatch.setattr(Path, "replace", Mock(side_effect=error))
        with pytest.raises(raised):
            traced(SINGLE, engine="second").save(tmp_path / "t")
        assert [path.name for path in tmp_path.iterdir()] == ["t"] and load(tmp_path / "t").engine == "first"


def test_a_trace_of_every_backend_agrees_with_its_model(backend):
    """Prompts of two lengths, read in pieces and decoded; the CUDA kernels on the emulator."""
    case = Case(layers="M*E-", mtp_layers="*E", length=8, seed=3)
    trace = clean(case, backend, steps=1)
    assert set(trace.arrays) == set(traced(case).arrays) and trace.calls == [[6, 2], [2, 0], [1, 1]]
    found = list(diagnose(trace, case.cfg, case.read))
    assert len(found) == 10 and not any(f.wrong for f in found), [(f.unit.name, f.worst) for f in found]


def test_recording_changes_no_logits():
    model = Model.build(CASE.cfg, CASE.read, numpy_backend(np.float32))
    ids = np.array(rows(CASE)[:1])
    h, _ = model.blocks(model.embed(ids), model.new_states(1))
    assert np.array_equal(record(model, rows(CASE)[:1]).arrays["logits"], model.head(h))


def test_a_fingerprint_is_of_the_weights_not_of_the_files(tmp_path):
    cfg, prints = CASE.cfg, set()
    ways = [{}, {"shards": 3}, {"prefix": "model.", "stacked": True}]
    for i, how in enumerate(ways):
        found = Checkpoint.open(random_checkpoint(tmp_path / str(i), cfg, **how))
        prints.add(fingerprint(found.config, found.read))
    assert len(prints) == 1

    def other(row):
        value = random_values(cfg)(row)
        if row.name.endswith("layers.0.mixer.D"):
            value[-1] += 1
        return value

    write(tmp_path / "other", cfg, other)
    found = Checkpoint.open(tmp_path / "other")
    assert fingerprint(found.config, found.read) not in prints


@pytest.fixture
def file(tmp_path):
    traced(SINGLE).save(tmp_path / "t")
    return tmp_path / "t"


def refusal(path, case=SINGLE) -> str:
    with pytest.raises(InputError) as refused:
        list(diagnose(load(path), case.cfg, case.read))
    assert len(str(refused.value).splitlines()) == 1 and len(str(refused.value)) < 400
    return str(refused.value)


def test_a_whole_trace_is_not_refused(file):
    assert not any(f.wrong for f in diagnose(load(file), SINGLE.cfg, SINGLE.read))


def said(header, **changes):
    header["__metadata__"] = {k: v for k, v in (header["__metadata__"] | changes).items() if v is not None}
    return header


def without(names, outside_only=True):
    def change(header, data):
        out, kept = b"", {}
        for name, entry in header.items():
            if name == "__metadata__":
                kept[name] = entry
            elif name not in names:
                begin, end = entry["data_offsets"]
                kept[name] = entry | {"data_offsets": [len(out), len(out) + end - begin]}
                out += data[begin:end]
        return kept, out

    return change


def shaped(name, shape):
    def change(header, data):
        header[name]["shape"] = shape
        return header, data

    return change


def nan_in(name, at):
    def change(header, data):
        begin = header[name]["data_offsets"][0] + 4 * at
        return header, data[:begin] + np.float32(np.nan).tobytes() + data[begin + 4 :]

    return change


BAD = {
    "lacks the input of layer 1": without({"layers.1.input", "layers.0.output"}),
    "lacks the output of layer 1": without({"layers.1.output"}),
    "where [2, 13, 26] is expected": shaped("layers.0.output", [13, 2, 26]),
    "position 2": nan_in("layers.1.input", 2 * 26 + 7),
    "layers.0.S holds a number that is not finite": nan_in("layers.0.S", 3),
    "layers.0.tail holds a number that is not finite": nan_in("layers.0.tail", 3),
    "has no token_ids": lambda h, d: (said(h, token_ids=None), d),
    "token_ids in the header": lambda h, d: (said(h, token_ids="[[1, 2], [3]]", calls="[[2, 1]]"), d),
    "holds something else": lambda h, d: (said(h, token_ids="[[1, -2]]"), d),
    "from 0 on: '1.5'": lambda h, d: (said(h, token_ids="[1.5, 2]"), d),
    "from 0 on: 'true'": lambda h, d: (said(h, token_ids="[[true, 2]]"), d),
    "is not a list of lists": lambda h, d: (said(h, token_ids='{"a": 1}'), d),
    "is not valid JSON": lambda h, d: (said(h, token_ids="[1, 2"), d),
    "nested too deeply": lambda h, d: (said(h, token_ids="[" * 100_000), d),
    "do not add up": lambda h, d: (said(h, calls="[[1, 1]]"), d),
    "names 3 rows": lambda h, d: (said(h, calls="[[1, 1, 1]]"), d),
    "none of the dtypes": lambda h, d: (said(h, dtype="float3"), d),
    "not in the vocabulary": lambda h, d: (said(h, token_ids="[[60, 61]]", calls=None), d),
    "without a token": lambda h, d: (said(h, token_ids="[[]]"), d),
}
del BAD["token_ids in the header"]


@pytest.mark.parametrize("says", BAD)
def test_a_bad_trace_is_one_sentence(file, says):
    alter(file, BAD[says])
    assert says in refusal(file)


@pytest.mark.parametrize("text", ["bf16", "BF16", "bfloat16", "torch.bfloat16"])
def test_a_dtype_in_the_header_has_several_names(file, text):
    alter(file, lambda h, d: (said(h, dtype=text, weights_dtype=text), d))
    assert load(file).dtype == load(file).weights_dtype == "bfloat16"


def test_whole_numbers_are_refused_by_the_name_of_their_array(file):
    trace = load(file)
    arrays = {name: trace.array(name) for name in trace.arrays}
    whole = arrays | {"layers.1.output": arrays["layers.1.output"].astype(np.int32)}
    replace(trace, arrays=whole).save(file)
    assert "layers.1.output holds whole numbers (int32)" in refusal(file)
    case = Case(layers="E")
    made = traced(case)
    half = made.arrays["layers.0.router.experts"] + np.float32(0.5)
    replace(made, arrays=dict(made.arrays) | {"layers.0.router.experts": half.astype(np.float32)}).save(file)
    assert "layers.0.router.experts holds a number that is not whole" in refusal(file, case)


def test_a_part_of_the_prompt_is_refused(file):
    """Activations have fewer positions than token_ids."""
    alter(file, lambda h, d: (said(h, token_ids=json.dumps([[1] * 20, [2] * 20]), calls=None), d))
    assert "is expected" in refusal(file)


@pytest.mark.parametrize("name", ["layers.2.output", "layers.99.input", "layers.01.output"])
def test_a_layer_beyond_those_of_the_model_is_refused(file, name):
    trace = load(file)
    arrays = {old: trace.array(old) for old in trace.arrays} | {name: trace.array("layers.1.output")}
    replace(trace, arrays=arrays).save(file)
    assert f"holds '{name}', where the layers of the model are layers.0 to layers.1" in refusal(file)


def test_a_trace_of_another_model_is_refused(file):
    assert "is expected" in refusal(file, replace(SINGLE, hidden_size=28))
    assert "layer" in refusal(file, replace(SINGLE, layers="M*M"))


@pytest.mark.parametrize("size", [0, 7, 8, 100])
def test_half_a_file_is_refused(file, size):
    file.write_bytes(file.read_bytes()[:size])
    assert "write it again" in refusal(file)  # a file of ours is not downloaded again


def test_a_header_of_absurd_length_is_refused(file):
    file.write_bytes((1 << 60).to_bytes(8, "little") + file.read_bytes()[8:])
    assert "header" in refusal(file)


def test_another_form_of_one_sequence_is_read(tmp_path):
    """[position, width] without an axis of sequences, as hooks of an engine record it; no calls."""
    case = replace(SINGLE, batch=1)
    made = outside(clean(case, numpy_backend(np.float32), steps=0, cut=None))
    replace(made, arrays={k: v[0] for k, v in made.arrays.items()}).save(tmp_path / "t")
    alter(
        tmp_path / "t",
        lambda h, d: (said(h, calls=None, dtype=None, token_ids=json.dumps(made.token_ids[0])), d),
    )
    assert not any(f.wrong for f in diagnose(load(tmp_path / "t"), case.cfg, case.read))
