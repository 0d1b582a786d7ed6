"""Requests for rows that a node does not own: forwarded to the owner, or queued until the rows arrive."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from lapse_elmo.ps.directory import epoch_of, group_by_node, node_of
from lapse_elmo.ps.messages import Message, Pull, Push, Set, Want
from lapse_elmo.ps.node_state import SegmentState
from lapse_elmo.ps.rounds import SendToNode
from lapse_elmo.ps.wire import select

Request = TypeVar("Request", Pull, Push, Set, Want)


class Router:
    """Forwards and queues the requests of one node's manager."""

    def __init__(self, states: Sequence[SegmentState], node: int, send: SendToNode) -> None:
        self._states, self._node, self._send = states, node, send
        self._queued: list[Pull | Push | Set | Want] = []
        self._arrived = False

    def select_owned(self, message: Request, chunk: slice | None = None) -> Request:
        """Return the part of a request (or of its ``chunk``) whose main copies are here; the rest is forwarded.

        A replica does not serve other nodes' workers: their pushes would not be where their next pulls look for them.
        """
        rows = self._states[message.segment].rows
        wanted = message.rows if chunk is None else message.rows[chunk]
        if rows.all_owned(wanted):
            whole = chunk is None or wanted.size == message.rows.size
            return message if whole else select(message, chunk)  # type: ignore[arg-type]
        owned = rows.owned(wanted)
        start = 0 if chunk is None else chunk.start
        self.route(message, np.flatnonzero(~owned) + start)
        return select(message, np.flatnonzero(owned) + start)

    def route(self, message: Request, indices: np.ndarray | None = None) -> None:
        """Forward the rows at ``indices`` (default: all) to where they are, or queue them if they are about to come."""
        if indices is None:
            indices = np.arange(message.rows.size)
        if not indices.size:
            return
        state = self._states[message.segment]
        stamps = state.stamps[message.rows[indices]]
        coming = epoch_of(message.stamps[indices]) > epoch_of(stamps)
        if coming.any():
            self._queued.append(select(message, indices[coming]))
            state.stats.queued_rows += int(coming.sum())
            indices, stamps = indices[~coming], stamps[~coming]
        changes = {"forwarded": 1} if isinstance(message, Pull) else {}
        for node, chosen in group_by_node(node_of(stamps)):
            assert node != self._node, "a row is neither here nor on its way"
            self._send(node, select(message, indices[chosen], stamps=stamps[chosen], **changes))
        state.stats.forwarded_rows += indices.size

    def rows_arrived(self) -> None:
        """Main copies have arrived: what waits for them may be served."""
        self._arrived = True

    def take_queued(self) -> list[Message]:
        """Return the queued requests to be handled again; those whose rows have not come will be queued again."""
        if not self._arrived:
            return []
        self._arrived = False
        queued, self._queued = self._queued, []
        return list(queued)


def complement(indices: np.ndarray, number: int) -> np.ndarray:
    """Return 0 .. ``number`` - 1 without ``indices``."""
    kept = np.ones(number, bool)
    kept[indices] = False
    return np.flatnonzero(kept)
