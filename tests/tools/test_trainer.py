"""Laws of the training tool: its module is the spec's model, and packing, exporting and resuming change
nothing."""

from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tools.tiny import train as train_tiny  # noqa: E402
from tools.tiny.model import TinyModel, export_state, import_state, scan  # noqa: E402
from tools.tiny.optim import orthogonalize, split_parameters  # noqa: E402
from tools.tiny.stories import words  # noqa: E402

SHIPPED = Path(__file__).resolve().parents[2] / "refengine/models/tiny"


@pytest.fixture(scope="module")
def small():
    """A small model of the same pattern, with random weights."""
    torch.manual_seed(0)
    return TinyModel(
        {
            **train_tiny.CONFIG,
            "vocab_size": 96,
            "hidden_size": 48,
            "n_routed_experts": 8,
            "moe_intermediate_size": 16,
            "moe_latent_size": 32,
            "chunk_size": 8,
        }
    )


def _starts(length, *at):
    first = torch.zeros(1, length, dtype=torch.bool)
    first[0, [0, *at]] = True
    return first


def test_the_chunked_scan_is_the_recurrence_and_stops_at_borders():
    torch.manual_seed(1)
    length, h, p, g, n = 32, 4, 3, 2, 5
    x, dt = torch.randn(1, length, h, p), torch.rand(1, length, h)
    B, C, A = torch.randn(1, length, g, n), torch.randn(1, length, g, n), -torch.rand(h) - 0.5
    first = _starts(length, 11, 24)
    S, y = torch.zeros(h, p, n), torch.empty(length, h, p)
    for t in range(length):
        S = S * 0 if first[0, t] else S
        b, c = (m[0, t].repeat_interleave(h // g, 0) for m in (B, C))
        S = (dt[0, t] * A).exp()[:, None, None] * S + (dt[0, t, :, None] * x[0, t])[..., None] * b[:, None]
        y[t] = (S @ c[..., None])[..., 0]
    for chunk in (4, 8, 32):
        torch.testing.assert_close(scan(x, dt, A, B, C, first, chunk)[0], y, atol=1e-5, rtol=1e-5)


def test_a_packed_document_is_as_if_alone(small):
    ids = torch.randint(18, 96, (1, 40))
    with torch.no_grad():
        packed = small.hidden(ids, _starts(40, 16))[:, 16:]
        alone = small.hidden(ids[:, 16:], _starts(24))
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-4)


def test_export_and_import_are_inverse(small):
    exported = export_state(small)
    copy = TinyModel(small.cfg)
    import_state(copy, exported)
    again = export_state(copy)
    assert exported.keys() == again.keys()
    assert all(torch.equal(exported[k], again[k]) for k in exported)


def test_exported_names_and_shapes_are_the_released_ones(small):
    table = pytest.importorskip("refengine.spec.tensors").table
    from refengine.spec.config import Config

    wanted = {t.name: tuple(t.shape) for t in table(Config.from_hf(small.cfg))}
    assert {k: tuple(v.shape) for k, v in export_state(small).items()} == wanted


def test_the_shipped_file_means_the_same_to_spec_and_trainer():
    refengine = pytest.importorskip("refengine")
    engine = refengine.load(str(SHIPPED))
    model = train_tiny.read_checkpoint(SHIPPED)
    ids = np.random.default_rng(0).integers(18, model.cfg["vocab_size"], 64)
    with torch.no_grad():
        ours = model.lm_head(model.hidden(torch.tensor(ids)[None], _starts(64)))[0].numpy()
    theirs = engine.logits(ids.tolist())
    assert np.abs(ours - theirs).max() <= 1e-4 * max(1.0, np.abs(ours).max())


def test_the_shipped_file_is_small_and_made_of_blocks_of_16():
    assert (SHIPPED / "model.safetensors").stat().st_size <= 9_000_000
    cfg = train_tiny.CONFIG
    widths = (
        cfg["hidden_size"],
        cfg["moe_latent_size"],
        cfg["moe_intermediate_size"],
        cfg["moe_shared_expert_intermediate_size"],
        cfg["mamba_num_heads"] * cfg["mamba_head_dim"],
        cfg["num_attention_heads"] * cfg["head_dim"],
    )
    assert all(w % 16 == 0 for w in widths)


def test_dense_recall_rows_ask_only_what_they_told():
    tokenizer = pytest.importorskip("tokenizers").Tokenizer.from_file(str(SHIPPED / "tokenizer.json"))
    source = train_tiny.Pairs(tokenizer, 0)
    for source.count in (2, 4, 8):
        ids, _, weight = source.batch(8)
        for r, (row, w) in enumerate(zip(ids, weight, strict=True)):
            asked = np.flatnonzero(w)
            assert len(asked)
            if r % 4 < 2:
                told = dict(zip(row[0 : 2 * source.count : 2], row[1 : 2 * source.count : 2], strict=True))
                assert len(told) == source.count
                assert all(told[row[i - 1]] == row[i] for i in asked)
            else:
                assert all(row[i] in row[:i] for i in asked)
    assert len(source.keys) == len(words.NAMES) and len(source.values) == len(words.THINGS)


def test_muon_steps_are_nearly_orthogonal(small):
    torch.manual_seed(2)
    for shape in ((12, 30), (30, 12), (5, 16, 16)):
        s = torch.linalg.svdvals(orthogonalize(torch.randn(*shape)))
        assert s.min() > 0.3 and s.max() < 1.5
    muon, adam = split_parameters(small)
    assert len(muon) + len(adam) == len(list(small.parameters()))
    assert all(p.ndim >= 2 for p in muon)


def test_one_batch_can_be_learned(small):
    """A few steps on one row lower both losses: every part of the model receives its gradient."""
    torch.manual_seed(3)
    ids, first = torch.randint(18, 96, (2, 32)), torch.zeros(2, 32, dtype=torch.bool)
    first[:, 0] = True
    model = TinyModel(small.cfg)
    opt = torch.optim.Adam(model.parameters(), lr=3e-3)
    seen = []
    for _ in range(15):
        main, mtp = model.losses(ids, first, torch.ones(2, 32))
        opt.zero_grad()
        (main + mtp).backward()
        opt.step()
        seen.append((float(main.detach()), float(mtp.detach())))
    assert seen[-1][0] < 0.8 * seen[0][0] and seen[-1][1] < 0.8 * seen[0][1]
    assert all(p.grad is not None for p in model.parameters())


def test_stopping_and_resuming_goes_on_where_it_was(small, tmp_path):
    """The weights, their average, both optimizers and the counters come back; the next step is the same."""
    tokenizer = pytest.importorskip("tokenizers").Tokenizer.from_file(str(SHIPPED / "tokenizer.json"))
    args = Namespace(work=str(tmp_path), average=0.9, stage="pairs", init=None, seed=0)
    torch.manual_seed(4)
    ids, first = torch.randint(18, 96, (2, 32)), torch.zeros(2, 32, dtype=torch.bool)
    first[:, 0] = True
    batch = ids, first, torch.ones(2, 32)
    one = train_tiny.Trainer(TinyModel(small.cfg), tokenizer, args)
    for _ in range(3):
        one.learn(batch, 0.5)
    one.save()
    two = train_tiny.Trainer(TinyModel(small.cfg), tokenizer, args)
    assert two.resume() and (two.step, two.age, two.tokens) == (3, 3, 192)
    for trainer in (one, two):
        trainer.learn(batch, 0.5)
    ours, theirs = one.average.values, two.average.values
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
