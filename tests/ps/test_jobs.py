"""A manager's jobs, when messages of other nodes come while a job waits for room."""

from __future__ import annotations

import numpy as np
import pytest

from lapse_elmo import native
from lapse_elmo.ps import mailbox, wire
from lapse_elmo.ps.layout import Layout
from lapse_elmo.ps.mailbox import Mailbox
from lapse_elmo.ps.manager import Manager
from lapse_elmo.ps.messages import Message, Relocate, Replicate, Sync, SyncDone, Want
from lapse_elmo.ps.node_state import SegmentState, stamps_name
from lapse_elmo.ps.rows import SOURCE, NativeRows, array_shapes
from lapse_elmo.ps.transport import Address, Backoff
from lapse_elmo.ps.wire import new, read
from tests.simulator.memory import JobMemory

pytestmark = pytest.mark.skipif(native.load(SOURCE) is None, reason="the rows are accessed through rows.c")

HOLDER, OWNER, OTHER = range(3)  # nodes
ROWS = np.array([1, 4, 7])  # whose home is OWNER


class Network:
    """A transport whose receivers have room for one message, until :meth:`receive_all` is called."""

    def __init__(self) -> None:
        self.blocks: list[np.ndarray] = []
        self.sent: list[tuple[int, Message]] = []
        self._outgoing: dict[Address, int] = {}
        self._now = 0.0

    def now(self) -> float:
        self._now += 1.0
        return self._now

    def receive(self) -> np.ndarray | None:
        return self.blocks.pop(0) if self.blocks else None

    def send(self, to: Address, block: np.ndarray) -> None:
        self.sent += [(to.rank, message) for message in read(block)]
        self._outgoing[to] = 1 << 30

    def receive_all(self) -> None:
        self._outgoing.clear()

    def outgoing_bytes(self, to: Address | None = None) -> int:
        return self._outgoing.get(to, 0) if to is not None else 0

    def allocate(self, size: int) -> np.ndarray:
        return np.empty(size, np.uint8)


@pytest.fixture
def state() -> SegmentState:
    segment = Layout.of(("rows", 9, 2)).segments[0]
    shapes = array_shapes(segment, several_nodes=True)
    shapes |= {stamps_name(segment): ((9,), np.int64), "clocks": ((1,), np.int64)}
    memory = JobMemory(1, shapes).of(0, -1)
    library = native.load(SOURCE)
    assert library is not None
    state = SegmentState(0, segment, memory, NativeRows(memory, segment, library), OWNER, 3)  # type: ignore[arg-type]
    state.occupy()
    return state


def test_a_row_that_another_node_got_meanwhile_is_not_promoted(
    state: SegmentState, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the other node's replica would belong to a row that is not here, and be promoted from a freed slot."""
    monkeypatch.setattr(wire, "CHUNK_BYTES", 8)  # one row
    monkeypatch.setattr(mailbox, "_MERGED_BYTES", 0)
    network, clocks = Network(), np.zeros((2, 1), np.int64)
    manager = Manager(
        Mailbox(network), Backoff(network, False), [state], "adaptive", OWNER, range(3), *clocks  # type: ignore[arg-type]
    )

    def handle(message: Message | None = None) -> list[tuple[int, Message]]:
        """Let the manager handle a message and send what there is room for; return what it sends."""
        network.blocks += [] if message is None else [message.block]
        manager.step()
        sent, network.sent = network.sent, []
        return sent

    def wanted_by(node: int, rows: np.ndarray) -> Want:
        return new(Want, segment=0, rows=rows, stamps=state.stamps[rows], nodes=np.full(rows.size, node))

    state.intents[ROWS] = 1  # so that HOLDER gets replicas
    handle(wanted_by(HOLDER, ROWS))
    while not state.holders.is_held_by(ROWS, HOLDER).all():
        network.receive_all()
        handle()
    network.receive_all()
    state.intents[ROWS] = 0  # so that they are promoted
    sent = handle(new(Sync, node=HOLDER, exact=0))
    assert [(to, type(message)) for to, message in sent] == [(HOLDER, Relocate)]
    sent = handle(wanted_by(OTHER, ROWS[-1:]))
    assert [(to, type(message)) for to, message in sent] == [(OTHER, Replicate)]
    promoted: list[int] = []
    while sent and not isinstance(sent[-1][1], SyncDone):
        network.receive_all()
        sent = handle()
        promoted += [row for _, message in sent if isinstance(message, Relocate) for row in message.rows.tolist()]
    assert promoted == ROWS[1:-1].tolist()
    assert state.rows.owned(ROWS).tolist() == [False, False, True]
    assert state.holders.is_held_by(ROWS[-1:], HOLDER).all() and state.holders.is_held_by(ROWS[-1:], OTHER).all()


def test_rows_that_are_not_here_cannot_be_given(state: SegmentState) -> None:
    """Their slots may belong to other rows by now."""
    out = np.empty((1, 2), np.float32)
    state.give_main(ROWS[:1], HOLDER, out)
    with pytest.raises(AssertionError, match="not here"):
        state.give_main(ROWS[:1], OTHER, out)
