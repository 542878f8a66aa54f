"""A written configuration is read back with all its constants, from JSON that any program can parse."""

import json
from dataclasses import replace

from hypothesis import example, given
from hypothesis import strategies as st

from refengine.conformance.cases import Case
from refengine.spec.config import Config
from tests.book.test_constants import odd

IDS = st.one_of(st.none(), st.integers(0, 60))


@given(drawn=odd(), bos=IDS, pad=IDS, eos=st.lists(st.integers(0, 60), max_size=3), dtype=st.text(max_size=9))
@example(
    drawn=(Case(layers="M"), {"time_step_limit": (0.3, float("inf"))}),
    bos=1,
    pad=0,
    eos=[2, 11],
    dtype="float32",
)
def test_what_is_written_is_read_back(drawn, bos, pad, eos, dtype):
    case, chosen = drawn
    ids = {"bos_token_id": bos, "pad_token_id": pad, "eos_token_id": tuple(eos), "dtype": dtype}
    cfg = replace(case.cfg, **chosen | ids)
    text = json.dumps(cfg.to_hf(), allow_nan=False)  # JSON has no infinity
    assert Config.from_hf(json.loads(text)) == cfg
