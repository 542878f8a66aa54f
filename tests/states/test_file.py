"""A file of a state has any dtype bit for bit, shows every damage, and is never damaged by writing."""

import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from refengine import InputError
from refengine.states import file
from refengine.states.state import State, checked_generator, of_generator, set_generator

RNG = np.random.default_rng(0)


def small(seed: int = 0, size: int = 40) -> State:
    """Return a state of no model, of about size KB."""
    rng = np.random.default_rng(seed)
    arrays = {"layers.0.S": rng.standard_normal((size, 16, 16)).astype(np.float32)}
    arrays["layers.1.k"] = rng.standard_normal((7, 2, 5)).astype(ml_dtypes.bfloat16)
    return State("0" * 16, tuple(range(9)), 8, arrays, sampling={"temperature": 0.5, "seed": seed})


def same(one: State, other: State) -> bool:
    """Return whether two states are equal, bit for bit."""
    arrays = [{k: (a.dtype, a.shape, a.tobytes()) for k, a in s.arrays.items()} for s in (one, other)]
    rest = [{k: v for k, v in vars(s).items() if k != "arrays"} for s in (one, other)]
    return arrays[0] == arrays[1] and rest[0] == rest[1]


def test_arrays_of_every_dtype_and_shape_are_read_back_bit_for_bit(tmp_path):
    arrays = {}
    for i, (code, dtype) in enumerate(file.CODES.items()):
        for shape in ((), (0, 3), (5,), (2, 3, 4)):
            raw = RNG.integers(0, 256, (*shape, dtype.itemsize), np.uint8)
            arrays[f"{code}.{len(shape)}.{i}"] = raw.view(dtype).reshape(shape)
    file.write(tmp_path / "f", arrays, {"note": 'naïve "quotes" \\ and\nlines'})
    notes, found = file.read(tmp_path / "f")
    assert notes["note"] == 'naïve "quotes" \\ and\nlines'
    assert found.keys() == arrays.keys()
    for name, a in arrays.items():
        assert (found[name].dtype, found[name].shape) == (a.dtype, a.shape)
        assert found[name].tobytes() == a.tobytes() and found[name].flags.aligned
    packed = file.unpacked(file.packed(arrays))
    assert all(packed[name].tobytes() == a.tobytes() for name, a in arrays.items())


def test_the_library_of_the_format_reads_the_file(tmp_path):
    from safetensors.numpy import load_file

    state = small()
    state.save(tmp_path / "f")
    found = load_file(tmp_path / "f")
    assert np.array_equal(found["layers.0.S"], state.arrays["layers.0.S"])


def refused(path, says: str = "") -> None:
    """Check that a file is refused in one sentence that names it."""
    with pytest.raises(InputError) as caught:
        State.load(path)
    text = str(caught.value)
    assert says in text and path.name in text and "\n" not in text and len(text) < 400


def cut_at(offsets, tmp_path) -> None:
    small(size=2).save(tmp_path / "whole")
    raw = (tmp_path / "whole").read_bytes()
    for offset in offsets(len(raw)):
        (tmp_path / "torn").write_bytes(raw[:offset])
        refused(tmp_path / "torn")
    (tmp_path / "torn").write_bytes(raw + b"\0")
    refused(tmp_path / "torn")


def test_a_file_torn_anywhere_is_refused(tmp_path):
    cut_at(lambda size: np.linspace(0, size - 1, 100).astype(int), tmp_path)


@pytest.mark.thorough
def test_a_file_torn_at_any_byte_is_refused(tmp_path):
    cut_at(range, tmp_path)


def test_zeroed_sectors_and_flipped_bits_are_noticed(tmp_path):
    small(size=2).save(tmp_path / "whole")
    raw = (tmp_path / "whole").read_bytes()
    path = tmp_path / "changed"
    for start in range(0, len(raw), 512):
        zeroed = raw[:start] + bytes(len(raw[start : start + 512])) + raw[start + 512 :]
        path.write_bytes(zeroed)
        refused(path)
    bits = [*range(0, 8 * 900, 53), *RNG.integers(0, 8 * len(raw), 100).tolist()]
    for bit in bits:
        flipped = bytearray(raw)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        refused(path)


def test_other_files_and_versions_are_named(tmp_path, monkeypatch):
    path = tmp_path / "f"
    for raw in (b"", b"hello", bytes(4096), os.urandom(4096), b"\x08" + bytes(7) + b"{}      "):
        path.write_bytes(raw)
        refused(path, "not a saved state")
    refused(tmp_path / "nothing", "does not exist")
    refused(tmp_path, "is a directory")
    with monkeypatch.context() as other:
        other.setattr(file, "VERSION", 2)
        small().save(path)
    refused(path, "has layout version '2', and this refengine reads version 1")
    for name, value, says in (
        ("position", "10", "position is '10', and it has 9 tokens"),
        ("position", "9" * 5000, "it has 9 tokens"),
        ("sampling", "[]", "not a JSON object"),
        ("sampling", '{"top_p": 7}', "top_p = 7 is out of range"),
        ("sampling", '{"top_k": 1.5}', "not a whole number"),
        ("sampling", '{"heat": 7}', "unknown sampling option 'heat'"),
        ("sampling", '{"seed": -1}', "seed = -1"),
        ("sampling", "{", "is not valid JSON"),
        ("generator", '{"counter": []}', "not one of NumPy's Philox"),
        ("talk", "3", "a talk that is not"),
    ):
        notes = {"model": "x", "position": "8", "sampling": "{}", "generator": "null", "talk": "{}"}
        file.write(path, small().arrays | {"ids": np.arange(9, dtype=np.int32)}, notes | {name: value})
        refused(path, says)
    file.write(path, small().arrays | {"ids": np.arange(9, dtype=np.float32)}, notes)
    refused(path, "no list of token ids")
    generator = {"counter": [0] * 4, "key": [0] * 2, "buffer": [0] * 4, "buffer_pos": 5, "has_uint32": 0}
    notes = notes | {"talk": "{}", "generator": str(generator | {"uinteger": 0}).replace("'", '"')}
    file.write(path, {"ids": np.arange(9, dtype=np.int32)}, notes)
    refused(path, "buffer_pos of its random generator is out of range")


