"""The trainer's module computes the spec's model; packing, exporting and resuming do not change results."""

import argparse
import json
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tools.tiny import kernels  # noqa: E402
from tools.tiny import train as train_tiny  # noqa: E402
from tools.tiny.card import MARKS, curve, write_figures  # noqa: E402
from tools.tiny.model import Experts, TinyModel, export_state, import_state, scan  # noqa: E402
from tools.tiny.optim import Optimizer, orthogonalize, split_parameters  # noqa: E402
from tools.tiny.ranks import Ranks, Shared  # noqa: E402
from tools.tiny.readme import updated  # noqa: E402
from tools.tiny.rows import Rows  # noqa: E402
from tools.tiny.step_time import minutes  # noqa: E402
from tools.tiny.stories import words  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "refengine/models/tiny"


@pytest.fixture(scope="module")
def small():
    """Return a small model of the same pattern, with random weights."""
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


def test_the_files_are_small_and_made_of_blocks():
    """Widths are multiples of 64, the blocks of NVFP4 in GGUF; at most 9 MB, in all files together."""
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) <= 9_000_000
    assert 3_500_000 < sum(t.numel() for t in export_state(TinyModel(train_tiny.CONFIG)).values()) < 4_500_000
    for cfg in (json.loads((SHIPPED / "config.json").read_text()), train_tiny.CONFIG):
        assert all(width % 64 == 0 for width in _widths(cfg))


def _widths(cfg):
    """Return the widths along which matrices are packed in blocks."""
    return (
        cfg["hidden_size"],
        cfg["moe_latent_size"],
        cfg["moe_intermediate_size"],
        cfg["moe_shared_expert_intermediate_size"],
        cfg["mamba_num_heads"] * cfg["mamba_head_dim"],
        cfg["num_attention_heads"] * cfg["head_dim"],
    )


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


@pytest.mark.thorough
def test_one_batch_can_be_learned(small):
    """A few steps on one row lower both losses, and every part of the model gets its gradient."""
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


def test_compiled_loops_are_the_layer_and_its_gradient():
    """Losses and every gradient agree between the compiled loops and the PyTorch form of the layer."""
    if kernels.load() is None:
        pytest.skip("no C++ compiler")
    torch.manual_seed(5)
    model = TinyModel({**train_tiny.CONFIG, "vocab_size": 96, "hidden_size": 64, "n_routed_experts": 4})
    ids, first = torch.randint(18, 96, (2, 64)), torch.zeros(2, 64, dtype=torch.bool)
    first[:, 0] = first[0, 13] = first[1, 33] = first[1, 34] = True

    def gradients():
        model.zero_grad()
        main, mtp = model.losses(ids, first, torch.ones(2, 64))
        (main + mtp).backward()
        return {"main": main.detach(), **{n: p.grad.clone() for n, p in model.named_parameters()}}

    assert kernels.fits(model.cfg, 64)
    compiled = gradients()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "load", lambda: None)
        plain = gradients()
    for name, value in plain.items():
        scale = max(1e-3, float(value.abs().max()))
        torch.testing.assert_close(compiled[name], value, atol=2e-5 * scale, rtol=1e-4, msg=name)


def test_experts_sorted_by_token_are_the_sum_over_experts():
    torch.manual_seed(6)
    t, e, width, latent, k = 12, 5, 6, 4, 2
    u, up, down, w = (
        torch.randn(*s, requires_grad=True, dtype=torch.float64)
        for s in ((t, latent), (e, width, latent), (e, latent, width), (t, k))
    )
    idx = torch.stack([torch.randperm(e - 1)[:k] for _ in range(t)])  # the last expert gets nothing

    def plain():
        hidden = torch.relu(torch.einsum("tl,eil->tei", u, up)).square()
        y = torch.einsum("tei,eli->tel", hidden, down)
        return (y.gather(1, idx[..., None].expand(-1, -1, latent)) * w[..., None]).sum(1)

    def sorted_():
        return Experts.apply(u, up, down, idx, w, torch.bincount(idx.reshape(-1), minlength=e))

    aim = torch.randn(t, latent, dtype=torch.float64)
    one, two = (torch.autograd.grad(((f() - aim) ** 2).sum(), (u, up, down, w)) for f in (plain, sorted_))
    torch.testing.assert_close(sorted_(), plain())
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b)


