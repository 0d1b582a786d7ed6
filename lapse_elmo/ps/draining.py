"""Waiting until no message is in transit."""

from __future__ import annotations

import numpy as np

from lapse_elmo.mpi.world import World
from lapse_elmo.ps.manager import Manager
from lapse_elmo.ps.requests import Requests
from lapse_elmo.ps.transport import Backoff


def drain(world: World, requests: Requests, manager: Manager | None) -> None:
    """Block until no message is in transit or being handled; for frozen managers (collective).

    Sums the numbers of messages sent and handled over all ranks. Nothing is in transit if no answer is pending and the
    number sent equals the number that had been handled at the previous count: within a single count, a rank may report
    its numbers before, another after the same message.

    Args:
        world: The ranks.
        requests: Those of this rank's worker.
        manager: This rank's manager, if it has one.
    """
    handled_before = -1
    backoff = Backoff(requests.mailbox.transport, spin=False)
    while True:
        counts = np.array([requests.sent, requests.handled, 0], np.int64)
        if manager is not None:
            while (of_manager := manager.counts()) is None:
                backoff.wait()
            counts += of_manager
        world.sum_(counts)
        if counts[0] == handled_before and not counts[2]:
            return
        if handled_before >= 0:  # no pause before the second count, the last if nothing is in transit
            backoff.wait()
        handled_before = int(counts[1])
