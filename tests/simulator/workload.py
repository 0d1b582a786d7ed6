"""What the workers of a schedule do, and what each of their pulls must show.

Row r of the segment "counts" has a column per worker, into which that worker pushes ones. So a pull shows how many
pushes of each worker it sees, and the ledger knows between which bounds that may be:

- at least the worker's own pushes that were complete when the pull began, and at most all that had begun when it ended;
- with one copy per row, at least everybody's pushes that were complete when the pull began (sequential consistency per
  key), and no fewer than any earlier pull of the same worker saw;
- with replicas, at least what had reached the owners when the worker's last complete round began, by its clock.

Rows of "steps" have an update rule and get integer gradients: after a quiesce their copies must be equal to the bit,
and their accumulators the exact sums of squares. Each row of "owned" is set by one worker to ever larger numbers.

In each phase of every third schedule, one worker sets rows of "frequent", of which some have a copy on each node, and
after the quiesce one worker of each node pushes the same numbers to the copies there. So every worker knows all values.
"""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

import numpy as np

from lapse_elmo.ps.api import DONE
from lapse_elmo.ps.embedded import EmbeddedServer
from lapse_elmo.ps.layout import Layout
from lapse_elmo.ps.sampling import Distribution, Sampler
from tests.simulator.platform import Job, SimPlatform, SimWorld

if TYPE_CHECKING:
    from tests.simulator.invariants import Invariants
    from tests.simulator.schedule import Schedule

ONE_COPY = ("relocation", "static")


def require_equal(found: np.ndarray, expected: np.ndarray) -> None:
    """Raise AssertionError unless the arrays are equal; a tenth of the time of NumPy's own function."""
    if found.shape != expected.shape or np.count_nonzero(found != expected):
        raise AssertionError(f"found {found.tolist()}, expected {expected.tolist()}")


class Ledger:
    """The pushes of all workers: (worker, row) counts, begun and complete, and complete by clock."""

    def __init__(self, layout: Layout, num_workers: int, num_rows: int) -> None:
        self.layout = layout
        self.begun = np.zeros((num_workers, num_rows), np.int64)
        self.complete = np.zeros((num_workers, num_rows), np.int64)
        self.by_clock: list[list[np.ndarray]] = [[] for _ in range(num_workers)]  # complete at the end of each clock
        self.at_owners = np.zeros((num_workers, num_rows), np.int64)  # what must be there by the clocks
        self.squares = np.zeros((layout["steps"].num_rows, 3))
        self.pushing = 0  # number of workers with a push not yet fully applied or sent

    def ending(self, worker: int) -> None:
        """Note that a clock of ``worker`` is about to end."""
        self.by_clock[worker].append(self.complete[worker].copy())

    def ended(self, worker: int, slack: int) -> None:
        """Note that a clock of ``worker`` has ended, and so has a round that began at most ``slack`` clocks ago."""
        clock = len(self.by_clock[worker]) - slack
        if clock > 0:
            self.at_owners[worker] = self.by_clock[worker][clock - 1]