def test_the_plan_goes_by_steps():
    plan = train_tiny.Plan(100, 200, 1000)
    assert [plan.stage(s) for s in (0, 99, 100, 299, 300, 1299)] == [
        ("pairs", 0), ("pairs", 99), ("skills", 0), ("skills", 199), ("world", 0), ("world", 999)
    ]  # fmt: skip
    rates = [plan.rate(s) for s in range(300, 1300)]
    assert rates == sorted(rates, reverse=True) and 0 < rates[-1] < 0.06 * rates[0]
    assert [plan.dense(s) for s in (0, 20, 30, 40)] == [(2, True), (4, True), (8, True), (None, False)]
    assert plan.dense(101) == (None, False) and plan.dense(100) is None and plan.dense(302) is None
    assert plan.share(150) == 1.0 and plan.share(400) > plan.share(700) and plan.share(1200) == 0.0
    with pytest.raises(argparse.ArgumentTypeError):
        train_tiny.stages("5,0,3")


def test_rows_are_a_function_of_seed_rank_and_step():
    tokenizer = pytest.importorskip("tokenizers").Tokenizer.from_file(str(SHIPPED / "tokenizer.json"))

    def rows(seed, rank):
        return Rows(tokenizer, seed, rank, 512, 256)

    through = rows(1, 0)
    first = [through.documents(step, 0.5) for step in range(34)]
    for step in (33, 5):  # another start, another order
        assert all(
            np.array_equal(a, b) for a, b in zip(rows(1, 0).documents(step, 0.5), first[step], strict=True)
        )
    assert all(np.array_equal(a, b) for a, b in zip(rows(1, 0).dense(7, 4), through.dense(7, 4), strict=True))
    others = [rows(2, 0).documents(5, 0.5), rows(1, 1).documents(5, 0.5), first[4]]
    assert not any(np.array_equal(other[0], first[5][0]) for other in others)


@pytest.mark.thorough
def test_two_ranks_with_the_same_rows_take_the_step_of_one(small):
    """Gradients are averaged and matrices divided; both ranks end with the bits of a single one."""
    ids, first = torch.randint(18, 96, (2, 32)), torch.zeros(2, 32, dtype=torch.bool)
    first[:, 0] = True

    def model():
        torch.manual_seed(7)
        return TinyModel(small.cfg)

    alone = _steps(Ranks(), model(), ids, first)
    memory, barrier = torch.zeros(3, len(alone.values)), threading.Barrier(2)
    with ThreadPoolExecutor(2) as pool:
        ranks = [Shared(rank, 2, memory, barrier) for rank in range(2)]
        pair = list(pool.map(lambda r, m: _steps(r, m, ids, first), ranks, [model(), model()]))
    assert pair[0].mine["muon"] and not {s[0] for s in pair[0].mine["muon"]} & {
        s[0] for s in pair[1].mine["muon"]
    }
    for name in ("values", "average", "momentum", "second"):
        ours, theirs = (getattr(optimizer, name) for optimizer in pair)
        assert torch.equal(ours, theirs), name
    torch.testing.assert_close(pair[0].values, alone.values, atol=1e-4, rtol=1e-3)


def _steps(ranks, model, ids, first):
    """Take three steps on one rank."""
    optimizer = Optimizer(model, ranks)
    for step in range(3):
        main, mtp = model.losses(ids, first, torch.ones(2, 32), step % 2 == 0)
        (main if mtp is None else main + mtp).backward()
        optimizer.step(0.02, 3e-3, step % 2 == 0)
    return optimizer


SMALL = {
    "hidden_size": 64, "n_routed_experts": 4, "moe_intermediate_size": 16, "moe_latent_size": 32,
    "moe_shared_expert_intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1,
}  # fmt: skip


def _command(out, *more):
    return [
        sys.executable, "-m", "tools.tiny.train", "--seed", "3", "--out", str(out), "--stages", "3,4,7",
        "--tokens", "256", "--length", "256", "--documents", "60", "--save-every", "2", "--figures", "0",
        "--config", str(out.parent / "small.json"), *more,
    ]  # fmt: skip


