"""Polls that find nothing, repeated without running the task that polls.

Two of three events of a schedule are the poll of a task for messages that are not there. A poll is a function of what
it looks at. A task that has looked for messages, has found none and has done nothing else until it slept is in a loop
of such polls. As long as all that it looks at is as it was at the last one, the next one does the same: it sleeps
again, for as long as the task's own back-off says. Here is what tasks look at:

- their inbox;
- the counters of the node's rings, the clocks of the node's workers and those of its last round, in shared memory;
- the bytes in transit: then the poll is not repeated (``Task.looked``), since they change too often;
- of a manager, the time: whether a round is due, and whether messages that wait to be merged are.

``tests/ps/test_simulated.py`` compares schedules with and without repeated polls to the last event.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lapse_elmo.ps.manager import Manager
from lapse_elmo.ps.transport import Backoff
from tests.simulator.network import Simulation


class WorkerPoll:
    """The polls of a worker.

    Args:
        inbox: The worker's.
        shared: (n,) int64, what tasks of the node read in shared memory while they poll.
        backoff: The worker's.
    """

    def __init__(self, inbox: Sequence[np.ndarray], shared: np.ndarray, backoff: Backoff) -> None:
        self._inbox, self._shared, self._backoff = inbox, shared, backoff
        self._before = b""

    def note(self) -> None:
        """Store what the poll that has just found nothing looked at."""
        self._before = self._shared.tobytes()

    def repeats(self) -> bool:
        """If the next poll must find nothing either, sleep as it does and return True."""
        if self._inbox or self._shared.tobytes() != self._before:
            return False
        self._backoff.wait()
        return True


class ManagerPoll:
    """The polls of a manager; arguments as for :class:`WorkerPoll`."""

    def __init__(
        self, simulation: Simulation, inbox: Sequence[np.ndarray], shared: np.ndarray, manager: Manager
    ) -> None:
        self._simulation, self._inbox, self._shared, self._manager = simulation, inbox, shared, manager
        self._before = b""
        self._steps = 0  # the manager's, at the last note
        self._gates: tuple[bool, bool] | None = None  # None: the next poll is run

    def note(self) -> None:
        """Store what the poll that has just found nothing looked at."""
        manager = self._manager
        self._before = self._shared.tobytes()
        # `Manager.step` has set the time of its last flush to the current time if one was due. If this poll was not its
        # only step since it slept, that may have been in an earlier one, before messages came that wait for a flush.
        alone = manager._steps == self._steps + 2  # a step counts twice
        self._steps = manager._steps
        self._gates = (manager._rounds._due(), manager._flushed_s == self._simulation.now) if alone else None

    def repeats(self) -> bool:
        """If the next poll must find nothing either, do what it does and return True."""
        if self._inbox or self._shared.tobytes() != self._before:
            return False
        manager, now = self._manager, self._simulation.now
        flush_due = manager._flush_due(now)
        if (manager._rounds._due(), flush_due) != self._gates:
            return False
        if flush_due:
            manager._flushed_s = now
        manager._backoff.wait()
        return True
