"""`refengine verify` passes right candidates, and names wrong ones by the most specific check."""

import importlib
from pathlib import Path

import numpy as np
import pytest

from refengine.backend import NAMES
from refengine.conformance import report
from refengine.conformance.candidate import TEXT, VERBS, Bench, numpy_bench, resolve, with_functions
from refengine.conformance.checks import CHECKS
from refengine.conformance.report import Plan
from refengine.spec import chat as spec_chat
from refengine.spec.config import InputError
from refengine.spec.ops import DEFINITION, REFERENCE
from refengine.spec.sample import Sampling, probabilities
from tests.support.checks import TESTED

pytestmark = pytest.mark.slow

FEW = Plan(examples=3)


def norm_over_the_whole_width(y, z, weight, eps, groups, mean=None):
    u = y * (z / (1 + np.exp(-z)))
    return u / np.sqrt((u * u).mean(-1, keepdims=True) + eps) * weight


def mlp(h, up, down):
    return np.maximum(h @ up.T, 0) ** 2 @ down.T


def rows(functions, *names, plan: Plan = FEW):
    return list(report.report(with_functions(functions), names, plan))


def test_numpy_is_right_in_every_row():
    found = list(report.report(numpy_bench("float32"), (), FEW))
    assert [row.operation for row in found] == list(report.NAMES)
    assert {row.operation for row in found if row.verdict != "pass"} == {"step"}
    assert report.passed(found) and report.left_out(found) == ["not there (the backend has no step): step"]
    assert all(row.recorded + row.drawn for row in found if row.verdict == "pass")
    assert all(row.worst is not None and row.worst < 100 for row in found if row.operation in VERBS)


def test_a_norm_over_the_whole_width_is_named_as_that_operation():
    found = rows({"gated_rms_norm": norm_over_the_whole_width}, "gated_rms_norm", "layers", "laws", "models")
    wrong = [row for row in found if row.verdict == "wrong"]
    assert [row.operation for row in wrong] == ["gated_rms_norm"]
    assert wrong[0].why.startswith("the gate comes before the norm of each group: off by ")
    assert wrong[0].worst > 1e4 and "n_groups" not in wrong[0].again, "two groups are the default"
    others = {row.operation: row for row in found if row.verdict == "not judged"}
    assert {"mamba2-mixer", *report.LAWS, "model", "prediction-head"} <= others.keys()
    assert {row.why for row in others.values()} == {"gated_rms_norm is wrong"}
    assert {row.operation for row in found if row.verdict == "pass"} == {
        "attention-mixer",
        "experts-mixer",
        "mlp-mixer",
    }


def test_the_line_that_reproduces_a_failure_does():
    (row,) = rows({"gated_rms_norm": norm_over_the_whole_width}, "gated_rms_norm")
    command = report.command(row, FEW, "mine:OPS", "float32")
    assert command.startswith(
        "refengine verify --backend mine:OPS --dtype float32 --op gated_rms_norm --seed 0 --case"
    )
    again = rows({"gated_rms_norm": norm_over_the_whole_width}, plan=Plan(case=row.again))
    assert [r.why for r in again] == [row.why] and again[0].drawn == 1
    assert rows({}, plan=Plan(case=row.again))[0].verdict == "pass"


def test_the_same_seed_finds_the_same_case():
    one, other = (rows({"mlp": lambda h, up, down: h}, "mlp")[0] for _ in range(2))
    assert (one.again, one.why, one.drawn) == (other.again, other.why, other.drawn)


def test_another_seed_draws_other_cases():
    def drawn(seed: int) -> set:
        seen = set()

        def recording(h, up, down):
            seen.add(h.tobytes())
            return mlp(h, up, down)

        rows({"mlp": recording}, "mlp", plan=Plan(examples=4, seed=seed))
        return seen

    first, again, second = drawn(0), drawn(0), drawn(1)
    assert first == again and first - second and second - first


def raises(h, up, down):
    raise ValueError("no\nway")


def changes(h, up, down):
    y = mlp(h, up, down)
    h *= 2
    return y


def changes_its_weights(h, up, down):
    y = mlp(h, up, down)
    down[0, 0] += 1
    return y


