"""The embedded server between two hosts joined by a network only: the contract, and an end for every job."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lapse_elmo.mpi.signals import STALLED
from tests import collective
from tests.hosts import ADDRESSES, ENVIRONMENT, Hosts, Link, cannot_delay, switched_hosts, two_hosts, why_not
from tests.mpi import mpirun
from tests.ps import contract_program, failing_program

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())

ENGINE, RANKS_A_HOST = "adaptive", 2


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with two_hosts(RANKS_A_HOST) as hosts:
        yield hosts
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert not any(namespace in left for namespace in hosts.namespaces)


@pytest.fixture(scope="module")
def report(hosts: Hosts, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    program, folder = Path(contract_program.__file__), tmp_path_factory.mktemp("network")
    before = hosts.sent_bytes()
    words = [ENGINE, "1", contract_program.VALID]
    report = collective.report_of(
        program, words, 2 * RANKS_A_HOST, folder, timeout=180, env=ENVIRONMENT, launcher=hosts.launcher
    )
    report["sent"] = "" if hosts.sent_bytes() - before > 10_000_000 else "the ranks did not talk over the network"
    return report


@pytest.mark.parametrize("name", ["sent", *contract_program.names(ENGINE, refusals=False)])
def test_contract(report: dict[str, str], name: str) -> None:
    collective.expect(report, name)


def places_of(launcher: list[str], folder: Path) -> list[list]:
    """Return each rank's node, number of nodes, position in its node, host and address."""
    code = (
        "import json, pathlib, sys; from lapse_elmo.mpi.host import own_address;"
        "from lapse_elmo.mpi.launch import enter;"
        "w = enter(); address = own_address(w.allgather(w.host)); place = [w.node, w.num_nodes, w.local_rank, w.host];"
        "pathlib.Path(sys.argv[1], str(w.rank)).write_text(json.dumps([*place, address]))"
    )
    job = mpirun(4, ["-c", code, folder], env=ENVIRONMENT, launcher=launcher)
    assert job.returncode == 0, job.output
    return [json.loads((folder / str(rank)).read_text()) for rank in range(4)]


def test_hosts_of_the_same_name_are_told_apart(hosts: Hosts, tmp_path: Path) -> None:
    """Else the memory of both would be compared with that of one, and the loopback taken for their address."""
    places = places_of(hosts.alike, tmp_path)
    assert [place[3] for place in places] == ["alike#1", "alike#1", "alike#2", "alike#2"]
    assert "127.0.0.1" not in [place[4] for place in places]


def test_hosts_are_nodes(hosts: Hosts, tmp_path: Path) -> None:
    places = places_of(hosts.launcher, tmp_path)
    assert [place[:3] for place in places] == [[0, 2, 0], [0, 2, 1], [1, 2, 0], [1, 2, 1]]
    assert places[2][3] == places[3][3] == ADDRESSES[1] != places[0][3]


@pytest.mark.parametrize(("kind", "rank"), [("kill", 3), ("manager", 0)])
def test_a_failing_rank_ends_the_job_on_both_hosts(hosts: Hosts, tmp_path: Path, kind: str, rank: int) -> None:
    failing_program.run_and_check(kind, rank, 1, tmp_path, env=ENVIRONMENT, launcher=hosts.launcher)


# The last rank stops. Within 3 s the watchdogs of both hosts have exchanged what they know.
HANG = """
import os, signal, sys, time
from lapse_elmo.mpi.launch import launch
from lapse_elmo.watchdog import Watchdog
def main(argv, enter):
    with Watchdog(0.05, "hang") as watchdog:
        world = enter()
        watchdog.join(world)
        world.barrier()
        world.progress.enter("stopping")
        time.sleep(0.5)
        if world.rank == world.size - 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        world.barrier()
launch(main, sys.argv[1:], prog="hang")
"""


def test_the_watchdogs_of_hosts_without_a_default_route_reach_each_other(hosts: Hosts) -> None:
    """Although each host takes its own name for that of the loopback."""
    job = mpirun(4, ["-c", HANG], env=ENVIRONMENT, launcher=hosts.named)
    assert job.returncode == STALLED and not job.survivors, job.output
    (by_rank_0,) = [report for report in job.stderr.split("hang: [") if report.startswith("rank 0/4 ")]
    assert f"silent: rank 3/4 on node-{ADDRESSES[1]} (pid " in by_rank_0, job.output
    assert "last seen in stopping" in by_rank_0 and "no address is known" not in job.stderr, job.output


# Rank 0 sends 5 MB to the last rank; then they send a byte back and forth, 20 times.
EXCHANGE = """
import json, pathlib, sys, time
from lapse_elmo.mpi.launch import enter
world = enter()
import numpy as np
many, one, last = np.zeros(5_000_000, np.uint8), np.zeros(1, np.uint8), world.size - 1
world.barrier()
if world.rank in (0, last):
    peer = last - world.rank
    def exchange(data):
        start = time.monotonic()
        for sends in (world.rank == 0, world.rank != 0):
            world.comm.Send(data, peer) if sends else world.comm.Recv(data, peer)
        return time.monotonic() - start
    exchange(one)
    seconds = [exchange(many), min(exchange(one) for _ in range(20))]
    if world.rank == 0:
        pathlib.Path(sys.argv[1]).write_text(json.dumps([world.num_nodes, *seconds]))
"""


@pytest.mark.parametrize("latency_us", [0.0, 20_000.0])
def test_switched_hosts_have_the_link_that_is_asked_for(latency_us: float, tmp_path: Path) -> None:
    if latency_us and (reason := cannot_delay()):
        pytest.skip(f"no latency here: {reason}")
    with switched_hosts(3, 1, Link(0.1, latency_us)) as hosts:
        job = mpirun(3, ["-c", EXCHANGE, str(tmp_path / "seen")], env=ENVIRONMENT, launcher=hosts.launcher)
    assert job.returncode == 0, job.output
    num_nodes, many_s, one_s = json.loads((tmp_path / "seen").read_text())
    assert num_nodes == 3
    assert many_s > 2 * 5e6 * 8 / 0.1e9 * 0.9, "faster than the link"
    assert one_s >= 2 * latency_us * 1e-6
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert not any(namespace in left for namespace in hosts.namespaces)
