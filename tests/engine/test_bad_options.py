"""Impossible options are refused in one sentence, and the statistics of a run belong to that run."""

import inspect
import json
import os
import re
import subprocess
import sys

import pytest
from threadpoolctl import threadpool_info, threadpool_limits

import refengine
from refengine import backend, bench
from refengine.conformance.cases import Case
from refengine.ranks.load import load as load_rank
from refengine.runner import LocalRunner
from refengine.spec.arrays import ITEMSIZE
from refengine.spec.config import Config, InputError
from refengine.spec.model import Model
from refengine.spec.ops import numpy_backend
from refengine.spec.tensors import active_parameters, parameters, table
from tests.engine.test_cli import cli, fails, piped  # noqa: F401
from tools.releases import NANO

CFG = Config.from_hf(NANO)


@pytest.mark.parametrize(
    "args, says",
    [
        (["--threads", 1025], "1<=x<=1024"),
        (["--timeout", 1e7], "0<x<=1000000"),
        (["--patience", "inf"], "0<x<=1000000"),
        (["--prompts", "y"], "give only one of"),
    ],
)
def test_an_option_out_of_range_says_what_the_range_is(cli, args, says):  # noqa: F811
    assert says in fails(cli("generate", "x", *args), code=2)


def test_a_file_without_a_name_is_one_sentence(cli):  # noqa: F811
    for args in (["generate", "--prompts", ""], ["generate", "--file", ""], ["score", ""]):
        assert "the name of the file is empty" in fails(cli(*args))


@pytest.mark.parametrize(
    "args, says",
    [
        (["--backend", "numpy", "--device", ""], "the numpy backend runs on the cpu, not on ''"),
        (["--backend", "numpy", "--device", "cuda"], "the numpy backend runs on the cpu"),
        (["--backend", "numpy", "--dtype", "float16"], "computes in float32 or float64, not in float16"),
        (["--backend", "cpu", "--device", "cuda"], "the cpu backend runs on the cpu"),
        (["--backend", "cpu", "--dtype", "float64"], "the cpu backend computes in float32"),
        (["--backend", "cuda", "--device", "cpu"], "the cuda backend runs on cuda or cuda:N, not on 'cpu'"),
    ],
)
def test_what_a_backend_cannot_do_is_one_sentence(cli, args, says):  # noqa: F811
    assert says in fails(cli("generate", "x", *args))


@pytest.mark.parametrize(
    "device, says",
    [
        ("gpu", "device 'gpu' is not one of cpu, cuda, cuda:N, auto"),
        ("", "device '' is not one of"),
        ("cuda:x", "device 'cuda:x' is not one of"),
        ("cpu:1", "device 'cpu:1' is not one of"),
        ("cuda:99", "this PyTorch sees no CUDA device|there is no cuda:99: this machine has"),
    ],
)
def test_a_device_that_pytorch_does_not_have_is_one_sentence(cli, device, says):  # noqa: F811
    pytest.importorskip("torch")
    assert re.search(says, fails(cli("generate", "x", "--backend", "torch", "--device", device)))


@pytest.mark.parametrize("name", backend.NAMES)
@pytest.mark.parametrize("threads", [0, -1, 2.5, 1025, 10**11])
def test_no_backend_takes_a_number_of_threads_that_a_library_would_die_of(name, threads):
    with pytest.raises(InputError, match=f"threads = {threads} is not a whole number from 1 to 1024"):
        backend.make(name, CFG, threads=threads)


@pytest.mark.parametrize("load", [refengine.load, load_rank])
@pytest.mark.parametrize(
    "choice, says",
    [
        ({"threads": 10**9}, "threads = 1000000000 is not a whole number from 1 to 1024"),
        ({"threads": 0}, "threads = 0 is not"),
        ({"threads": "2"}, "threads = '2' is not"),
        ({"batch": 0}, "batch = 0 is not a whole number from 1 on"),
        ({"cache": -1}, "cache = -1 is not a number of bytes from 0 on"),
        ({"cache_dir": "x"}, "cache_dir needs a number of bytes"),
        ({"model": None}, "the model is None"),
        ({"model": 5}, "the model is of type int"),
    ],
)
def test_one_process_and_a_rank_refuse_the_same_choices_before_any_work(monkeypatch, load, choice, says):
    for work in ("threadpoolctl.threadpool_limits", "refengine.checkpoint.Checkpoint.open"):
        monkeypatch.setattr(work, lambda *_: pytest.fail("work was done"))
    with pytest.raises(InputError, match=says):
        load(**choice)


def test_a_benchmark_that_cannot_fit_is_one_sentence(cli):  # noqa: F811
    said = fails(cli("bench", "--batch", 10**9, "--context", 16384))
    assert re.search(r"1000000000 sequences of 16384 tokens need .* and .* of memory are free", said)


