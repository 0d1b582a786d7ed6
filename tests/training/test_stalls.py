"""If a rank hangs, the others report it and where they wait, and end the job."""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lapse_elmo import checkpoint
from lapse_elmo.config.training import parse_train
from lapse_elmo.errors import ConfigError
from lapse_elmo.mpi.signals import STALLED
from lapse_elmo.mpi.world import World, solo
from lapse_elmo.progress import BEAT, NUM_FIELDS, PHASE_TYPE
from lapse_elmo.watchdog import REPORT_FILE_VARIABLE, Watchdog
from lapse_elmo.watchdog.report import format_ranks, own_stacks, stack_lines
from lapse_elmo.watchdog.view import View
from tests import mpi
from tests.training.corpora import TINY, Prepared, records, train_alone, train_job
from tests.training.stalling import LAUNCHER
from tests.training.test_failures import newest_whole

PROGRAM = Path(__file__).with_name("stalling.py")
LIMIT_S, START_S, END_S = 5, 90, 60
OPTIONS = ("--epochs", "100000", "--batch-size", "8", "--save-every-steps", "4", "--report-every", "1")
HOST = socket.gethostname()
CASES = [
    ("start", "stop", 0, 2, 1), ("step", "loop", 1, 2, 1), ("save", "read", 0, 2, 1),
    ("step", "stop", 0, 4, 2), ("evaluation", "stop", 2, 4, 2),  # the ranks of the nodes' managers
    ("save", "stop", 3, 4, 2),  # the last one, which is_collector
    # Parts of the start, and a rank that only works.
    ("corpus", "read", 0, 2, 1), ("parameters", "loop", 1, 2, 1), ("restore", "read", 1, 2, 1),
    ("step", "stop", 1, 4, 2), ("parameters", "stop", 2, 4, 2), ("save", "stop", 1, 4, 2),
    ("evaluation", "stop", 3, 4, 2),
]


@pytest.mark.parametrize(("place", "how", "rank", "num_ranks", "num_nodes"), CASES)
def test_a_rank_that_hangs(
    small: Prepared, tmp_path: Path, place: str, how: str, rank: int, num_ranks: int, num_nodes: int
) -> None:
    run_dir = tmp_path / "run"
    if place == "restore":
        train_alone(small, run_dir, *OPTIONS, "--max-steps", "4")
    argv = [*patient(small, run_dir, place, how, rank), "--nodes", str(num_nodes)]
    # Before MPI has started a rank just exits, and the launcher, which kills the others, must see that first.
    job = mpi.mpirun(num_ranks, argv, timeout=START_S + LIMIT_S + END_S, fork=place != "start")
    assert job.returncode == STALLED and not job.survivors, job.output
    if place == "start":
        assert f"MPI has not started on all {num_ranks} ranks" in job.stderr and "in start" in job.stderr, job.output
        return
    if place in ("corpus", "parameters"):
        assert not run_dir.exists() or not checkpoint.candidates(run_dir), job.output
    else:
        assert newest_whole(run_dir)["step"] >= 4
    state = {"stop": "silent", "loop": "busy", "read": "busy"}[how]
    named = [line for line in job.stderr.splitlines() if line.startswith(("  silent: ", "  busy: "))]
    assert set(map(who, named)) == {(state, rank)}, job.output
    assert f"rank {rank}/{num_ranks} on {HOST} (pid " in named[0], job.output
    assert ("stopped by a signal" in named[0]) == (how == "stop"), job.output
    phase = r"(step|save at|evaluation at|last save, after|start, (opening|making|reading) the)"
    where = rf"  waiting for others in {phase} .*: \d ranks?, \d"
    assert re.search(where, job.stderr), job.output
    calls = job.stderr[job.stderr.index("MainThread") :]
    assert "in wait\n" in calls, job.output
    if how != "stop":
        assert f"in {how}\n" in calls, job.output


def test_a_launcher_that_hangs(small: Prepared, tmp_path: Path) -> None:
    """It reads nothing any more, and ends no rank: the ranks end themselves, and the report is in the file."""
    pid, report = tmp_path / "launcher", tmp_path / "report"
    env = {LAUNCHER: str(pid), REPORT_FILE_VARIABLE: str(report)}
    with mpi.start(2, patient(small, tmp_path / "run", "step", "write", 1), env=env) as job:
        deadline = time.monotonic() + START_S + END_S
        while not pid.exists() or job.rank_pids():
            assert job.running() and time.monotonic() < deadline, job.text()
            time.sleep(0.1)
        os.kill(int(pid.read_text()), signal.SIGCONT)
        ended = job.wait(END_S)
    assert ended.returncode == STALLED, ended.output
    assert f"  busy: rank 1/2 on {HOST} (pid " in report.read_text()
    assert newest_whole(tmp_path / "run")["step"] >= 4


def patient(small: Prepared, run_dir: Path, place: str = "nowhere", how: str = "stop", rank: int = 0) -> list[str]:
    """Return a run whose watchdog is patient until the rank hangs."""
    words = [str(PROGRAM), place, how, str(rank), *small.options, *TINY, "--run-dir", str(run_dir), *OPTIONS]
    return [*words, "--stall-minutes", str(LIMIT_S / 60)]