@pytest.mark.thorough
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path):
    """Two processes, SIGKILL, --resume: weights, state and losses equal those of an undisturbed run."""
    (tmp_path / "small.json").write_text(json.dumps(SMALL))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(_command(whole), cwd=ROOT, check=True, capture_output=True)
    run = subprocess.Popen(_command(killed), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    state = killed / "run" / "state.pt"
    until = time.monotonic() + 900
    while not state.exists() and time.monotonic() < until and run.poll() is None:
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    reached = torch.load(state, weights_only=True)["step"]
    assert 0 < reached < 14
    again = subprocess.run(_command(killed), cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 2 and "--resume" in again.stderr
    done = subprocess.run(_command(killed, "--resume"), cwd=ROOT, check=True, capture_output=True, text=True)
    assert "resumed at step" in done.stdout
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes(), name
    one, two = (torch.load(out / "run" / "state.pt", weights_only=True) for out in (whole, killed))
    for name in ("values", "momentum", "first", "second", "average"):
        assert torch.equal(one["optimizer"][name], two["optimizer"][name]), name
    logs = [
        [json.loads(line) for line in (out / "run" / "log.jsonl").read_text().splitlines()]
        for out in (whole, killed)
    ]
    assert [{**line, "minutes": 0} for line in logs[0]] == [{**line, "minutes": 0} for line in logs[1]]
    names = {path.name for path in whole.iterdir()} - {"run"}
    assert names == {path.name for path in SHIPPED.iterdir()} - {"samples.md"}
    card = (whole / "README.md").read_text()
    assert all(mark in card for mark in MARKS) and "curve.svg" in card


def test_the_estimate_counts_every_kind_of_step():
    parts = {
        "trunk": 1.0, "trunk and prediction head": 1.4, "trunk, dense rows": 0.5, "rows": 3.2,
        "Muon, all matrices": 0.6, "Adam and average": 0.1, "exchange": 0.1,
    }  # fmt: skip
    plan = train_tiny.Plan(60, 40, 100)  # 60 dense steps, then 10 of 40 and 5 of 100
    steps = 75 * 0.5 + 125 * (1.0 + 0.1) + 200 * (0.2 + 0.3 + 0.1 + 0.1)
    assert minutes(parts, plan) == pytest.approx(steps / 60)


def test_figures_go_between_the_marks_of_the_card(tmp_path):
    card = tmp_path / "README.md"
    card.write_text(f"before\n{MARKS[0]}\nold\n{MARKS[1]}\nafter\n")
    for value in ("0.5", "0.7"):
        write_figures(card, [("copying", value, ">= 0.9 MISSED")])
    text = card.read_text()
    assert "| copying | 0.7 | >= 0.9 MISSED |" in text and "old" not in text and "0.5" not in text
    assert text.startswith("before") and text.rstrip().endswith("after")


def test_story_answer_and_size_go_into_the_readme():
    text = (ROOT / "README.md").read_text()
    new = updated(text, 12, "Once.\n\nThe end.\n", "Tom.\n", 5_160_000)
    assert '"Once upon a time" --seed 12\n```\n\n> Once.\n>\n> The end.\n\n' in new
    assert re.search(r"```sh\nrefengine chat .*\n```\n\n> Tom\.\n\n", new)
    assert (
        "It has 5.2 million parameters" in new
        and updated(new, 12, "Once.\n\nThe end.", "Tom.", 5_160_000) == new
    )
    kept = [line for line in text.splitlines() if line[:1] not in (">", "") and "seed" not in line]
    assert all(line in new for line in kept if "million parameters" not in line)


def test_the_curve_is_drawn_from_the_log():
    lines = [{"step": s, "loss": 8.0 / s, "mtp": 9.0 / s} for s in (20, 40, 60)] + [
        {"step": 60, "held_out": 1.0}
    ]
    drawn = curve(lines)
    assert drawn.startswith("<svg") and drawn.count("<polyline") == 3 and "60 steps" in drawn
