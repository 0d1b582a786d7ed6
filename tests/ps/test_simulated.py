"""The embedded engine under simulated schedules: any order of messages, delays, stalls and preemption."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from random import Random

import numpy as np
import pytest

from lapse_elmo import native
from lapse_elmo.ps.layout import Segment
from lapse_elmo.ps.requests import Requests
from lapse_elmo.ps.rows import SOURCE
from lapse_elmo.ps.transport import TO_MANAGER, Address
from tests.mpi import ROOT
from tests.simulator.mutants import HARMLESS, MUTANTS
from tests.simulator.network import Channel, Pace, Simulation, Task
from tests.simulator.schedule import Schedule, failure, run

pytestmark = pytest.mark.skipif(native.load(SOURCE) is None, reason="the simulator accesses rows through rows.c")

# Seeds whose schedules once exposed a fault of the engine.
REGRESSIONS = {
    356: "a freeze was answered while a round still had a Sync to send",
    957: "a row was promoted although another node had got a replica while the job waited for room",
    7180: "a replica that was on its way when a round began was older than the round said",
}


@pytest.mark.parametrize("seed", REGRESSIONS)
def test_faults_of_the_past(seed: int) -> None:
    assert failure(Schedule.of(seed)) is None


def test_a_schedule_is_a_function_of_its_seed() -> None:
    first, second = (run(Schedule.of(77)) for _ in range(2))
    assert first == second
    assert first != run(Schedule.of(78))


def test_a_block_that_is_changed_after_it_was_sent_is_noticed() -> None:
    simulation, block = Simulation(Random(1), Pace()), np.zeros(8, np.uint8)

    def send() -> None:
        simulation.send(simulation.channel(Address(0, TO_MANAGER), Address(1, TO_MANAGER)), block)
        block[0] = 1

    simulation.add(Task("sender", send))
    with pytest.raises(AssertionError, match="changed after it was sent"):
        simulation.run()


def test_a_set_waits_for_each_of_its_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So what managers forward is bounded by the number of workers, not by the rows that they set."""
    sets: dict[int, list[int]] = {}
    send = Requests.send_set

    def checked(
        self: Requests, segment: Segment, number: int, ticket: int, rows: np.ndarray, values: np.ndarray
    ) -> None:
        tickets = sets.setdefault(id(self), [])
        assert len(rows) == 1 and not any(earlier in self._calls for earlier in tickets)
        tickets.append(ticket)
        send(self, segment, number, ticket, rows, values)

    monkeypatch.setattr(Requests, "send_set", checked)
    run(dataclasses.replace(Schedule.of(38), num_nodes=3, chunk_bytes=1, calls_per_clock=20))
    assert sum(map(len, sets.values())) > 10


def test_repeated_polls_change_no_event(monkeypatch: pytest.MonkeyPatch) -> None:
    """Polls that are not run (tests/simulator/polls.py) would have done nothing: each event is as if they were run."""
    log: list[tuple[float, object]] = []
    push = Simulation._push

    def note(self: Simulation, when: float, event: Task | Channel) -> None:
        log.append((when, event.name if isinstance(event, Task) else event.ends))
        push(self, when, event)

    monkeypatch.setattr(Simulation, "_push", note)
    for seed in (*range(5000, 5060), 1_700_534):  # the last one waits for a flush between two steps at the same time
        runs = []
        for repeat_polls in (True, False):
            log.clear()
            runs.append((run(Schedule.of(seed), repeat_polls=repeat_polls), tuple(log)))
        assert runs[0] == runs[1], f"seed {seed}"


def test_a_broken_engine_is_noticed() -> None:
    """The simulator notices one mutant (python -m tests.simulator.mutants tries all) and prints how to repeat it."""
    words = [sys.executable, "-m", "tests.simulator.mutants", "--only", "replicas are not noted", "--schedules", "500"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("caught") and "python -m tests.simulator --seed" in done.stdout


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: json.dumps(mutant.name))
def test_mutants_fit_the_source(mutant) -> None:  # type: ignore[no-untyped-def]
    text = (ROOT / "lapse_elmo" / "ps" / mutant.file).read_text(encoding="utf-8")
    assert mutant.before in text
    assert set(HARMLESS) <= {other.name for other in MUTANTS}
