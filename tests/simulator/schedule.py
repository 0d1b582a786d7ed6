"""One schedule: a small job drawn from a seed, run to its end under all checks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from typing import Any

from lapse_elmo.ps import intents, mailbox, manager, requests, ring, wire
from lapse_elmo.ps.layout import Layout
from lapse_elmo.ps.rules import Rule
from lapse_elmo.ps.sampling import SCHEMES
from tests.simulator.invariants import Invariants
from tests.simulator.network import Pace, Simulation, Task
from tests.simulator.platform import Job
from tests.simulator.workload import Ledger, Worker

TECHNIQUES = ("adaptive", "relocation", "replication", "static")
# What a quarter of the schedules use in place of limits that so few and small rows never reach.
_TIGHT: tuple[tuple[Any, str, int], ...] = (
    (intents, "HORIZON", 1), (manager, "_MESSAGES_PER_STEP", 2), (requests, "_MAX_REQUESTED_BYTES", 60),
    (wire, "_SMALLEST_REQUEST_BYTES", 12), (wire, "_LARGEST_REQUEST_BYTES", 48), (wire, "_GROWTH", 2),
)


@dataclass(frozen=True)
class Schedule:
    """The settings that a seed leads to. They may be replaced one by one, to shrink a failure."""

    seed: int
    technique: str = "adaptive"
    scheme: str = "preloc"
    num_nodes: int = 2
    workers_per_node: int = 1
    num_rows: int = 12
    phases: int = 2
    clocks_per_phase: int = 4
    calls_per_clock: int = 3
    staleness: int = 4
    chunk_bytes: int = 1 << 20
    ring_bytes: int = 1 << 14
    slow_share: float = 0.1
    slow_latency_s: float = 2e-2
    preemption: float = 0.1
    stall_share: float = 0.01
    crowded: bool = False
    alone: bool = False  # worker 0 alone has rows moved
    poll_s: float = 4e-4
    outgoing_scale: int = 1
    merged_bytes: int = 1 << 16  # smaller messages wait for others and are sent together
    tight: bool = False  # intents start, requests are split and steps end as in larger jobs
    hot: bool = False  # all workers announce, push and pull the same rows in each clock, as training does

    @classmethod
    def of(cls, seed: int) -> Schedule:
        """Return the schedule of ``seed``."""
        random = Random(seed)
        nodes = random.choice((2, 2, 2, 3, 3, 4))
        schedule = cls(
            seed=seed,
            technique=random.choice(("adaptive", "adaptive", "relocation", "replication", "static")),
            scheme=random.choice(SCHEMES),
            num_nodes=nodes,
            workers_per_node=random.choice((1, 1, 1, 2) if nodes < 4 else (1,)),
            num_rows=random.choice((3, 8, 20)),
            phases=random.choice((1, 1, 1, 1, 2)),
            clocks_per_phase=random.choice((1, 1, 2, 2, 3, 8)),
            calls_per_clock=random.choice((1, 2, 2, 5)),
            staleness=random.choice((2, 2, 3, 4)),
            chunk_bytes=random.choice((1 << 20, 40)),
            ring_bytes=random.choice((1 << 14, 1 << 10, 1 << 9)),  # of those below 1 << 11 some are full at times
            slow_share=random.choice((0.0, 0.1, 0.5)),
            preemption=random.choice((0.0, 0.1, 0.4)),
            stall_share=random.choice((0.0, 0.01, 0.05)),
            crowded=random.random() < 0.3,
            alone=random.random() < 0.2,
            poll_s=random.choice((4e-4, 2e-3, 2e-3)),
            outgoing_scale=random.choice((1, 1, 1 << 20)),
            hot=random.random() < 0.2,
        )
        kind = Random(f"{seed} room").random()
        if kind < 0.25:
            # Jobs send row by row and wait for room after each, so that whatever else comes may come in between.
            return dataclasses.replace(
                schedule, chunk_bytes=16, merged_bytes=1 << 6, outgoing_scale=1 << 20, tight=True
            )
        if kind > 0.98:
            # Some messages take longer than several clocks, so that what they bring is long outdated.
            return dataclasses.replace(schedule, slow_latency_s=0.3, slow_share=0.1, hot=True, clocks_per_phase=8)
        return schedule

    def smaller(self) -> Iterator[Schedule]:
        """Yield simpler schedules of the same seed, the greatest simplifications first."""
        simplest: tuple[tuple[str, tuple[object, ...]], ...] = (
            ("phases", (1,)), ("num_nodes", (2, 3)), ("workers_per_node", (1,)), ("num_rows", (1, 3, 8)),
            ("clocks_per_phase", (1, 2, 3)), ("calls_per_clock", (1, 2)), ("scheme", ("naive",)),
            ("outgoing_scale", (1,)), ("merged_bytes", (1 << 16,)), ("chunk_bytes", (1 << 20,)),
            ("ring_bytes", (1 << 14,)), ("crowded", (False,)), ("stall_share", (0.0,)), ("preemption", (0.0,)),
            ("slow_share", (0.0,)), ("slow_latency_s", (2e-2,)), ("hot", (False,)), ("tight", (False,)),
        )
        for name, values in simplest:
            present: Any = getattr(self, name)
            for value in values:
                simpler: Any = value
                larger = name in ("scheme", "merged_bytes", "chunk_bytes", "ring_bytes")  # values that are not smaller
                if simpler != present and (larger or simpler < present):
                    yield dataclasses.replace(self, **{name: simpler})

    def __str__(self) -> str:
        given = Schedule.of(self.seed)
        words = [f"--seed {self.seed}"]
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != getattr(given, field.name):
                words.append(f"--set {field.name}={value}")
        return " ".join(words)


@dataclass
class Result:
    """Counts of one run of a schedule."""

    deliveries: int
    checks: int
    simulated_s: float


def run(schedule: Schedule, *, repeat_polls: bool = True) -> Result:
    """Run a schedule; raise an AssertionError if any promise is broken.

    Without ``repeat_polls``, each poll runs the code of the task that polls, which changes nothing but the time taken.
    """
    random = Random(f"{schedule.seed} events")
    pace = Pace(
        slow_share=schedule.slow_share, slow_latency_s=schedule.slow_latency_s, preemption=schedule.preemption,
        stall_share=schedule.stall_share, poll_s=schedule.poll_s, outgoing_scale=schedule.outgoing_scale,
    )
    simulation = Simulation(random, pace, repeat_polls=repeat_polls)
    job = Job(simulation, schedule.num_nodes, schedule.workers_per_node)
    num_frequent = 0 if schedule.seed % 3 else min(schedule.num_rows, 3)  # they double the time of a schedule
    layout = Layout.of(
        ("counts", schedule.num_rows, job.size), ("steps", min(schedule.num_rows, 6), 3, Rule("adagrad")),
        ("owned", 2 * job.size, 1), ("frequent", num_frequent + 2, 2, None, num_frequent),
    )
    ledger = Ledger(layout, job.size, schedule.num_rows)
    invariants = Invariants(job, ledger)
    simulation.check = invariants.check

    def slowness() -> float:
        return random.choice((1.0, 1.0, 8.0, 40.0)) if schedule.crowded else 1.0

    with _sizes(schedule), invariants.of_drains():
        for rank in range(job.size):
            worker = Worker(schedule, job, rank, ledger, invariants, slowness())
            simulation.add(Task(f"worker {rank}", worker.run, slowness()))
        simulation.run()
    invariants.check_end()
    return Result(simulation.deliveries, invariants.number, simulation.now)


@contextmanager
def _sizes(schedule: Schedule) -> Iterator[None]:
    """Make messages and rings so small that a few rows need several."""
    sizes: list[tuple[Any, str, int]] = [
        (wire, "CHUNK_BYTES", schedule.chunk_bytes), (ring, "RING_BYTES", schedule.ring_bytes),
        (mailbox, "_MERGED_BYTES", schedule.merged_bytes), *(_TIGHT if schedule.tight else ()),
    ]
    before = [(module, name, getattr(module, name)) for module, name, _ in sizes]
    try:
        for module, name, value in sizes:
            setattr(module, name, value)
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def shrink(schedule: Schedule, tries: int = 300) -> Schedule:
    """Return a simpler schedule that fails too."""
    while True:
        for smaller in schedule.smaller():
            tries -= 1
            if tries < 0:
                return schedule
            if failure(smaller):
                schedule = smaller
                break
        else:
            return schedule


def failure(schedule: Schedule) -> BaseException | None:
    """Return the error of a schedule, or None."""
    try:
        run(schedule)
    except Exception as error:
        return error
    return None
