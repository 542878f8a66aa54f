"""`refengine quantize` may be killed, or meet a full disk, at any moment, without a partial or lost file."""

import os
import random
import resource
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest

from refengine.checkpoint import Checkpoint
from refengine.quantize import quantize, recipe_of
from refengine.quantize import write as module
from refengine.quantize.write import STATE
from refengine.spec.config import InputError
from refengine.text.chat_template import ChatTemplate
from tests.support.checkpoints import random_checkpoint
from tests.support.packed import CFG

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="a system without fork"),
    pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning"),
]
SHARD = 20_000  # bytes: a dozen files


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return random_checkpoint(tmp_path_factory.mktemp("model"), CFG)


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """Return the files of an undisturbed run."""
    out = tmp_path_factory.mktemp("whole") / "out"
    quantize(model, out, recipe_of("ultra"), shard=SHARD)
    return files(out)


def files(path):
    return {each.name: each.read_bytes() for each in sorted(Path(path).iterdir())}


def started(work) -> int:
    """Return the process of this work; on an InputError it prints the error and exits with 3."""
    if process := os.fork():
        return process
    with suppress(BaseException):
        try:
            work()
            os._exit(0)
        except InputError as error:
            os.write(2, f"{error}\n".encode())
    os._exit(3)


def ended(process: int) -> int:
    """Return the exit code of a process, or minus the number of the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def killed_again_and_again(model, out, whole, kills: int, seed: int) -> int:
    """Kill runs at random moments until one ends; return how many were killed.

    A timer kills, because this process might be late on a busy machine.
    """
    rng, done = random.Random(seed), 0

    def work():
        if done < kills:
            signal.setitimer(signal.ITIMER_REAL, after)
        put = module._put
        module._put = lambda *args: (time.sleep(0.0005), put(*args))[1]
        quantize(model, out, recipe_of("ultra"), shard=SHARD)

    while True:
        after = rng.uniform(0.0001, 0.06)
        if (code := ended(started(work))) == 0:
            return done
        assert code == -signal.SIGALRM
        done += 1
        if out.exists():
            found = {name: raw for name, raw in files(out).items() if not name.startswith(".")}
            assert all(raw == whole[name] for name, raw in found.items())
            with suppress(InputError):
                Checkpoint.open(out)
                assert "config.json" in found


@pytest.mark.parametrize("seed", range(2))
def test_a_run_that_is_killed_goes_on(model, whole, seed, tmp_path):
    assert killed_again_and_again(model, tmp_path / "out", whole, 10, seed) >= 6
    assert files(tmp_path / "out") == whole


@pytest.mark.thorough
def test_runs_that_are_killed_a_hundred_times_go_on(model, whole, tmp_path):
    done = seed = 0
    while done < 100:
        done += killed_again_and_again(model, tmp_path / f"{seed}", whole, 12, 100 + seed)
        assert files(tmp_path / f"{seed}") == whole
        seed += 1


@pytest.mark.parametrize("room", [0, 100, 5_000, 19_000])
def test_where_a_file_cannot_grow_it_is_one_sentence_and_the_next_run_goes_on(
    room, model, whole, tmp_path, capfd
):
    """A limit on file sizes acts like a full disk: a write fails."""
    before, out = files(model), tmp_path / "out"

    def work():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        free = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, free[1]))
        try:
            quantize(model, out, recipe_of("ultra"), shard=SHARD)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, free)  # stdout may be a file

    code, said = ended(started(work)), capfd.readouterr().err
    assert code == 3 and f"cannot write {out}: File too large" in said and len(said.splitlines()) == 1
    assert ("the same command goes on from here" in said) == (out / STATE).exists()
    assert not list(out.glob("*.partial")) and not list(out.glob(".*.partial"))
    assert all(raw == whole[name] for name, raw in files(out).items() if name != STATE)
    quantize(model, out, recipe_of("ultra"), shard=SHARD)
    assert files(out) == whole and files(model) == before


def test_two_runs_do_not_write_into_one_directory(model, whole, tmp_path):
    out = tmp_path / "out"

    def work():
        module._put = lambda *args: time.sleep(60)
        quantize(model, out, recipe_of("ultra"), shard=SHARD)

    process = started(work)
    try:
        while not (out / STATE).exists():
            time.sleep(0.005)
        with pytest.raises(InputError, match="another process is writing"):
            quantize(model, out, recipe_of("ultra"), shard=SHARD)
    finally:
        os.kill(process, signal.SIGKILL)
        ended(process)
    quantize(model, out, recipe_of("ultra"), shard=SHARD)
    assert files(out) == whole


def test_a_kill_while_the_state_was_first_written_is_no_obstacle(model, whole, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / f".{STATE}.partial").write_text("{")
    quantize(model, tmp_path / "out", recipe_of("ultra"), shard=SHARD)
    assert files(tmp_path / "out") == whole


def test_a_run_that_wrote_nothing_does_not_hold_the_directory(model, whole, tmp_path):
    """Without a tokenizer calibration ends at once; another command may then use the directory."""
    with pytest.raises(InputError, match=r"tokenizer\.json does not exist"):
        quantize(model, tmp_path / "out", recipe_of("fp8"), texts=["Once upon a time"])
    assert set(files(tmp_path / "out")) == {STATE}
    quantize(model, tmp_path / "out", recipe_of("ultra"), shard=SHARD)
    assert files(tmp_path / "out") == whole


def test_code_beside_the_model_is_copied_with_it(model, tmp_path):
    """config.json may name classes in it that other programs run; nothing runs them here."""
    source = tmp_path / "model"
    source.mkdir()
    for name, raw in files(model).items():
        (source / name).write_bytes(raw)
    (source / "configuration_nemotron_h.py").write_text("raise SystemExit\n")
    (source / "notes.txt").mkdir()  # no file
    quantize(source, tmp_path / "out", recipe_of("fp8"))
    assert (tmp_path / "out" / "configuration_nemotron_h.py").read_text() == "raise SystemExit\n"


def test_a_copy_has_all_chat_templates_of_the_model(model, tmp_path):
    source, named = tmp_path / "model", tmp_path / "model" / "additional_chat_templates"
    named.mkdir(parents=True)
    for name, raw in files(model).items():
        (source / name).write_bytes(raw)
    for path in (source / "chat_template.jinja", named / "tool_use.jinja", named / "rag.jinja"):
        path.write_text(path.stem)
    quantize(source, tmp_path / "out", recipe_of("fp8"))
    copied = ChatTemplate.load(tmp_path / "out").sources
    assert copied == ChatTemplate.load(source).sources and set(copied) == {"default", "tool_use", "rag"}
