"""Tasks, time and a network that one seed controls: a discrete-event simulation.

Every task (a worker or a manager) is a greenlet that runs until it sleeps, waits for others, or is preempted. The next
event is the earliest one in a heap: a task resumes, or a block arrives. Delays are drawn from the seed, so events may
come in any order that a real network and scheduler allow; only blocks from one end to another keep their order.

Most events are polls that find nothing. A poll that must find the same as the one before it, because nothing that it
looks at has changed, is repeated without running the task (:mod:`tests.simulator.polls`): the same event at the same
time, with the same random numbers.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Protocol

import greenlet
import numpy as np

from lapse_elmo.ps.transport import TO_WORKER, VALUES, Address


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


class Poll(Protocol):
    """How a task polls for messages."""

    def note(self) -> None:
        """Store what the poll that has just found nothing looked at."""

    def repeats(self) -> bool:
        """If the next poll must find nothing either, do what it does, which includes sleeping, and return True."""


@dataclass(eq=False, slots=True)
class Task:
    """A greenlet, and whether it was last interrupted between two steps of its work or within one."""

    name: str
    run: Callable[[], None]
    slowness: float = 1.0
    within: bool = False
    blocked: bool = False
    let: greenlet.greenlet | None = None
    poll: Poll | None = None  # None: every poll runs the task
    polled: bool = False  # it has looked for messages, there were none, and it has done nothing since
    looked: bool = False  # since it was resumed, it has looked at something that `poll` does not
    repeats: Callable[[], bool] | None = None  # what may stand for the next poll


@dataclass(eq=False, slots=True)
class Channel:
    """The blocks on their way from one end to another, and where they go."""

    ends: tuple[Address, Address]
    receiver: Address  # who has the blocks in transit counted: values count for the worker that gets them
    arrived: deque[np.ndarray]
    blocks: deque[np.ndarray] = field(default_factory=deque)
    sent: deque[np.ndarray] = field(default_factory=deque)  # the senders' own arrays, of which ``blocks`` are copies
    last: float = 0.0  # when the block that was sent last arrives


@dataclass
class Simulation:
    """The heap of events. ``check`` runs after each delivery at which no manager is within a step."""

    random: Random
    pace: Pace
    longest_s: float = 600.0  # limit of simulated time: far more than any schedule that makes progress takes
    repeat_polls: bool = True  # False: every poll runs its task
    now: float = 0.0
    deliveries: int = 0
    check: Callable[[], None] | None = None
    tasks: list[Task] = field(default_factory=list)
    current: Task | None = None  # the task that runs, or ran last
    channels: dict[tuple[Address, Address], Channel] = field(default_factory=dict)
    inboxes: dict[Address, deque[np.ndarray]] = field(default_factory=dict)
    values: dict[tuple[int, int], deque[np.ndarray]] = field(default_factory=dict)  # by (sending rank, receiving rank)
    outgoing: dict[Address, int] = field(default_factory=dict)
    total_outgoing: int = 0
    _heap: list[tuple[float, int, Task | Channel]] = field(default_factory=list)
    _number: int = 0
    _num_within: int = 0  # tasks within a step
    _repeating: bool = False
    _main: greenlet.greenlet = field(default_factory=greenlet.getcurrent)

    def add(self, task: Task) -> None:
        """Start ``task`` at the current time."""
        self.tasks.append(task)
        task.let = greenlet.greenlet(task.run, self._main)
        self._push(self.now, task)

    def run(self) -> None:
        """Run until all tasks have ended."""
        heap, pop, longest_s = self._heap, heapq.heappop, self.longest_s
        while heap:
            self.now, _, event = pop(heap)
            if self.now > longest_s:
                raise NoProgress(f"no end: {', '.join(t.name for t in self.tasks if t.let is not None)} still run")
            if isinstance(event, Channel):
                self._deliver(event)
                continue
            self.current = event
            if event.repeats is not None:
                self._repeating = True
                repeated = event.repeats()
                self._repeating = False
                if repeated:
                    continue
            self._resume(event)
        waiting = [task.name for task in self.tasks if task.let is not None]
        if waiting:
            raise NoProgress(f"no end: {', '.join(waiting)} wait for ever")

    def _resume(self, task: Task) -> None:
        assert task.let is not None
        task.polled = task.looked = False
        task.repeats = None
        if not task.within:
            task.within = True
            self._num_within += 1
        task.let.switch()
        if task.let.dead:
            task.let = None
            self._leave(task)

    def _leave(self, task: Task) -> None:
        """Note that ``task`` is not within a step."""
        task.within = False
        self._num_within -= 1

    def _deliver(self, channel: Channel) -> None:
        block, sent = channel.blocks.popleft(), channel.sent.popleft()
        # MPI reads a block at any time until its send is complete.
        assert sent.tobytes() == block.tobytes(), "a block was changed after it was sent"
        self.outgoing[channel.receiver] -= block.nbytes
        self.total_outgoing -= block.nbytes
        channel.arrived.append(block)
        self.deliveries += 1
        if self.check is not None and not self._num_within:
            self.current = None
            self.check()

    def _push(self, when: float, event: Task | Channel) -> None:
        self._number += 1
        heapq.heappush(self._heap, (when, self._number, event))

    # Called by tasks.

    def sleep(self, seconds: float) -> None:
        """Let others run for about ``seconds``; the task is between two steps of its work."""
        task, shortest_s = self.current, self.pace.poll_s
        assert task is not None
        seconds = (seconds if seconds > shortest_s else shortest_s) * task.slowness * (1 + 7 * self.random.random())
        self._push(self.now + seconds, task)
        if self._repeating:  # no task runs
            return
        if task.polled and task.poll is not None and not task.looked and self.repeat_polls:
            task.poll.note()
            task.repeats = task.poll.repeats
        self._leave(task)
        self._main.switch()

    def sleep_until(self, condition: Callable[[], object], seconds: float) -> None:
        """Sleep for about ``seconds`` at a time until ``condition`` holds."""

        def repeats() -> bool:
            if condition():
                return False
            self.sleep(seconds)
            return True

        task = self.current
        assert task is not None
        while not condition():
            task.polled = False
            if self.repeat_polls:
                task.repeats = repeats
            self.sleep(seconds)

    def preempt(self) -> None:
        """Interrupt the task with some probability, within a step."""
        task = self.current
        assert task is not None
        task.polled = False
        if self.random.random() >= self.pace.preemption:
            return
        pause_s = self.random.expovariate(1 / self.pace.pause_s) * task.slowness
        if self.random.random() < self.pace.stall_share:
            pause_s = self.pace.stall_s
        self._push(self.now + pause_s, task)
        self._main.switch()

    def block(self) -> None:
        """Wait until `release` is called for this task."""
        task = self.current
        assert task is not None
        task.blocked = True
        self._leave(task)
        while task.blocked:
            self._main.switch()

    def release(self, task: Task) -> None:
        """End the `block` of ``task``."""
        task.blocked = False
        self._push(self.now + self.random.expovariate(1 / self.pace.pause_s), task)

    def channel(self, sender: Address, to: Address) -> Channel:
        """Return the channel between two ends."""
        channel = self.channels.get((sender, to))
        if channel is None:
            if to.tag == VALUES:
                receiver = Address(to.rank, TO_WORKER)
                arrived = self.values.setdefault((sender.rank, to.rank), deque())
            else:
                receiver, arrived = to, self.inboxes.setdefault(to, deque())
            channel = self.channels[sender, to] = Channel((sender, to), receiver, arrived)
            self.outgoing.setdefault(receiver, 0)
        return channel

    def send(self, channel: Channel, block: np.ndarray) -> None:
        """Begin to send a copy of ``block``, which must not be changed from now on."""
        assert self.current is not None
        self.current.polled = False
        pace, random = self.pace, self.random
        mean_s = pace.latency_s if random.random() >= pace.slow_share else pace.slow_latency_s
        channel.last = max(self.now + random.expovariate(1 / mean_s), channel.last)
        channel.blocks.append(block.copy())
        channel.sent.append(block)
        self.outgoing[channel.receiver] += block.nbytes
        self.total_outgoing += block.nbytes
        self._push(channel.last, channel)


class SimTransport:
    """The :class:`~lapse_elmo.ps.transport.Transport` of one simulated end."""

    def __init__(self, simulation: Simulation, rank: int, tag: int) -> None:
        self.address = Address(rank, tag)
        self._simulation = simulation
        self.inbox = simulation.inboxes.setdefault(self.address, deque())
        self._channels: dict[Address, Channel] = {}

    def _channel(self, to: Address) -> Channel:
        channel = self._channels.get(to)
        if channel is None:
            channel = self._channels[to] = self._simulation.channel(self.address, to)
        return channel

    def send(self, to: Address, block: np.ndarray) -> None:
        self._simulation.send(self._channel(to), block)

    def receive(self) -> np.ndarray | None:
        if self.inbox:
            return self.inbox.popleft()
        task = self._simulation.current
        assert task is not None
        task.polled = True
        return None

    def send_values(self, rank: int, values: np.ndarray) -> None:
        self._simulation.send(self._channel(Address(rank, VALUES)), values)

    def receive_values(self, rank: int, values: np.ndarray) -> None:
        waiting = self._simulation.values.setdefault((rank, self.address.rank), deque())
        self._simulation.sleep_until(waiting.__len__, 1e-4)
        values[:] = waiting.popleft()

    def outgoing_bytes(self, to: Address | None = None) -> int:
        simulation = self._simulation
        assert simulation.current is not None
        simulation.current.looked = True
        number = simulation.total_outgoing if to is None else simulation.outgoing.get(to, 0)
        return number * simulation.pace.outgoing_scale

    def allocate(self, size: int) -> np.ndarray:
        return np.empty(size, np.uint8)

    def now(self) -> float:
        return self._simulation.now

    def sleep(self, seconds: float) -> None:
        self._simulation.sleep(seconds)

    def finish(self) -> None:
        """Return at once: whatever was sent has been copied."""
