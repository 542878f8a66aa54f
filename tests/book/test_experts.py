"""The experts: two matrices each, relu^2 between them; in the latent width where there is one."""

import numpy as np
from hypothesis import given

from refengine.conformance.cases import Case, agree, cases
from refengine.conformance.truth import router_margin
from refengine.spec.mixers import MIXERS
from refengine.spec.numerics import tolerance
from tests.book.test_route import read_off as route

MOES = cases("E")


def experts_of(backend, case: Case, read=None):
    """What the mixer makes of seeded tokens, and the tokens."""
    h = case.normal(0, case.batch, case.length, case.cfg.hidden_size)
    w = backend.weights(case.cfg, read or case.read)
    return backend.fetch(MIXERS["E"](backend.give(h), w, case.cfg, None, None, backend.ops)[0]), h


def size(case: Case) -> int:
    c = case.cfg
    return c.hidden_size + c.expert_width + c.num_experts_per_tok * c.moe_intermediate_size + 17


def read_off(case: Case, h, block: str = "layers.0"):
    """Of one token: router and shared expert read h, the routed ones fc1 h (or h); fc2 comes last."""

    def w(key):
        return case.exact(key + ".weight", block)

    u, r = w("fc1_latent_proj") @ h if case.moe_latent_size else h, 0
    for e, weight in route(case, h, block).items():
        r = r + weight * (w(f"experts.{e}.down_proj") @ np.maximum(w(f"experts.{e}.up_proj") @ u, 0) ** 2)
    r = w("fc2_latent_proj") @ r if case.moe_latent_size else r
    return r + w("shared_experts.down_proj") @ np.maximum(w("shared_experts.up_proj") @ h, 0) ** 2


@given(case=MOES)
def test_the_experts_are_what_the_equation_says(backend, case):
    """Traps 5 and 6: relu^2 and no gate; who reads the latent, and who the full width."""
    y, h = experts_of(backend, case)
    sure = router_margin(h, case.exact("gate.weight"), case.exact("gate.e_score_correction_bias"), case.cfg)
    for b, t in np.argwhere(sure > tolerance(backend.dtype, case.hidden_size)):
        agree(y[b, t], read_off(case, h[b, t]), backend.dtype, size(case), f"row {b}, position {t}")


@given(case=MOES)
def test_renaming_the_experts_changes_nothing(backend, case):
    """Experts change places in their group, and groups change places: what was `order[i]` is now called i."""
    cfg = case.cfg
    by_group = case.rng(5).permutation(np.arange(cfg.n_routed_experts).reshape(cfg.n_group, -1))
    order = case.rng(6).permuted(by_group, axis=1).reshape(-1)

    def read(name):
        head, experts, tail = name.partition(".experts.")
        if experts:
            e, matrix = tail.split(".", 1)
            return case.read(f"{head}.experts.{order[int(e)]}.{matrix}")
        return case.read(name)[order] if ".gate." in name else case.read(name)

    (y, h), (renamed, _) = experts_of(backend, case), experts_of(backend, case, read)
    sure = router_margin(h, case.exact("gate.weight"), case.exact("gate.e_score_correction_bias"), cfg)
    sure = sure > tolerance(backend.dtype, cfg.hidden_size)
    agree(renamed[sure], y[sure], backend.dtype, size(case))


@given(case=cases("-"))
def test_the_dense_layer_is_one_expert_that_everyone_reads(backend, case):
    w, h = backend.weights(case.cfg, case.read), case.normal(0, case.batch, case.length, case.hidden_size)
    y = backend.fetch(MIXERS["-"](backend.give(h), w, case.cfg, None, None, backend.ops)[0])
    expected = np.maximum(h @ case.exact("up_proj.weight").T, 0) ** 2 @ case.exact("down_proj.weight").T
    agree(y, expected, backend.dtype, case.hidden_size + case.cfg.intermediate_size)