BAD = {
    "raises": ({"mlp": raises}, "mlp raised ValueError: no way"),
    "a shape": ({"mlp": lambda h, up, down: h[..., :3]}, "shape ("),
    "a dtype": (
        {"mlp": lambda h, up, down: mlp(h, up, down).astype(np.float64)},
        "float64, where float32 is due",
    ),
    "NaN": ({"mlp": lambda h, up, down: mlp(h, up, down) * np.float32("nan")}, "NaN at ("),
    "changes its input": ({"mlp": changes}, "mlp changed its argument 1, float32"),
    "changes its weights": ({"mlp": changes_its_weights}, "mlp changed its argument 3, float32"),
    "nothing": ({"mlp": lambda h, up, down: None}, "NoneType, where an array is due"),
    "one result of two": (
        {"rms_norm": lambda x, delta, w, eps: x},
        "rms_norm returned ndarray, where two results",
    ),
    "three results of two": ({"ssd_scan": lambda *given: (given[0],) * 3}, "returned 3 results, where two"),
    "no routing": ({"route": lambda h, *given: h}, "route returned ndarray, where two results"),
    "a list": ({"mlp": lambda h, up, down: mlp(h, up, down).tolist()}, "list, where an array is due"),
    "complex numbers": (
        {"mlp": lambda h, up, down: mlp(h, up, down).astype(np.complex64)},
        "complex64, where float32 is due",
    ),
    "too few arguments": ({"mlp": lambda h, up: h}, "mlp raised TypeError"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_candidate_that_breaks_the_contract_is_told_in_a_sentence_and_the_rest_comes(what):
    functions, said = BAD[what]
    (verb,) = functions
    first, last = rows(functions, verb, "logits")
    assert first.verdict == "wrong" and said in first.why and "\n" not in first.why
    assert last.verdict == "pass"


TEXT_BAD = {
    "sampling": ({"probabilities": lambda x, how, seen: probabilities(x, Sampling(how.temperature), [])}),
    "tokenizer": ({"decode": lambda ids: "".join(map(chr, ids))}),
    "chat": ({"render": lambda messages, tools, **how: spec_chat.chat(messages, None, **how)}),
}


@pytest.mark.parametrize("operation", TEXT_BAD)
def test_a_wrong_function_of_texts_is_named(operation):
    found = rows(TEXT_BAD[operation], "text", plan=Plan(examples=12))
    assert {row.operation for row in found if row.verdict == "wrong"} == {operation}
    row = next(row for row in found if row.verdict == "wrong")
    assert rows(TEXT_BAD[operation], plan=Plan(case=row.again))[0].verdict == "wrong"


def test_every_verb_is_a_row_and_every_check_belongs_to_one():
    assert {check.operation for check in CHECKS} == set(report.NAMES)
    assert len({check.name for check in CHECKS}) == len(CHECKS) > 45
    assert all(report.recorded(verb) for verb in VERBS if verb != "all_reduce")


def test_the_suite_runs_every_check():
    for path in sorted((Path(__file__).parents[1] / "book").glob("test_*.py")):
        importlib.import_module(f"tests.book.{path.stem}")
    plain = {
        "a_vector_of_zeros_stays_zeros",
        "a_gated_vector_of_zeros_stays_zeros",
    }  # tests/book/test_norm.py
    assert {check.name for check in CHECKS} - TESTED == plain


MINE = """
from refengine.spec.ops import DEFINITION, REFERENCE, numpy_backend

class nested:
    def mlp(h, up, down): return REFERENCE.mlp(h, up, down)

def mlp(h, up, down): return REFERENCE.mlp(h, up, down)
def backend(dtype="float32"): return numpy_backend(dtype)
def other(h): return h
OPS, BACKEND, SOME, NONE = DEFINITION, numpy_backend("float64"), {"mlp": mlp}, {"mpl": mlp}
TEXT = {"encode": 3}
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "mine_of_a_user.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize(
    "name, dtype",
    {
        "mine_of_a_user": "float32",
        "mine_of_a_user.py": "float32",
        "mine_of_a_user:OPS": "float32",
        "mine_of_a_user:SOME": "float32",
        "mine_of_a_user:mlp": "float32",
        "mine_of_a_user:nested": "float32",
        "mine_of_a_user:backend": "float64",
        "mine_of_a_user:BACKEND": "float64",
        "numpy": "float64",
        "definition": "float32",
    }.items(),
)
def test_a_candidate_is_a_backend_or_functions_in_any_form(mine, name, dtype):
    found = resolve(name, None if name.endswith("BACKEND") else dtype)
    assert isinstance(found, Bench) and found.dtype == dtype
    if name.endswith("mine_of_a_user:OPS"):
        assert found.ops.linear is not DEFINITION.linear, "it is watched"


@pytest.mark.parametrize(
    "name, said",
    {
        "nump": f"there is no backend 'nump'; there is {', '.join(NAMES)}, definition, or MODULE:ATTRIBUTE",
        "no_such:x": "no_such cannot be imported: ModuleNotFoundError",
        "mine_of_a_user:nothing": "mine_of_a_user has no attribute 'nothing'",
        "mine_of_a_user:NONE": "there is no verb 'mpl'; did you mean mlp?",
        "mine_of_a_user:TEXT": "encode is int, not a function",
        "nothing.py": "there is no file nothing.py",
        "mine_of_a_user:other": "mine_of_a_user:other takes h, so it returns no candidate",
        "json": "json is no Backend, and has no function with the name of a verb: embed",
    }.items(),
)
def test_what_is_no_candidate_is_refused_in_a_sentence(mine, name, said):
    with pytest.raises(InputError) as error:
        resolve(name)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_name_of_no_operation_and_a_case_of_no_check_are_refused():
    with pytest.raises(InputError, match="there is no operation 'scan'"):
        report.rows(["scan"])
    for case in (
        "nonsense(",
        "no_such_check(case=Case())",
        "f(1)",
        "the_scan_is_what_the_equation_says(x=open())",
        "the_scan_is_what_the_equation_says(x=1)",
        "the_scan_is_what_the_equation_says()",
    ):
        with pytest.raises(InputError, match=r"check|CHECK"):
            report.operation_of(case)
    assert report.rows(["mlp mixer", "text"]) == ["mlp-mixer", *report.TEXTS]


def test_functions_of_text_are_described_and_known():
    assert set(TEXT) == {"probabilities", "draw", "accept", "encode", "decode", "render"}
    assert with_functions({"draw": np.argmax}).ops.mlp is REFERENCE.mlp


def floor(x, dt, A_log, B, C, D, dt_bias, S, lengths, limit, chunk):
    return REFERENCE.ssd_scan(x, dt, A_log, B, C, D, dt_bias, S, lengths, (0.001, np.inf), chunk)


def bias_that_weighs(h, gate, bias, cfg):
    routing = REFERENCE.route(h, gate, bias, cfg)
    weight = 1 / (1 + np.exp(-(h @ gate.T))) + bias
    weight = np.take_along_axis(weight, routing.expert, axis=-1)
    weight = weight / weight.sum(-1, keepdims=True) if cfg.norm_topk_prob else weight
    return routing._replace(weight=(weight * cfg.routed_scaling_factor).astype(np.float32))


KNOWN = {
    "gated_rms_norm": (norm_over_the_whole_width, "the norm is over all of the inner width (trap 2)"),
    "mlp": (lambda h, up, down: np.maximum(h @ up.T, 0) @ down.T, "relu is not squared (trap 5)"),
    "ssd_scan": (floor, "dt is held up at 0.001 in every call (trap 1)"),
    "route": (bias_that_weighs, "the correction bias weighs the experts"),
    "linear_pair": (
        lambda x, y, w: REFERENCE.linear_pair(y, x, w),
        "the hidden comes before the embedding (trap 7)",
    ),
}


@pytest.mark.parametrize("verb", KNOWN)
def test_a_known_mistake_is_named(verb):
    function, name = KNOWN[verb]
    (row,) = rows({verb: function}, verb, plan=Plan(examples=12))
    assert row.verdict == "wrong" and name in row.as_if and len(row.as_if) <= 3


def test_an_unknown_mistake_has_no_name():
    (row,) = rows({"mlp": lambda h, up, down: 1.01 * mlp(h, up, down)}, "mlp")
    assert row.verdict == "wrong" and not row.as_if