def until_saved(job: mpi.RunningJob, run_dir: Path) -> None:
    """Wait until the first checkpoint is there."""
    while not checkpoint.candidates(run_dir):
        assert job.running(), job.text()
        time.sleep(0.01)


def who(line: str) -> tuple[str, int]:
    """Parse a line of the report: whether the rank is silent or busy, and its number."""
    found = re.match(r"  (\w+): rank (\d+)/", line)
    assert found, line
    return found[1], int(found[2])


def test_the_same_command_resumes(small: Prepared, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with mpi.start(2, patient(small, run_dir), fork=True) as job:
        until_saved(job, run_dir)
        os.kill(job.rank_pids()[1], signal.SIGSTOP)
        ended = job.wait(LIMIT_S + END_S)
    assert ended.returncode == STALLED, ended.output
    step = newest_whole(run_dir)["step"]
    with train_job(2, small, run_dir, *OPTIONS, "--max-steps", str(step + 1)) as job:
        ended = job.wait(START_S)
    assert ended.returncode == 0, ended.output
    assert [line["step"] for line in records(run_dir, "train")] == [*range(1, step + 2)]


def test_a_rank_that_is_only_slow_ends_nothing(small: Prepared, tmp_path: Path) -> None:
    """A rank is stopped twice for less than the limit; then all ranks are stopped together for longer."""
    run_dir = tmp_path / "run"
    argv = patient(small, run_dir)
    with mpi.start(2, argv, fork=True) as job:
        until_saved(job, run_dir)
        first, second = job.rank_pids()
        for stopped, seconds in (([first], 0.4 * LIMIT_S), ([second], 0.4 * LIMIT_S), ([first, second], 1.5 * LIMIT_S)):
            for pid in stopped:
                os.kill(pid, signal.SIGSTOP)
            with pytest.raises(TimeoutError):
                mpi_wait(job, seconds)
            for pid in stopped:
                os.kill(pid, signal.SIGCONT)
            with pytest.raises(TimeoutError):
                mpi_wait(job, 1.0)
        assert "has made progress" not in job.text()[1]


def mpi_wait(job: mpi.RunningJob, seconds: float) -> None:
    """Wait up to ``seconds`` for the job to end, and raise TimeoutError if it does not."""
    deadline = time.monotonic() + seconds
    while job.running():
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.05)


def test_no_watchdog_is_no_thread() -> None:
    before = threading.active_count()
    with Watchdog(0, "test") as watchdog:
        watchdog.join(solo())
        assert threading.active_count() == before
    with pytest.raises(ConfigError, match="--stall-minutes is -1"):
        parse_train(["--stall-minutes", "-1"])


def test_a_view_tells_idle_and_silent_ranks_apart() -> None:
    view = View(3)
    ranks = np.array([0, 1])
    for beat in range(1, 5):
        view.take(ranks, np.array([[7, beat, 0, beat], [8, 1, 1, 1 if beat > 2 else beat]]), np.zeros(2, "S64"))
        view.tick(1.0)
    assert view.idle_s.tolist() == [0, 3, 4]
    assert view.silent_s.tolist() == [0, 1, 4]
    assert view.waiting.tolist() == [False, True, False]


class FirstOf64Nodes(World):
    """A stand-in for the world of the first of 2,048 ranks, on 64 nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.size, self.local_size, self.leaders = 2048, 32, [*range(0, 2048, 32)]

    def allgather(self, obj: Any) -> list[Any]:
        if obj == (self.host, self.node):
            return [(self.host, rank // 32) for rank in range(self.size)]
        return [obj]


def test_a_collector_sees_all_ranks_of_many_nodes() -> None:
    """Also where the kernel keeps few datagrams, as by default."""
    view = View(2048)
    with Watchdog(1.0, "test") as watchdog:  # checks at most every 2 s
        watchdog.join(FirstOf64Nodes())
        group = watchdog._group
        assert group is not None and group._channel is not None and group._channel._receiver is not None
        group._channel._receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 17)  # some 110 datagrams
        time.sleep(2.2)  # until the thread knows of the group
        for first in range(32, 2048, 32):
            ranks = np.arange(first, first + 32)
            view.take(ranks, np.full((32, NUM_FIELDS), 5), np.full(32, b"step 1", PHASE_TYPE))
            group._channel.send(ranks, view)
            time.sleep(0.02)
        time.sleep(0.2)
        unseen = np.flatnonzero(group._view.numbers[32:, BEAT] != 5) + 32
    assert not unseen.size, f"nothing was received of ranks {format_ranks(unseen.tolist())}"


def test_ranks_are_named_in_few_words() -> None:
    assert format_ranks([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert format_ranks([]) == ""


def test_equal_stacks_are_shown_once() -> None:
    with ThreadPoolExecutor(1) as pool:
        stack = pool.submit(own_stacks).result()
    assert stack.startswith(b"MainThread:\n") and b"test_equal_stacks" in stack
    lines = stack_lines([0, 1, 4], [b"a:\nx\n\nb:\ny", b"a:\nx", b""])
    assert lines == ["  ranks 0-1, a:", "    x", "  rank 0, b:", "    y"]


def test_stacks_by_a_python_that_was_built_for_an_old_c_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of conda and uv, which run on new systems, too."""
    monkeypatch.delattr(os, "memfd_create")
    with ThreadPoolExecutor(1) as pool:
        assert b"test_stacks_by_a_python" in pool.submit(own_stacks).result()
