"""Each known mistake, planted in a random model, is named; a correct model gets no name."""

from functools import partial
from importlib.util import find_spec

import numpy as np
import pytest

from refengine.conformance.cases import Case
from refengine.conformance.mistakes import MISTAKES, named
from refengine.conformance.traces.diff import CAUSES, diagnose
from refengine.conformance.traces.record import record
from refengine.spec.model import Model
from refengine.spec.ops import numpy_backend
from tests.support.traces import Planted, clean, outside

pytestmark = pytest.mark.slow

FEW = [mistake for i, mistake in enumerate(MISTAKES) if i % 6 == 0]  # of every kind
each_mistake = pytest.mark.parametrize(
    "mistake",
    [pytest.param(m, marks=() if m in FEW else pytest.mark.slow) for m in MISTAKES],
    ids=[m.name for m in MISTAKES],
)
CASES = [
    Case(layers="M*E-", mtp_layers="*E", length=23, seed=5),
    Case(layers="EM*", length=23, seed=6, moe_latent_size=None, n_groups=8, heads_per_group=1, disk="F32"),
]
BACKENDS = {
    "numpy-float32": lambda: numpy_backend(np.float32),
    "numpy-float64": lambda: numpy_backend(np.float64),
}
if find_spec("torch"):
    from refengine.backends.pytorch import torch_backend

    BACKENDS |= {
        "torch-float32": partial(torch_backend, "float32"),
        "torch-bfloat16": partial(torch_backend, "bfloat16", compute="bfloat16"),
        "torch-bfloat16-weights": partial(torch_backend, "bfloat16", compute="float32"),
        "torch-float16": partial(torch_backend, "float16"),
    }


def first_wrong(trace, cfg, read):
    return next((finding for finding in diagnose(trace, cfg, read) if finding.wrong), None)


@each_mistake
def test_a_planted_mistake_is_named(mistake, monkeypatch, record_property):
    planted = Planted(mistake, monkeypatch)
    found = first_wrong(planted.trace, planted.cfg, planted.read)
    assert found, "nothing departs"
    assert mistake in found.causes, f"{found.unit.name}: {found.first}, named: {found.causes}"
    assert len(found.causes) <= CAUSES
    record_property("mistakes planted and named", 1)
    record_property("of these, named alone", int(len(found.causes) == 1))


@pytest.mark.slow
@pytest.mark.parametrize("mistake", FEW, ids=lambda mistake: mistake.name)
def test_it_is_named_from_inputs_and_outputs_of_layers_alone(mistake, monkeypatch):
    planted = Planted(mistake, monkeypatch)
    found = first_wrong(outside(planted.trace), planted.cfg, planted.read)
    assert found and mistake in found.causes


@pytest.mark.parametrize("form", [lambda trace: trace, outside], ids=["whole", "outside"])
@pytest.mark.parametrize("case", CASES, ids=repr)
@pytest.mark.parametrize("name", BACKENDS)
def test_nothing_is_named_where_nothing_is_wrong(name, case, form, record_property):
    weights = {"torch-bfloat16": "bfloat16", "torch-float16": "float16"}.get(
        name.removesuffix("-weights"), ""
    )
    trace = clean(case, BACKENDS[name](), weights_dtype=weights)
    found = list(diagnose(form(trace), case.cfg, case.read))
    record_property("worst error of a clean layer in roundings (limit 8)", max(f.worst for f in found))
    assert not [f.unit.name for f in found if f.wrong or f.causes]


def test_a_mistake_in_one_layer_of_several_is_found_there(monkeypatch):
    """All other layers agree, because each is recomputed from its input in the trace."""
    mistake = named("the norm is over all of the inner width")
    case = Case(layers="M*MM", length=13)

    def plant(model):
        on = mistake.planted(model)
        return lambda block, step, right, args: (on if block == "layers.2" else call)(
            block, step, right, args
        )

    def call(block, step, right, args):
        return right(*args)

    model = Model.build(case.cfg, case.read, numpy_backend(np.float32))
    trace = record(model, case.ids.tolist(), plant=[plant(model)])
    found = list(diagnose(trace, case.cfg, case.read))
    assert [f.unit.name for f in found if f.wrong] == ["layers.2"]
    assert found[3].first.name == "layers.2.gated_norm" and found[3].causes == [mistake]


def test_two_mistakes_in_one_model_are_both_named():
    first, second = named("the skip D x is left out"), named("scores are not divided by sqrt(head_dim)")
    case = Case(layers="M*M*", length=13)
    model = Model.build(case.cfg, case.read, numpy_backend(np.float32))
    trace = record(model, case.ids.tolist(), plant=[first.planted(model), second.planted(model)])
    found = [f.causes for f in diagnose(trace, case.cfg, case.read) if f.wrong]
    assert found == [[first], [second], [first], [second]]


def test_the_table_is_about_all_operations_and_its_names_are_unique():
    assert len(MISTAKES) >= 30 and len({mistake.name for mistake in MISTAKES}) == len(MISTAKES)
    steps = {mistake.step for mistake in MISTAKES}
    assert steps >= {
        "norm",
        "in_proj",
        "conv",
        "scan",
        "gated_norm",
        "qkv_proj",
        "attention",
        "router",
        "experts",
    }
    assert steps >= {"shared", "mlp", "mixer", "output", "embeddings", "norm_f", "eh_proj", "final_layernorm"}
    assert {mistake.trap for mistake in MISTAKES} >= {1, 2, 3, 5, 6, 7}
