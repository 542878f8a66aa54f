"""The prediction head agrees with a literal reading of the fact sheet; transformers has no head."""

from dataclasses import replace

import numpy as np

from refengine.conformance.candidate import numpy_bench
from refengine.conformance.cases import Case
from refengine.conformance.checks import models, speculation
from refengine.conformance.truth import model
from refengine.spec import mtp
from tests.support.checks import test_of

test_the_head_in_pieces_is_what_the_fact_sheet_says = test_of(
    models.the_head_in_pieces_is_what_the_fact_sheet_says
)
test_the_head_tells_the_embedding_from_the_hidden = test_of(
    models.the_head_tells_the_embedding_from_the_hidden
)
test_one_head_runs_again_on_its_own_output = test_of(models.one_head_runs_again_on_its_own_output)
test_drafts_begin_from_rows_of_the_trunk = test_of(
    speculation.drafts_begin_from_rows_of_the_trunk_and_go_on_from_the_heads_own
)
test_a_call_with_drafts_is_so_many_steps = test_of(speculation.a_call_with_drafts_is_so_many_steps)
test_a_draft_is_kept_or_replaced_so_that_the_distribution_stays = test_of(
    speculation.a_draft_is_kept_or_replaced_so_that_the_distribution_stays, numpy_bench("float64")
)


def test_the_final_norm_of_the_head_may_be_a_layer_norm():
    """The RMSNorm gives its input up to a factor, which a LayerNorm does not see."""
    bench, case = numpy_bench("float64"), Case(layers="M", mtp_layers="*E", batch=1, length=5)
    m, next_ids = model(case, bench), np.roll(case.ids, -1, axis=1)
    h, _ = m.blocks(m.embed(case.ids), m.new_states(1))
    o, _ = mtp.predict(m, h, next_ids, mtp.new_states(m, 1))
    centred, _ = mtp.predict(replace(m, head_layer_norm=True), h, next_ids, mtp.new_states(m, 1))
    weight = case.read("mtp.layers.1.final_layernorm.weight").astype(np.float64)
    v = o / weight
    expected = (v - v.mean(-1, keepdims=True)) / v.std(-1, keepdims=True) * weight
    np.testing.assert_allclose(centred, expected, atol=1e-3)
    assert np.abs(centred - o).max() > 0.01
