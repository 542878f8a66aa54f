"""docs/accuracy.md has complete tables, its bars hold, and its way to measure an error is right."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from refengine.conformance import accuracy, witness
from refengine.spec.ops import DEFINITION, REFERENCE, numpy_backend

PAGE = Path(__file__).resolve().parents[2] / "docs" / "accuracy.md"
BAR, SINGLE = 1.1, 1.5  # of our error over theirs: the geometric mean, and each case without a flipped expert


def column(backend) -> accuracy.Column:
    return accuracy.Column(
        "one",
        lambda vector: accuracy.replay(vector, backend, "float64"),
        lambda case: accuracy.logits_and_experts(case, backend),
    )


EXACT = column(numpy_backend(np.float64, ops=REFERENCE))


@pytest.mark.parametrize("operation", accuracy.OPERATIONS)
def test_an_exact_engine_has_no_error(operation):
    vector = next(v for v in accuracy.cases(operation) if accuracy.error(v, EXACT) is not None)
    assert accuracy.error(vector, EXACT) < 1e-14
    for key, a in vector.arrays.items():  # every engine reads the same numbers
        if key.startswith("in.") and a.dtype.kind == "f":
            assert np.array_equal(a, a.astype("bfloat16").astype(a.dtype)), key


def test_the_error_of_a_known_change_is_its_size():
    """A factor of 1.001 on an operation is measured as an error of 0.001."""

    def mlp(*given):
        return 1.001 * DEFINITION.mlp(*given)

    off = column(numpy_backend(np.float64, ops=replace(DEFINITION, mlp=mlp)))
    vector = accuracy.cases("mlp")[0]
    assert accuracy.error(vector, off) == pytest.approx(1e-3, rel=1e-6)


def test_whole_models_are_judged_before_their_first_near_tie():
    for case in accuracy.models("MEM*E")[:4]:
        error = accuracy.model_error(case, EXACT)
        assert error is None or error < 1e-13
    assert accuracy.model_error(accuracy.models("MEM*E")[1], EXACT) is not None  # all experts are chosen


def tables() -> list[list[str]]:
    """Return the rows of the page's tables as lists of cells."""
    text = PAGE.read_text(encoding="utf-8").split("<!-- measured -->")[1]
    return [
        [cell.strip() for cell in line.strip("| ").split("|")] for line in text.splitlines() if "|" in line
    ]


def test_the_page_has_every_operation_and_engine():
    first = {row[0] for row in tables()}
    assert first >= {*accuracy.OPERATIONS, *(f"model `{layers}`" for layers in accuracy.MODELS)}
    head = tables()[0]
    assert head[2:] == [
        "numpy float32", "cpu float32", "torch float32", "torch bfloat16 weights", "torch bfloat16",
        "transformers float32", "transformers bfloat16", "llama.cpp float32", "llama.cpp bfloat16",
        "mlx-lm float32", "mlx-lm bfloat16",
    ]  # fmt: skip


def test_the_bars_hold_on_the_page():
    rows = [row for row in tables() if len(row) == 7 and re.fullmatch(r"\d+", row[0])]
    ratios = [float(row[4]) for row in rows]
    assert len(rows) >= 20 and np.exp(np.mean(np.log(ratios))) <= BAR
    same = [float(row[4]) for row in rows if row[5] == row[6] == "0"]
    assert len(same) >= 4 and max(same) <= SINGLE


@pytest.mark.slow
@pytest.mark.skipif(not witness.available(), reason="needs torch and transformers")
def test_a_model_of_the_page_is_measured_again(record_property):
    rows = {row[0]: row for row in tables() if len(row) == 7}
    for case in accuracy.initialised_cases()[3:6:2]:
        found = accuracy.compare(case)
        record_property("worst rms error over transformers', as initialised", found.ratio)
        assert found.ratio <= SINGLE
        if rows[str(case.seed)][5:] == ["0", "0"]:
            assert found.theirs == pytest.approx(float(rows[str(case.seed)][3]), rel=0.5)
