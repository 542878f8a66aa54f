"""Ranks run on two hosts: network namespaces with their own addresses, joined by a virtual cable.

mpiexec starts a rank on the other host through a replacement of ssh; torchrun is started on both hosts. UCX,
on which MPICH runs, would use shared memory, so it is set to use the cable, and so is gloo.
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.ranks.test_processes import ONCE, alone
from tests.support.processes import by_mpiexec, by_torchrun, ended_badly, finish, living, name, program, start

pytestmark = pytest.mark.slow
ADDRESSES = ("10.231.7.1", "10.231.7.2")
SSH = """#!/bin/sh
while [ "${1#-}" != "$1" ]; do shift; done
case $1 in %s) ns=%s;; %s) ns=%s;; esac
shift
exec ip netns exec $ns sh -c "$*"
"""
TEXT = ["generate", ONCE, "-n", 24, "-t", 0]
ENDLESS = ["generate", ONCE, "-n", 9000, "-t", 0, "--ignore-eos"]


class Hosts:
    """Two network namespaces and the cable between them."""

    def __init__(self, directory: Path):
        self.names = [f"re{os.getpid()}{side}" for side in "ab"]
        self.ssh = directory / "ssh"
        self.ssh.write_text(SSH % tuple(x for pair in zip(ADDRESSES, self.names, strict=True) for x in pair))
        self.ssh.chmod(0o755)

    def lay(self) -> None:
        a, b = self.names
        ip("netns", "add", a)
        ip("netns", "add", b)
        ip("link", "add", "cable", "netns", a, "type", "veth", "peer", "name", "cable", "netns", b)
        for host, address in zip(self.names, ADDRESSES, strict=True):
            ip("-n", host, "address", "add", f"{address}/24", "dev", "cable")
            ip("-n", host, "link", "set", "lo", "up")
            ip("-n", host, "link", "set", "cable", "up")
        for _ in range(100):
            if {self.of_cable(host, "operstate") for host in self.names} == {"up"}:
                break
            time.sleep(0.05)

    def take_away(self) -> None:
        for host in self.names:
            subprocess.run(["ip", "netns", "delete", host], capture_output=True)

    def cable(self, state: str) -> None:
        ip("-n", self.names[0], "link", "set", "cable", state)

    def of_cable(self, host: str, what: str) -> str:
        return ip("netns", "exec", host, "cat", f"/sys/class/net/cable/{what}").strip()

    def bytes_sent(self) -> int:
        """Return the bytes that the first host has sent over the cable."""
        return int(self.of_cable(self.names[0], "statistics/tx_bytes"))

    def mpiexec(self, *args) -> subprocess.Popen:
        there = (
            "-launcher",
            "ssh",
            "-launcher-exec",
            self.ssh,
            "-hosts",
            ",".join(ADDRESSES),
            "-localhost",
            ADDRESSES[0],
            "-ppn",
            1,
        )
        command = ["ip", "netns", "exec", self.names[0], *by_mpiexec(2, *there), *program(), *args]
        return start(command, env={"UCX_TLS": "tcp,self", "UCX_NET_DEVICES": "cable"})

    def torchrun(self, node: int, *args) -> subprocess.Popen:
        there = ("--nnodes", 2, "--node-rank", node, "--master-addr", ADDRESSES[0], "--master-port", 29500)
        command = ["ip", "netns", "exec", self.names[node], *by_torchrun(1, *there), *program(), *args]
        return start(command, env={"GLOO_SOCKET_IFNAME": "cable"})


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def hosts(tmp_path):
    two = Hosts(tmp_path)
    try:
        two.lay()
        yield two
    except FileNotFoundError:
        pytest.skip("there is no ip command: install iproute2")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
    finally:
        two.take_away()


def ranks_end(processes: list[subprocess.Popen], within: float) -> bool:
    """Return whether all ranks of a job end in time, even if their launchers still wait."""
    until = time.monotonic() + within
    rank = re.compile(rf"{re.escape(sys.executable)} (-u )?-m refengine ")
    while any(rank.match(name(pid)) for process in processes for pid in living(process.mark)):
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True


def test_mpi_ranks_on_two_hosts_write_the_text_of_one_process(hosts):
    job = finish(hosts.mpiexec(*TEXT, "--tp", 2))
    assert (job.code, job.out, job.left) == (0, alone(*TEXT), ()), job.err
    assert hosts.bytes_sent() > 24 * 10 * 160 * 4  # new tokens, sums of each, width, float32


@pytest.mark.thorough
def test_ranks_of_torchrun_on_two_hosts_write_the_text_of_one_process(hosts):
    jobs = list(map(finish, [hosts.torchrun(node, *TEXT, "--tp", 2) for node in (0, 1)]))
    assert [(job.code, job.left) for job in jobs] == [(0, ())] * 2, jobs[0].err + jobs[1].err
    assert [job.out for job in jobs] == [alone(*TEXT), ""]
    assert hosts.bytes_sent() > 24 * 10 * 160 * 4


def test_mpi_ranks_end_when_the_cable_is_pulled(hosts):
    """mpiexec itself waits for the other host until the cable is back."""
    process = hosts.mpiexec(*ENDLESS, "--tp", 2, "--timeout", 3)
    assert process.stdout.read(len(ONCE) + 9)
    hosts.cable("down")
    assert ranks_end([process], within=20)
    hosts.cable("up")
    job = finish(process)
    ended_badly(job, {0, 1}, "did not answer within 3 s|is lost")


@pytest.mark.thorough
def test_ranks_of_torchrun_end_when_the_cable_is_pulled(hosts):
    processes = [hosts.torchrun(node, *ENDLESS, "--tp", 2, "--timeout", 6) for node in (0, 1)]
    assert processes[0].stdout.read(len(ONCE) + 9)
    hosts.cable("down")
    assert ranks_end(processes, within=30)
    hosts.cable("up")
    for node, job in enumerate(map(finish, processes)):
        ended_badly(job, {node}, f"rank {1 - node} (did not answer within 6 s|is lost)")