@pytest.mark.parametrize(
    "name, largest",
    [
        ("counter", [2**64 - 1] * 4),
        ("key", [2**64 - 1] * 2),
        ("buffer", [2**64 - 1] * 4),
        ("buffer_pos", 4),
        ("has_uint32", 1),
        ("uinteger", 2**32 - 1),
    ],
)
def test_a_generator_takes_every_state_that_a_file_may_hold(name, largest):
    """The largest numbers that NumPy takes are accepted, and larger ones are refused in a sentence."""
    generator = np.random.Generator(np.random.Philox(0))
    plain = of_generator(generator) | {name: largest}
    set_generator(generator, checked_generator(plain, Path("f")))
    assert of_generator(generator) == plain
    more = [n + 1 for n in largest] if isinstance(largest, list) else largest + 1
    with pytest.raises(InputError, match=f"{name} of its random generator is out of range"):
        checked_generator(plain | {name: more}, Path("f"))


def test_a_save_that_fails_leaves_the_old_file_and_says_why(tmp_path, monkeypatch):
    path = tmp_path / "f"
    small(1).save(path)

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as failing:
        failing.setattr(os, "fsync", full)
        with pytest.raises(InputError, match="f cannot be saved: No space left on device"):
            small(2).save(path)
    assert same(State.load(path), small(1)) and os.listdir(tmp_path) == ["f"]
    gone = tmp_path / "gone"
    gone.mkdir()
    small().save(gone / "f")
    shutil.rmtree(gone)
    with pytest.raises(InputError, match="cannot be saved: No such file or directory"):
        small().save(gone / "f")
    with pytest.raises(InputError, match="cannot be saved"):
        small().save(tmp_path)


def limited(path, room: int) -> str:
    """Return the output of saving in a process that may write no file larger than `room` bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    try:
        small(2).save(path)
    except InputError as error:
        return str(error)
    return "saved"


def child(work) -> int:
    """Return the id of a forked process that runs work() and exits with the returned code."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        code = work()
    finally:
        os._exit(code)


def ended(pid: int) -> int:
    """Return the exit code of a process."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_file_that_may_not_grow_is_a_sentence(tmp_path):
    small(1).save(tmp_path / "f")
    for room in (0, 10, 20_000):
        assert ended(child(lambda room=room: "cannot be saved" not in limited(tmp_path / "f", room))) == 0
    assert same(State.load(tmp_path / "f"), small(1)) and os.listdir(tmp_path) == ["f"]


def test_a_full_disk_leaves_the_old_file(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small tmpfs cannot be mounted here")
    try:
        small(1).save(disk / "f")
        with pytest.raises(InputError, match="f cannot be saved: No space left on device"):
            small(2).save(disk / "f")
        assert same(State.load(disk / "f"), small(1)) and os.listdir(disk) == ["f"]
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)  # a map of the file may still be open


def test_two_processes_that_save_to_one_file_leave_one_of_their_states(tmp_path):
    path, states = tmp_path / "f", [small(1), small(2)]
    states[0].save(path)

    def saving(state):
        for _ in range(15):
            state.save(path)
        return 0

    pids = [child(lambda state=state: saving(state)) for state in states]
    for _ in range(30):
        found = State.load(path)
        assert any(same(found, state) for state in states)
    assert [ended(pid) for pid in pids] == [0, 0] and os.listdir(tmp_path) == ["f"]


def killed(times: int, tmp_path, record_property) -> None:
    """Kill children while they save one of two states in turns; the file is always one of them, whole."""
    path, states, delays = tmp_path / "f", [small(1, 400), small(2, 400)], random.Random(0)
    states[0].save(path)
    began = time.monotonic()
    states[0].save(path)
    took = time.monotonic() - began

    def saving():
        for i in range(10**6):
            states[i % 2].save(path)
        return 0

    amidst = 0
    for _ in range(times):
        pid = child(saving)
        time.sleep(delays.uniform(0, 5 * took))
        os.kill(pid, signal.SIGKILL)
        assert ended(pid) == -signal.SIGKILL
        found = State.load(path)
        assert any(same(found, state) for state in states)
        left = [name for name in os.listdir(tmp_path) if name != "f"]
        amidst += bool(left)
        for name in left:
            os.unlink(tmp_path / name)
    assert amidst, "no child was killed while it wrote"
    record_property("kills", times)
    record_property("kills in the midst of writing", amidst)


def test_kill_at_any_moment_leaves_a_whole_file(tmp_path, record_property):
    killed(20, tmp_path, record_property)


@pytest.mark.thorough
def test_kill_at_two_hundred_moments_leaves_a_whole_file(tmp_path, record_property):
    killed(200, tmp_path, record_property)
