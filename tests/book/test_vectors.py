"""Every recorded answer of an independent implementation is ours too, in every backend, and without it."""

import numpy as np
import pytest

from tests.support.vectors import MANIFEST, REPLAY, ROOT, Vector, replay

NAMES = sorted(MANIFEST)


@pytest.mark.parametrize("name", NAMES)
def test_a_recorded_answer_is_ours(backend, name, record_property):
    error = replay(Vector(name), backend)
    record_property(f"worst error against recorded vectors, {backend.name}", error)


def test_every_file_has_its_line_and_every_line_its_file():
    files = sorted(str(path.relative_to(ROOT).with_suffix("")) for path in ROOT.rglob("*.npz"))
    assert files == NAMES
    for name, line in MANIFEST.items():
        assert set(line) == {"source", "seed", "dtype", "why"}, name
        assert (ROOT / f"{name}.npz").stat().st_size < 100_000, name


def test_every_kind_of_layer_and_of_file_is_recorded():
    assert {name.split("/")[0] for name in NAMES} == set(REPLAY)
    assert set("".join(Vector(name).cfg.layers for name in NAMES if name.startswith("model/"))) == set("M*E-")


@pytest.mark.parametrize("name", NAMES)
def test_a_recording_holds_plain_finite_numbers(name):
    for key, a in Vector(name).arrays.items():
        assert a.dtype.kind in "fi", key
        assert np.isfinite(a).all() or key == "in.limit", key
