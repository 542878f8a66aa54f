"""Packed weights on the torch backend give the results of their dequantized matrices, and stay packed."""

from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import refengine
from refengine.backends.pytorch import products, weights
from refengine.backends.pytorch.packed import OnDevice, OnHost, e4m3, power
from refengine.checkpoint import Checkpoint
from refengine.conformance.cases import agree
from refengine.spec import moe
from refengine.spec.quant import E4M3, Packed
from refengine.spec.tensors import Group, groups, table
from tests.support.packed import CFG, FORMATS, all_in, mixed, packed_checkpoint
from tests.support.torch_benches import Torch, torch, values

FORMS = ("host", "device")
KINDS = tuple(FORMATS)
BENCHES = [
    Torch("torch-float32", "float32"),
    Torch("torch-float32-plain", "float32", compiled=False),
    Torch("torch-bfloat16-units", "bfloat16", "bfloat16"),
]
LOOPS, PLAIN, UNITS = BENCHES
on_each = pytest.mark.parametrize("how", BENCHES, ids=lambda how: how.name)
on_each_form = pytest.mark.parametrize(
    ("how", "form"),
    [(LOOPS, "host"), (PLAIN, "host"), (PLAIN, "device"), (UNITS, "host"), (UNITS, "device")],
    ids=lambda each: getattr(each, "name", each),
)
each_kind = pytest.mark.parametrize("kind", KINDS)
SEED = st.integers(0, 9999)
A_FEW = settings(max_examples=max(3, settings.default.max_examples // 6))


@pytest.fixture(autouse=True)
def one_thread():
    """Use one thread: small products on several threads wait long for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def packed(kind: str, seed: int, rows: int, columns: int) -> Packed:
    """Return random numbers packed in a format."""
    w = np.random.default_rng([seed, rows, columns]).standard_normal((rows, columns)) * columns**-0.5
    return FORMATS[kind](w.astype(ml_dtypes.bfloat16))


def place(how, *given, form="host", name="in_proj.weight"):
    """Return placed weights, in the form of a device other than the CPU if the parameter has it."""
    group = Group("layers.0", True, name, [SimpleNamespace(precision="matrix")])
    if form == "host":
        return how().place(group, list(given))
    cpu = torch.device("cpu")
    placed = [weights.packed_on(w, cpu) for w in given]
    return (
        weights.Apart(list(zip(placed[::2], placed[1::2], strict=True))) if name == "experts" else placed[0]
    )


def matrices(*given):
    """Return the weights dequantized."""
    return [w.dequantize() for w in given]


@on_each_form
@each_kind
@A_FEW
@given(seed=SEED, rows=st.integers(1, 40), blocks=st.integers(1, 3), o=st.integers(1, 40))
def test_a_packed_matrix_multiplies_as_its_matrix(how, kind, form, seed, rows, blocks, o):
    here, i = how(), 32 * blocks
    w, x = packed(kind, seed, o, i), values(how, seed, 1, rows, i)
    (matrix,) = (how.rounded(m) for m in matrices(w))
    weight = place(how, w, form=form)
    for name in ("linear", "logits"):
        how.near(here.fetch(getattr(here.ops, name)(here.give(x), weight)), x @ matrix.T, i, name)
    ids = np.random.default_rng(seed).integers(0, o, (2, 3))
    np.testing.assert_array_equal(here.fetch(here.ops.embed(here.array(ids), weight)), matrix[ids])
    half = i // 2
    pair = here.ops.linear_pair(here.give(x[..., :half]), here.give(x[..., half:]), weight)
    how.near(here.fetch(pair), x @ matrix.T, i, "linear_pair")


@each_kind
@on_each
def test_q_k_and_v_may_be_of_several_kinds(how, kind):
    here, x = how(), values(how, 0, 1, 5, 64)
    parts = [packed(kind, 1, 24, 64), packed("FP8", 2, 8, 64)]
    plain = values(how, 3, 8, 64).astype(np.float32)
    group = Group("layers.0", True, "qkv_proj", [SimpleNamespace(precision="matrix")] * 3)
    weight = here.place(group, [*parts, plain])
    whole = np.concatenate([*(how.rounded(m) for m in matrices(*parts)), plain])
    how.near(here.fetch(here.ops.linear(here.give(x), weight)), x @ whole.T, 64)


@on_each_form
@each_kind
@A_FEW
@given(seed=SEED, tokens=st.integers(1, 9), first=st.sampled_from((0, 2)))
def test_packed_experts_and_mlps_compute_as_their_matrices(how, kind, form, seed, tokens, first):
    here, rng, x, f, E, k = how(), np.random.default_rng(seed), 32, 96, 5, 2
    given = [packed(kind, seed + e, *shape) for e in range(E) for shape in ((f, x), (x, f))]
    exact = [how.rounded(m) for m in matrices(*given)]
    u, weight = values(how, seed, 1, tokens, x), how.rounded(rng.random((1, tokens, k)))
    expert = np.argsort(rng.random((1, tokens, E)))[..., :k]
    pairs = list(zip(exact[::2], exact[1::2], strict=True))
    wanted = moe.experts(u, pairs[first:], moe.Routing(expert, weight), first)
    placed = place(how, *given[2 * first :], form=form, name="experts")
    routing = moe.Routing(here.array(expert), here.array(weight.astype(np.float32)))
    found = here.ops.experts(here.give(u), placed, routing, first=first)
    how.near(here.fetch(found), wanted, x + f * k, "experts")
    up, down = (place(how, w, form=form) for w in given[:2])
    how.near(here.fetch(here.ops.mlp(here.give(u), up, down)), moe.mlp(u, *exact[:2]), x + f, "mlp")


@each_kind
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_numbers_on_a_device_are_those_of_the_definition_bit_by_bit(kind, dtype):
    w = packed(kind, 0, 48, 96)
    there, wide = weights.packed_on(w, torch.device("cpu")), np.dtype(getattr(ml_dtypes, dtype, dtype))
    for rows in (slice(None), slice(3, 17), np.array([[5, 5], [0, 47]])):
        mine = there[torch.from_numpy(rows) if isinstance(rows, np.ndarray) else rows]
        found = weights.Host(torch.device("cpu")).fetch(mine.dequantize(getattr(torch, dtype)))
        assert found.tobytes() == w[rows].dequantize(wide).tobytes() and mine.shape == w[rows].shape
    assert there.nbytes == w.codes.nbytes + (w.scale.nbytes if w.scale.ndim else 0)


def test_every_code_and_scale_on_a_device_is_that_of_the_definition():
    every = np.arange(256, dtype=np.uint8)
    assert np.array_equal(e4m3(torch.from_numpy(every)).numpy(), E4M3, equal_nan=True)
    exponents = power(torch.from_numpy(every[:255])).numpy()
    assert np.array_equal(exponents, np.ldexp(np.float32(1), np.arange(255) - 127)) and exponents[0] > 0
    codes = np.tile(every, (255, 1))
    for scale_2 in (1e-30, 0.0, 3.7):
        scale = np.repeat(every[:255, None] & 0x7E, 32, axis=1)
        w = Packed("NVFP4", codes, scale, np.float32(scale_2))
        found = weights.packed_on(w, torch.device("cpu")).dequantize(torch.float32).numpy()
        assert found.tobytes() == w.dequantize().tobytes()
    zeros = Packed("FP8", codes, np.array(0, np.float32))
    assert not weights.packed_on(zeros, torch.device("cpu")).dequantize(torch.float32).any()


IDS = [3, 99, 41, 7, 100, 12, 64, 5, 3]


@pytest.mark.parametrize(("choice", "dtype"), [("mixed", "auto"), ("NVFP4", "float32")])
def test_a_packed_model_computes_as_on_numpy(choice, dtype, tmp_path):
    path = packed_checkpoint(tmp_path, mixed if choice == "mixed" else all_in(choice))
    with refengine.load(path, backend="torch", dtype=dtype) as engine, refengine.load(path) as exact:
        assert not engine.checkpoint.notes
        wanted = exact.logits(IDS)
        agree(engine.logits(IDS), wanted, np.float32, terms=CFG.hidden_size)
        states, rows = engine.model.new_states(1), []
        for token in IDS:  # as it is generated: a step at a time
            y, states = engine.model.backend.step(engine.model, np.array([token]), states)
            rows.append(y[0])
        agree(np.array(rows), wanted, np.float32, terms=CFG.hidden_size)


def test_packed_weights_stay_in_the_memory_map(tmp_path):
    """With the compiled loops and without them."""
    path = packed_checkpoint(tmp_path)
    checkpoint, rows = Checkpoint.open(path), groups(table(CFG))
    for how in BENCHES:
        place = how().place
        for group in rows:
            values = [checkpoint.read(row.name) for row in group.rows]
            if not all(isinstance(value, np.ndarray) for value in values):
                placed = place(group, values)
                found = sum(getattr(placed, "matrices", [(placed,)]), ())
                for weight, value in zip(found, values, strict=True):
                    weight = weight.weight if isinstance(weight, OnHost) else weight
                    assert isinstance(weight, Packed) and weight.codes.base is value.codes.base
                    if (
                        value.kind == "NVFP4" and value.block == 16
                    ):  # the loops repeat scales of larger blocks
                        assert weight.scale.base is value.scale.base
    model = refengine.load(path, backend="torch", dtype="float32").model
    plain = model.weights[""]["embeddings.weight"]
    assert plain.dtype == torch.bfloat16, "beside packed weights a plain one stays as it is in the file"


@pytest.mark.parametrize("form", FORMS)
def test_a_piece_at_a_time_is_dequantized(form, monkeypatch):
    sizes = []
    of = {"host": OnHost, "device": OnDevice}[form]
    dequantize = of.dequantize

    def counted(self, dtype):
        sizes.append(self.shape)
        return dequantize(self, dtype)

    monkeypatch.setattr(of, "dequantize", counted)
    monkeypatch.setattr(products, "PIECE", 640)
    how = PLAIN
    w, x = packed("NVFP4", 0, 47, 64), values(how, 0, 1, 3, 64)
    y = how().fetch(how().ops.linear(how().give(x), place(how, w, form=form)))
    how.near(y, x @ w.dequantize().astype(np.float64).T, 64)
    assert sizes == [(10, 64)] * 4 + [(7, 64)]
