"""Results depend neither on the number of threads, nor on other computing threads, nor on a fork."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from refengine import machine
from refengine.backends.cpu import cpu_backend, native
from refengine.conformance.cases import Case
from refengine.spec.model import Model

pytestmark = pytest.mark.skipif(native.load() is None, reason="there is no compiler for the loops")
WIDE = Case(layers="ME*-", batch=3, length=70, hidden_size=1300, head_dim=60, moe_latent_size=700)


def told(threads: int, case: Case = WIDE) -> np.ndarray:
    """Return the logits of a prompt in two parts, then of three steps."""
    m = Model.build(case.cfg, case.read, cpu_backend("float32", threads))
    states, all_ = m.new_states(case.batch), []
    for part in (slice(0, 50), slice(50, 67)):
        h, states = m.blocks(m.embed(case.ids[:, part]), states)
        all_.append(m.head(h))
    for t in range(67, 70):
        logits, states = m.backend.step(m, case.ids[:, t], states)
        all_.append(logits[:, None])
    return np.concatenate(all_, axis=1)


@pytest.mark.parametrize("threads", [2, 3, 64])
def test_any_number_of_threads_gives_the_same_bits(threads):
    assert np.array_equal(told(threads), told(1))


def test_two_engines_in_two_threads_do_not_disturb_each_other():
    expected, found = told(1), []
    threads = [threading.Thread(target=lambda: found.append(told(2))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 and all(np.array_equal(one, expected) for one in found)


SMALL_STACK = """
import threading
from tests.backends.cpu.test_threads import told
threading.stack_size(128 * 1024)  # musl's default
thread = threading.Thread(target=told, args=(2,))
thread.start()
thread.join()
print("done")
"""


def test_a_thread_with_a_small_stack_computes_too():
    done = subprocess.run([sys.executable, "-c", SMALL_STACK], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_that_was_forked_computes_too():
    expected = told(2)
    child = os.fork()
    if not child:
        os._exit(0 if np.array_equal(told(2), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert np.array_equal(told(2), expected)


def written(root, files: dict[str, str]) -> str:
    """Return the root of a system with these files."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return str(root)


@pytest.mark.parametrize(
    "files, expected",
    [
        ({}, float("inf")),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, float("inf")),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/cpu.max": "50000 100000\n",
                "sys/fs/cgroup/a/b/cpu.max": "300000 100000\n",
            },
            0.5,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/x\n3:cpu,cpuacct:/docker/y\n",
                "sys/fs/cgroup/cpu,cpuacct/docker/y/cpu.cfs_quota_us": "200000\n",
                "sys/fs/cgroup/cpu,cpuacct/docker/y/cpu.cfs_period_us": "100000\n",
            },
            2,
        ),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "nonsense"}, float("inf")),
    ],
)
def test_the_quota_of_a_cgroup_counts(tmp_path, files, expected):
    assert machine.quota(written(tmp_path, files)) == expected


V1, V2 = ("memory.limit_in_bytes", "memory.usage_in_bytes"), ("memory.max", "memory.current")


def limited(folder: str, names: tuple[str, str], most, used, stat: str | None = None) -> dict[str, str]:
    """Return the files of a cgroup that limits memory."""
    files = dict(zip(names, (f"{most}\n", f"{used}\n"), strict=True))
    files |= {} if stat is None else {"memory.stat": stat}
    return {f"sys/fs/cgroup/{folder}{name}": text for name, text in files.items()}


HOST = 976562 * 1024
INSIDE, NAMED = {"proc/self/cgroup": "0::/a/b\n"}, {"proc/self/cgroup": "4:memory:/x\n3:cpu:/y\n"}


@pytest.mark.parametrize(
    "files, expected",
    [
        ({}, HOST),
        (limited("a/", V2, 7000, 0), HOST),  # of other processes
        (INSIDE | limited("a/b/", V2, "max", 5000), HOST),
        (INSIDE | limited("", V2, 7000, 5000), 2000),  # in a container the limit is at the top
        (INSIDE | limited("a/", V2, 7000, 5000) | limited("a/b/", V2, 9000, 5000), 2000),
        (INSIDE | limited("a/b/", V2, 7000, 5000, "anon 4000\ninactive_file 900\n"), 2900),
        (INSIDE | limited("a/b/", V2, 7000, 9000, "anon 9000\ninactive_file 0\n"), 0),
        (INSIDE | limited("a/b/", V2, 7000, 5000, "nonsense"), 2000),
        (INSIDE | limited("a/b/", V2, 10**12, 5000), HOST),
        (NAMED | limited("memory/", V1, 2**63 - 4096, 5000), HOST),
        (NAMED | limited("memory/y/", V1, 7000, 5000), HOST),  # of another controller's group
        (NAMED | limited("memory/x/", V1, 7000, 5000, "inactive_file 1\ntotal_inactive_file 900\n"), 2900),
    ],
)
def test_the_memory_limit_of_a_cgroup_counts(tmp_path, files, expected):
    memory = {"proc/meminfo": "MemTotal: 9999999 kB\nMemAvailable: 976562 kB\n"}
    assert machine.available_memory(written(tmp_path, memory | files)) == expected


def test_a_part_of_a_processor_is_one_thread(monkeypatch):
    for quota, most in ((0.3, 1), (1.5, 2), (float("inf"), 10**6)):
        monkeypatch.setattr(machine, "quota", lambda quota=quota: quota)
        assert 1 <= machine.processors() <= most


def test_a_state_that_has_a_fork_is_not_written_in_place():
    m = Model.build(WIDE.cfg, WIDE.read, cpu_backend("bfloat16"))
    _, states = m.blocks(m.embed(WIDE.ids[:, :5]), m.new_states(3))
    fork = [s and s.fork() for s in states]
    before = [s.S.copy() if hasattr(s, "S") else None for s in states]
    m.backend.step(m, WIDE.ids[:, 5], states)
    for s, old in zip(fork, before, strict=True):
        assert old is None or np.array_equal(s.S, old)
