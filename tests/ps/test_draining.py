"""What a manager tells the thread that counts messages, and what that thread does with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from lapse_elmo.ps.draining import drain
from lapse_elmo.ps.mailbox import Mailbox
from lapse_elmo.ps.manager import Manager
from lapse_elmo.ps.messages import Freeze
from lapse_elmo.ps.transport import Backoff
from lapse_elmo.ps.wire import new


class Network:
    """A transport that delivers the given blocks and drops what it is sent."""

    def __init__(self, *blocks: np.ndarray) -> None:
        self.blocks = list(blocks)
        self.when_sent: Callable[[], None] = lambda: None

    def now(self) -> float:
        return 0.0

    def sleep(self, seconds: float) -> None:
        pass

    def receive(self) -> np.ndarray | None:
        return self.blocks.pop(0) if self.blocks else None

    def send(self, to: object, block: np.ndarray) -> None:
        self.when_sent()

    def outgoing_bytes(self, to: object = None) -> int:
        return 0


@pytest.fixture
def network() -> Network:
    return Network(new(Freeze, frozen=1, origin=0, ticket=1).block)


@pytest.fixture
def manager(network: Any) -> Manager:
    clocks, synced = np.zeros((2, 1), np.int64)
    return Manager(Mailbox(network), Backoff(network, False), [], "relocation", 0, [0], clocks, synced)


def test_counts_between_steps_are_those_of_all_messages(manager: Manager) -> None:
    assert manager.counts() == (0, 0, 0)
    manager.step()
    assert manager.counts() == (1, 1, 0)


def test_there_are_no_counts_during_a_step(manager: Manager, network: Network) -> None:
    seen: list[object] = []
    network.when_sent = lambda: seen.append(manager.counts())
    manager.step()
    assert seen == [None]


def test_there_are_no_counts_of_two_moments(manager: Manager, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that runs while the numbers are read makes them worthless, although none is under way at either end."""
    monkeypatch.setattr(Manager, "pending", property(lambda self: int(self.step())))
    assert manager.counts() is None


def test_a_drain_waits_for_the_end_of_a_step(manager: Manager, network: Network) -> None:
    answers = [None, None, (3, 2, 0), (3, 3, 0), (3, 3, 0)]  # in a step; in transit; arrived; and seen to be so

    class World:
        def sum_(self, counts: np.ndarray) -> None:
            pass

    class OfWorker:
        sent = handled = 0
        mailbox = manager.mailbox

    manager.counts = lambda: answers.pop(0)  # type: ignore[method-assign]
    drain(World(), OfWorker(), manager)  # type: ignore[arg-type]
    assert not answers