def test_statistics_of_several_texts_are_numbered_and_summed_up(cli, tmp_path):  # noqa: F811
    (tmp_path / "prompts").write_text("Once\nOnce upon a time\nOne day\n")
    args = ["generate", "--prompts", tmp_path / "prompts", "-n", 5, "--stats", "--ignore-eos"]
    for how in ([], ["--json"], ["--logprobs", 1]):
        code, _, err = cli(*args, *how)
        *texts, together = err.splitlines()
        assert code == 0 and [line[:3] for line in texts] == ["0  ", "1  ", "2  "]
        assert together.startswith("all 3: prompts of ") and "and 15 new ones in " in together


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="there is no /proc/self/status")
def test_peak_memory_is_not_that_of_the_process_that_started_this_one():
    """A parent of 400 MB starts `generate`, which needs a quarter of that."""
    child = [sys.executable, "-m", "refengine", "generate", "x", "-n", "1", "--json"]
    parent = f"import subprocess; held = b'x' * 400_000_000; subprocess.run({child!r}, check=True)"
    out = subprocess.run([sys.executable, "-c", parent], capture_output=True, check=True).stdout
    assert 40e6 < json.loads(out)["statistics"]["peak_memory_bytes"] < 300e6


def test_a_prompt_is_named_by_where_it_came_from(tmp_path):
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    assert "latin is not UTF-8 text (byte 3)" in fails(piped(["generate", "-f", str(tmp_path / "latin")]))
    assert "standard input is not UTF-8 text (byte 3)" in fails(piped(["generate"], b"caf\xe9"))
    assert "standard input holds no prompt" in fails(piped(["generate", "--prompts", "-"], b"\n"))


def test_what_the_torch_backend_is_told_reaches_it(monkeypatch):
    pytorch, told = pytest.importorskip("refengine.backends.pytorch"), {}
    bind = inspect.signature(pytorch.torch_backend).bind
    monkeypatch.setattr(pytorch, "torch_backend", lambda *a, **how: told.update(bind(*a, **how).arguments))
    asked = {"dtype": "bfloat16", "device": "cpu", "threads": 3, "deterministic": True}
    backend.make("torch", CFG, **asked)
    assert asked.items() <= told.items()


def test_threads_are_those_of_the_products():
    with threadpool_limits(1):
        refengine.load("tiny", threads=2)
        assert {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"} <= {2}


@pytest.mark.parametrize("dtype, share", [("float32", 1.0), ("float64", 1.0), ("bfloat16", 0.25)])
def test_weights_may_take_half_of_the_free_memory_and_no_more(monkeypatch, dtype, share):
    need = share * parameters(table(CFG)) * ITEMSIZE[dtype]
    for free, enough in ((2 * need, True), (2 * need - 2, False)):
        monkeypatch.setattr(backend, "available_memory", lambda free=free: free)
        assert backend.fits(CFG, dtype, share) is enough


def test_the_bytes_of_a_step_are_in_the_dtype_in_which_S_is_stored(monkeypatch):
    case, read = Case(layers="MM*", batch=1), {}
    for name in ("decode_seconds", "matrix_peak", "read_bandwidth"):  # so that a share is a number of bytes
        monkeypatch.setattr(bench, name, lambda *args: 1.0)
    for ssm in ("float32", "float16"):
        built = LocalRunner(Model.build(case.cfg, case.read, numpy_backend(ssm=ssm)))
        *_, row = bench.bench(built, "float32", 1, [], [3], [5])
        read[ssm] = row["share"]
    numbers = 2 * case.cfg.mamba_num_heads * case.cfg.mamba_head_dim * case.cfg.ssm_state_size
    assert read["float32"] - read["float16"] == 3 * 2 * numbers


def test_the_figures_of_bench_are_what_their_names_say(monkeypatch):
    case = Case(layers="M*E-", batch=1)
    built = LocalRunner(Model.build(case.cfg, case.read, numpy_backend()))
    measured = {"seconds": 0.5, "decode_seconds": 0.25, "matrix_peak": 1e9, "read_bandwidth": 1e8}
    for name, value in measured.items():
        monkeypatch.setattr(bench, name, lambda *args, value=value: value)
    machine, prefill, decode = bench.bench(built, "float32", 1, [7], [3], [5])
    assert (machine["matrix_peak"], machine["bandwidth"]) == (1e9, 1e8)
    assert prefill["tokens_per_second"] == 14
    assert prefill["share"] == pytest.approx(2 * 14 * active_parameters(case.cfg) / 1e9)
    assert (decode["tokens_per_second"], decode["milliseconds"]) == (12, 250)
    assert decode["share"] == pytest.approx(4 * bench.bytes_a_step(case.cfg, 4, 4, 3, 5) / 1e8)


def test_a_seed_of_more_than_64_bits_is_refused_and_the_largest_draws_and_rounds():
    with refengine.load("tiny", ssm_dtype="float16") as engine:
        assert list(engine.generate("Once", seed=2**64 - 1, max_tokens=2))
        with pytest.raises(InputError, match="is more than 18446744073709551615"):
            next(engine.generate("Once", seed=2**64, max_tokens=2))
