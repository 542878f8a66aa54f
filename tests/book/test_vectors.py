"""Every backend reproduces every shipped vector, and the definition reproduces every recorded one."""

import json
from dataclasses import replace

import numpy as np
import pytest

from refengine.conformance.vectors import check, judge_output, worst_of
from refengine.conformance.vectors import files as vectors_files
from refengine.conformance.vectors.files import SHIPPED, manifest, shipped
from refengine.conformance.vectors.replay import REPLAY
from refengine.conformance.vectors.text import check_host
from tests.support.vectors import Vector
from tests.support.vectors import replay as judged

ENTRIES = {entry["name"]: entry for entry in manifest(SHIPPED)}
COMPUTED = [name for name, entry in ENTRIES.items() if entry["operation"] in REPLAY]
RECORDED = [name for name, entry in ENTRIES.items() if "transformers" in entry["sources"]]


@pytest.mark.parametrize("name", COMPUTED)
def test_a_recorded_answer_is_ours(backend, name, record_property):
    error = judged(Vector(name), backend)
    record_property(f"worst error against recorded vectors, {backend.name}", error)


@pytest.mark.parametrize("name", RECORDED)
def test_the_definition_is_what_transformers_answered(name, record_property):
    vector = Vector(name)
    for key, recorded in vector.part("transformers").items():
        row = judge_output(vector, key, recorded, "float32")
        assert row.passed and not row.note, row
        record_property("worst error of transformers' recordings against the definition", row.error)


def test_every_file_has_its_line_and_every_line_its_file():
    files = {str(path.relative_to(SHIPPED)) for path in SHIPPED.rglob("*.*")} - {"manifest.json"}
    assert files == {entry["file"] for entry in ENTRIES.values()}
    for entry in ENTRIES.values():
        assert entry["why"] and entry["sources"]["out"].startswith("refengine 0.")
        assert all(source.split()[1][0].isdigit() for source in entry["sources"].values() if " " in source)
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*.*")) <= 1_000_000


def test_every_operation_and_every_kind_of_layer_has_vectors():
    there = {entry["operation"] for entry in ENTRIES.values()}
    assert there == set(REPLAY) | {"sample", "pack", "unpack", "tokenizer", "chat"}
    letters = {letter for name in ENTRIES if name.startswith("model/") for letter in Vector(name).cfg.layers}
    assert letters == set("M*E-")
    recorded = {ENTRIES[name]["operation"] for name in RECORDED}
    assert there - recorded == {
        "embed", "linear_pair", "prediction head", "commit", "slots", "sample", "pack", "unpack", "tokenizer",
        "chat",
    }  # fmt: skip


@pytest.mark.parametrize("name", [name for name, entry in ENTRIES.items() if entry["file"].endswith("s")])
def test_a_file_holds_plain_finite_numbers(name):
    for key, a in Vector(name).arrays.items():
        assert np.isfinite(a.astype(np.float64)).all(), key
        assert a.dtype.name in ("float32", "float64", "int64", "uint8", "bfloat16"), key
    stated = ENTRIES[name]["outputs"]
    assert set(stated) == set(Vector(name).outputs)
    for key, output in Vector(name).outputs.items():
        for dtype, allowed in stated[key]["tolerance"].items():
            assert allowed == pytest.approx(output.allowed(dtype), rel=0.01)


def test_check_has_a_row_for_each_case_and_counts_an_exception_as_a_failure(backend):
    rows = check(backend, backend.dtype, COMPUTED[:4])
    assert [row.case for row in rows] == COMPUTED[:4] and all(row.passed for row in rows)
    broken = replace(backend, ops=replace(backend.ops, embed=lambda *a: 1 / 0))
    assert not (row := check(broken, backend.dtype, ["embed/rows"])[0]).passed and "ZeroDivision" in row.note


def test_sampling_and_texts_are_ours():
    rows = check_host()
    assert len(rows) == len(ENTRIES) - len(COMPUTED) and all(row.passed for row in rows)


def test_no_case_is_set_apart_in_float32():
    for vector in shipped(COMPUTED):
        for output in vector.outputs.values():
            close = vector.close(output, "float32")
            assert close is None or not close.any(), vector.name


def test_a_wrong_value_a_missing_output_and_a_wrong_shape_are_seen():
    vector = Vector("ssd_scan/resumed")
    right = vector.part("out")
    assert worst_of(judge_output(vector, key, a, "float64") for key, a in right.items()).passed
    off = right["y"] + 1e-3
    assert not judge_output(vector, "y", off, "float32").passed
    assert judge_output(vector, "y", None, "float32").note == "y: not given"
    assert "shape" in judge_output(vector, "y", off[:1], "float32").note
    assert "NaN" in judge_output(vector, "y", off * np.nan, "float32").note


def test_a_manifest_is_one_case_a_line():
    head, *lines, tail = (SHIPPED / "manifest.json").read_text(encoding="utf-8").splitlines()
    assert len(lines) == len(ENTRIES) and json.loads(head + lines[0].rstrip(",") + tail)
    assert vectors_files.FORMAT in head


@pytest.mark.parametrize("name", [name for name in ENTRIES if name.startswith("packed/unpack")])
def test_packed_weights_by_a_literal_reading(name):
    """The bits of a code give a number, times the scale of the block; the low half of a byte comes first."""
    given, right = Vector(name).part("in"), Vector(name).arrays["out.w"]
    kind, width = Vector(name).constants["kind"], right.shape[1]
    mine = np.zeros_like(right)
    for row, column in np.ndindex(right.shape):
        if kind == "NVFP4":
            code = int(given["codes"][row, column // 2]) >> 4 * (column % 2) & 15
            value = np.float32((-1) ** (code >> 3) * [0, 0.5, 1, 1.5, 2, 3, 4, 6][code & 7])
            block = width // given["scale"].shape[1]
            scale = np.float32(e4m3(given["scale"][row, column // block])) * given["scale_2"]
        else:
            value = np.float32(e4m3(given["codes"][row, column]))
            block = width // given["scale"].shape[1] if kind == "MXFP8" else 0
            scale = 2.0 ** (int(given["scale"][row, column // block]) - 127) if block else given["scale"]
        mine[row, column] = value * np.float32(scale)
    assert np.array_equal(mine, right)


def e4m3(code) -> float:
    """Return the number of an E4M3 code: a sign, 4 bits of exponent, 3 of mantissa."""
    sign, exponent, mantissa = int(code) >> 7, int(code) >> 3 & 15, int(code) & 7
    size = 2.0 ** (exponent - 7) * (1 + mantissa / 8) if exponent else 2.0**-6 * mantissa / 8
    return -size if sign else size
