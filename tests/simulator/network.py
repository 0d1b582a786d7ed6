"""Tasks, time and a network that one seed controls: a discrete-event simulation.

Every task (a worker or a manager) is a greenlet that runs until it sleeps, waits for others, or is preempted. The next
event is the earliest one in a heap: a task resumes, or a block arrives. Delays are drawn from the seed, so events may
come in any order that a real network and scheduler allow; only blocks from one end to another keep their order.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import greenlet
import numpy as np

from lapse_elmo.ps.transport import TO_MANAGER, TO_WORKER, VALUES, Address


class NoProgress(AssertionError):
    """The job did not end."""


@dataclass
class Pace:
    """Speeds and delays of one schedule, in seconds of simulated time."""

    latency_s: float = 3e-4  # mean delay of a block
    slow_latency_s: float = 2e-2  # mean delay of a slow block
    slow_share: float = 0.1  # fraction of blocks that are slow
    preemption: float = 0.2  # probability of being interrupted at an access to rows
    pause_s: float = 2e-4  # mean length of an interruption
    stall_share: float = 0.01  # fraction of interruptions that are stalls
    stall_s: float = 0.1  # length of a stall: longer than any pause of the protocol
    poll_s: float = 4e-4  # shortest sleep, so that a poll that finds nothing takes time here too
    outgoing_scale: int = 1  # factor by which bytes in transit count, to reach limits with small messages


@dataclass(eq=False)
class Task:
    """A greenlet, and whether it was last interrupted between two steps of its work or within one."""

    name: str
    run: Callable[[], None]
    slowness: float = 1.0
    within: bool = False
    blocked: bool = False
    let: greenlet.greenlet | None = None


@dataclass
class Simulation:
    """The heap of events. ``check`` runs after each delivery at which no manager is within a step."""

    random: Random
    pace: Pace
    longest_s: float = 600.0  # limit of simulated time: far more than any schedule that makes progress takes
    now: float = 0.0
    deliveries: int = 0
    check: Callable[[], None] | None = None
    tasks: list[Task] = field(default_factory=list)
    current: Task | None = None
    channels: dict[tuple[Address, Address], deque[np.ndarray]] = field(default_factory=dict)
    inboxes: dict[Address, deque[np.ndarray]] = field(default_factory=dict)
    values: dict[tuple[int, int], deque[np.ndarray]] = field(default_factory=dict)  # by (sending rank, receiving rank)
    outgoing: dict[Address, int] = field(default_factory=dict)
    _heap: list[tuple[float, int, Task | tuple[Address, Address]]] = field(default_factory=list)
    _number: int = 0
    _last: dict[tuple[Address, Address], float] = field(default_factory=dict)
    _main: greenlet.greenlet = field(default_factory=greenlet.getcurrent)

    def add(self, task: Task) -> None:
        """Start ``task`` at the current time."""
        self.tasks.append(task)
        task.let = greenlet.greenlet(task.run, self._main)
        self._push(self.now, task)

    def run(self) -> None:
        """Run until all tasks have ended."""
        while self._heap:
            self.now, _, event = heapq.heappop(self._heap)
            if self.now > self.longest_s:
                raise NoProgress(f"no end: {', '.join(t.name for t in self.tasks if t.let is not None)} still run")
            if isinstance(event, Task):
                self._resume(event)
            else:
                self._deliver(*event)
        waiting = [task.name for task in self.tasks if task.let is not None]
        if waiting:
            raise NoProgress(f"no end: {', '.join(waiting)} wait for ever")

    def _resume(self, task: Task) -> None:
        assert task.let is not None
        self.current, task.within = task, True
        task.let.switch()
        self.current = None
        if task.let.dead:
            task.let = None
            task.within = False

    def _deliver(self, sender: Address, to: Address) -> None:
        block = self.channels[sender, to].popleft()
        self.outgoing[to._replace(tag=TO_WORKER) if to.tag == VALUES else to] -= block.nbytes
        if to.tag == VALUES:
            self.values.setdefault((sender.rank, to.rank), deque()).append(block)
        else:
            self.inboxes.setdefault(to, deque()).append(block)
        self.deliveries += 1
        if self.check is not None and not any(task.within for task in self.tasks):
            self.check()

    def _push(self, when: float, event: Task | tuple[Address, Address]) -> None:
        self._number += 1
        heapq.heappush(self._heap, (when, self._number, event))

    # Called by tasks.

    def sleep(self, seconds: float) -> None:
        """Let others run for about ``seconds``; the task is between two steps of its work."""
        task = self.current
        assert task is not None
        seconds = max(seconds, self.pace.poll_s) * task.slowness * (1 + 7 * self.random.random())
        self._push(self.now + seconds, task)
        task.within = False
        self._main.switch()

    def preempt(self) -> None:
        """Interrupt the task with some probability, within a step."""
        if self.current is None or self.random.random() >= self.pace.preemption:
            return
        pause_s = self.random.expovariate(1 / self.pace.pause_s) * self.current.slowness
        if self.random.random() < self.pace.stall_share:
            pause_s = self.pace.stall_s
        self._push(self.now + pause_s, self.current)
        self._main.switch()

    def block(self) -> None:
        """Wait until `release` is called for this task."""
        task = self.current
        assert task is not None
        task.blocked, task.within = True, False
        while task.blocked:
            self._main.switch()

    def release(self, task: Task) -> None:
        """End the `block` of ``task``."""
        task.blocked = False
        self._push(self.now + self.random.expovariate(1 / self.pace.pause_s), task)

    def send(self, sender: Address, to: Address, block: np.ndarray) -> None:
        """Begin to send a copy of ``block``."""
        channel = (sender, to)
        mean_s = self.pace.latency_s if self.random.random() >= self.pace.slow_share else self.pace.slow_latency_s
        when = max(self.now + self.random.expovariate(1 / mean_s), self._last.get(channel, 0.0))
        self._last[channel] = when
        self.channels.setdefault(channel, deque()).append(block.copy())
        end = to._replace(tag=TO_WORKER) if to.tag == VALUES else to
        self.outgoing[end] = self.outgoing.get(end, 0) + block.nbytes
        self._push(when, channel)


class SimTransport:
    """The :class:`~lapse_elmo.ps.transport.Transport` of one simulated end."""

    def __init__(self, simulation: Simulation, rank: int, tag: int) -> None:
        self.address = Address(rank, tag)
        self._simulation = simulation
        self._inbox = simulation.inboxes.setdefault(self.address, deque())

    def send(self, to: Address, block: np.ndarray) -> None:
        self._simulation.send(self.address, to, block)

    def receive(self) -> np.ndarray | None:
        return self._inbox.popleft() if self._inbox else None

    def send_values(self, rank: int, values: np.ndarray) -> None:
        self._simulation.send(self.address, Address(rank, VALUES), values)

    def receive_values(self, rank: int, values: np.ndarray) -> None:
        waiting = self._simulation.values.setdefault((rank, self.address.rank), deque())
        while not waiting:
            self._simulation.sleep(1e-4)
        values[:] = waiting.popleft()

    def outgoing_bytes(self, to: Address | None = None) -> int:
        outgoing = self._simulation.outgoing
        return (sum(outgoing.values()) if to is None else outgoing.get(to, 0)) * self._simulation.pace.outgoing_scale

    def allocate(self, size: int) -> np.ndarray:
        return np.empty(size, np.uint8)

    def now(self) -> float:
        return self._simulation.now

    def sleep(self, seconds: float) -> None:
        self._simulation.sleep(seconds)

    def finish(self) -> None:
        """Return at once: whatever was sent has been copied."""


def manager_address(rank: int) -> Address:
    """Return the address of the manager of the node whose first rank is ``rank``."""
    return Address(rank, TO_MANAGER)