class Worker:
    """One worker, which runs a random program."""

    def __init__(
        self, schedule: Schedule, job: Job, rank: int, ledger: Ledger, invariants: Invariants, slowness: float
    ) -> None:
        self.schedule, self.rank, self.ledger, self.invariants = schedule, rank, ledger, invariants
        self.world = SimWorld(job, rank)
        self.platform = SimPlatform(self.world, slowness)
        self.random = Random(f"{schedule.seed} worker {rank}")
        self.pulls: list[tuple[int, np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
        self.pushes: list[tuple[int, np.ndarray]] = []
        self.localizes: list[int] = []
        self.samples: list[tuple[int, int]] = []  # (handle, count)
        self.seen = np.zeros((job.size, schedule.num_rows), np.int64)
        self.slack = schedule.staleness // 2 - 1
        self.reached: list[np.ndarray] = []  # what had reached the owners when each of its clocks ended
        self.last_set = 0
        self.frequent = np.zeros((ledger.layout["frequent"].num_rows, 2), np.float32)  # their values
        self.server: EmbeddedServer

    def run(self) -> None:
        """Open the server, use it for some phases, and close it."""
        schedule = self.schedule
        sampler = Sampler(Distribution("log-uniform", schedule.num_rows), schedule.scheme, False, 1, self.rank)
        self.server = EmbeddedServer(
            self.world, self.ledger.layout, ("counts", sampler), technique=schedule.technique,  # type: ignore[arg-type]
            staleness=schedule.staleness, platform=self.platform,
        )
        self.platform.opened(self.server)
        self.invariants.opened(self.server)
        calls = [self.push, self.push, self.pull, self.pull, self.wait, self.push_gradients, self.set]
        if not schedule.alone or self.rank == 0:
            calls += [self.intent, self.intent, self.localize, self.sample]
        for phase in range(schedule.phases):
            for _ in range(schedule.clocks_per_phase):
                if schedule.hot:
                    self.use_hot_rows()
                for _ in range(self.random.randint(0, schedule.calls_per_clock)):
                    self.random.choice(calls)()
                self.reached.append(self.ledger.at_owners.copy())
                self.ledger.ending(self.rank)
                self.server.advance_clock()
                self.ledger.ended(self.rank, self.slack)
            while self.pulls or self.pushes or self.localizes:
                self.wait()
            uses_frequent_rows = self.ledger.layout["frequent"].frequent > 0
            if uses_frequent_rows:
                self.set_frequent_rows(phase)
            self.server.quiesce()
            if uses_frequent_rows:
                self.push_frequent_rows(phase)
            self.after_quiesce(phase)
        self.server.close()

    def use_hot_rows(self) -> None:
        """Announce, push and pull the rows that all workers use for one clock, in time or late.

        Their replicas are refreshed in each round and are about to be dropped between two announcements.
        """
        if not self.schedule.alone:
            late = self.random.randint(0, 1)
            keys = self.ledger.layout["counts"].keys(np.arange(min(self.schedule.num_rows, 3)))
            self.server.intent(keys, self.server.clock + 1 - late, self.server.clock + 2 - late)
        self.push(hot=True)
        self.pull(hot=True)

    def rows(self, hot: bool = False) -> np.ndarray:
        """Return some distinct rows of "counts", frequent ones more often, or those that all workers use."""
        if hot:
            return np.arange(min(self.schedule.num_rows, 3))
        number = self.random.randint(1, self.schedule.num_rows)
        rows = [min(int(self.random.expovariate(0.3)), self.schedule.num_rows - 1) for _ in range(number)]
        return np.array(list(dict.fromkeys(rows)), np.int64)

    def push(self, hot: bool = False) -> None:
        """Begin to push ones."""
        rows = self.rows(hot)
        deltas = np.zeros((rows.size, self.ledger.begun.shape[0]), np.float32)
        deltas[:, self.rank] = 1
        self.ledger.begun[self.rank, rows] += 1
        self.ledger.pushing += 1
        ticket = self.server.push_async(rows, deltas)
        self.ledger.pushing -= 1
        self._under_way(self.pushes, ticket, rows)

    def pull(self, hot: bool = False) -> None:
        """Begin to pull."""
        rows, ledger = self.rows(hot), self.ledger
        out = np.full((rows.size, ledger.begun.shape[0]), np.nan, np.float32)
        if self.schedule.technique in ONE_COPY:
            least = np.maximum(ledger.complete, self.seen)[:, rows].copy()
        else:
            clock = len(self.reached) - self.slack
            reached = self.reached[clock - 1] if clock > 0 else np.zeros_like(ledger.begun)
            least = reached[:, rows].copy()
            least[self.rank] = ledger.complete[self.rank, rows]
        ticket = self.server.pull_async(rows, out)
        self.pulls.append((ticket, rows, out, least, np.empty(0)))
        if ticket == DONE:
            self._end_pull(self.pulls.pop())

    def _under_way(self, calls: list[tuple[int, np.ndarray]], ticket: int, rows: np.ndarray) -> None:
        if ticket == DONE:
            self.ledger.complete[self.rank, rows] += 1
        else:
            calls.append((ticket, rows))

    def _end_pull(self, pull: tuple[int, np.ndarray, np.ndarray, np.ndarray, np.ndarray]) -> None:
        _, rows, out, least, _ = pull
        shown = out.T
        assert (shown >= least).all(), (
            f"worker {self.rank} sees too few pushes of rows {rows.tolist()}: {shown.tolist()}, not {least.tolist()}"
        )
        most = self.ledger.begun[:, rows]
        assert (shown <= most).all(), (
            f"worker {self.rank} sees too many pushes of rows {rows.tolist()}: {shown.tolist()}, not {most.tolist()}"
        )
        self.seen[:, rows] = np.maximum(self.seen[:, rows], shown)

    def wait(self) -> None:
        """Wait for one pending call."""
        calls = [calls for calls in (self.pulls, self.pushes, self.localizes) if calls]
        if not calls:
            return
        chosen = self.random.choice(calls)
        call = chosen.pop(self.random.randrange(len(chosen)))
        if isinstance(call, int):
            self.server.wait(call)
        else:
            self.server.wait(call[0])
            if chosen is self.pulls:
                self._end_pull(call)  # type: ignore[arg-type]
            else:
                self.ledger.complete[self.rank, call[1]] += 1

    def intent(self) -> None:
        """Announce some rows for some clocks."""
        start = self.server.clock + self.random.randint(0, 3)
        segment = self.random.choice(("counts", "counts", "steps"))
        rows = self.rows() if segment == "counts" else np.arange(self.ledger.layout["steps"].num_rows)
        self.server.intent(self.ledger.layout[segment].keys(rows), start, start + self.random.randint(1, 4))

    def localize(self) -> None:
        """Begin to localize some rows; if nobody else moves rows, wait until they are local."""
        if self.schedule.alone and self.schedule.technique == "relocation":
            self.localize_two_segments()
            return
        rows = self.rows()
        ticket = self.server.localize_async(rows)
        if ticket != DONE:
            self.localizes.append(ticket)

    def localize_two_segments(self) -> None:
        """Localize rows of two segments at the same time; each call ends when its own rows are local."""
        steps = np.arange(self.ledger.layout["steps"].num_rows)
        calls = [("counts", self.rows()), ("steps", self.random.choice((steps, steps[:0])))]
        self.random.shuffle(calls)
        tickets = [self.server.localize_async(self.ledger.layout[name].keys(rows)) for name, rows in calls]
        for (name, rows), ticket in zip(calls, tickets, strict=True):
            if ticket != DONE:
                self.server.wait(ticket)
            here = self.server.is_local(name)
            assert here is not None and here[rows].all(), f"{name}: {rows.tolist()} were localized, not all are local"

    def push_gradients(self) -> None:
        """Push gradients to the segment that has an update rule."""
        segment = self.ledger.layout["steps"]
        rows = np.array(sorted({self.random.randrange(segment.num_rows) for _ in range(3)}), np.int64)
        gradients = np.array([[self.random.randint(-3, 3) for _ in range(3)] for _ in rows], np.float32)
        self.ledger.squares[rows] += gradients * gradients
        self.server.set_rate("steps", self.random.choice((0.1, 0.5)))
        self.server.push(segment.keys(rows), gradients)

    def set(self) -> None:
        """Set this worker's rows to a larger number and check it; other workers' rows never decrease."""
        segment = self.ledger.layout["owned"]
        mine = np.arange(2 * self.rank, 2 * self.rank + 2)
        if self.random.random() < 0.5 and not self.schedule.alone:
            self.server.intent(segment.keys(mine), self.server.clock, self.server.clock + 2)
        self.last_set += 1
        keys, out = segment.keys(mine), np.empty((2, 1), np.float32)
        if self.random.random() < 0.5:
            self.server.push(keys, np.ones((2, 1), np.float32))  # to be overwritten by the set
        self.server.set(keys, np.full((2, 1), self.last_set, np.float32))
        self.server.pull(keys, out)
        assert (out == self.last_set).all(), f"worker {self.rank} set {self.last_set} and sees {out.ravel().tolist()}"

    def set_frequent_rows(self, phase: int) -> None:
        """Set some frequent rows and others, as one of the workers; each worker has announced all of them."""
        segment = self.ledger.layout["frequent"]
        keys = segment.keys(np.arange(segment.num_rows))
        if not self.schedule.alone:
            self.server.intent(keys, self.server.clock, self.server.clock + self.random.randint(1, 3))
        rows = np.arange(phase % 2, segment.num_rows)
        self.frequent[rows] = 10 * phase + rows[:, None]
        if self.rank == (self.schedule.seed + phase) % self.world.size:
            self.server.set(keys[rows], self.frequent[rows])

    def push_frequent_rows(self, phase: int) -> None:
        """Check the rows after the quiesce; push the same numbers on each node to the frequent ones."""
        segment = self.ledger.layout["frequent"]
        keys, out = segment.keys(np.arange(segment.num_rows)), np.empty_like(self.frequent)
        self.server.pull(keys, out)
        require_equal(out, self.frequent)
        self.world.barrier()
        deltas = np.full((segment.frequent, 2), 1 + phase, np.float32)
        if self.world.local_rank == phase % self.world.local_size:
            self.server.push(keys[: segment.frequent], deltas)
        self.world.barrier()
        self.frequent[: segment.frequent] += deltas
        self.server.pull(keys, out)
        require_equal(out, self.frequent)

    def sample(self) -> None:
        """Prepare a sample, or pull one that was prepared."""
        if len(self.samples) < 2:
            count = self.random.randint(1, self.schedule.num_rows)
            start = self.server.clock + self.random.randint(0, 2)
            self.samples.append((self.server.prepare_sample(count, start, start + 2), count))
        else:
            handle, count = self.samples.pop(0)
            keys, out = np.empty(count, np.int64), np.empty((count, self.ledger.begun.shape[0]), np.float32)
            self.server.pull_sample(handle, keys, out)
            assert np.unique(keys).size == count
            assert (self.ledger.begun[:, keys] >= out.T).all()

    def after_quiesce(self, phase: int) -> None:
        """Check that all pushes are visible, all copies are equal to the bit, and the owned rows are a partition."""
        if self.rank == 0:
            self.invariants.check_copies()
        keys = np.arange(self.schedule.num_rows)
        out = np.empty((keys.size, self.ledger.begun.shape[0]), np.float32)
        self.server.pull(keys, out)
        require_equal(out.T, self.ledger.begun)
        if (self.schedule.seed + phase) % 3 == 0:
            if not self.schedule.alone or self.rank == 0:  # let rows move meanwhile
                self.server.intent(self.rows(), self.server.clock, self.server.clock + 1)
            mine = self.server.owned_rows("counts")
            everybody = np.concatenate(self.world.allgather(mine))
            require_equal(np.sort(everybody), keys)
            frequent = np.concatenate(self.world.allgather(self.server.owned_rows("frequent")))
            require_equal(np.sort(frequent), np.arange(len(self.frequent)))
        self.world.barrier()
